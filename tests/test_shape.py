"""Promise: cores decide, shells act. A core loads no Ray, torch, socket library or event loop."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "messages", "engine", "kv_transfer", "runtime", "prefill_worker", "decode_worker", "worker", "router", "gateway",
    "cluster",
)  # fmt: skip
CORES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for package in PACKAGES
    for path in (ROOT / package).rglob("core/**/*.py")
)
# What a core must not load, even through others, and what its own lines must not import.
HEAVY = {"ray", "torch", "zmq", "grpc", "asyncio", "fastapi", "uvicorn", "transformers"}
IMPURE = HEAVY | {"threading", "socket", "time", "datetime", "random", "secrets", "subprocess", "multiprocessing"}


def test_there_are_cores() -> None:
    assert len(CORES) > 15


@pytest.mark.parametrize("core", CORES)
def test_a_core_imports_nothing_impure(core: str) -> None:
    tree = ast.parse((ROOT / core.replace(".", "/")).with_suffix(".py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    assert not names & IMPURE


def test_cores_load_nothing_heavy_in_a_fresh_interpreter() -> None:
    code = f"""
import sys
from importlib import import_module
sys.path.insert(0, {str(ROOT)!r})
for core in {CORES!r}:
    import_module(core)
    heavy = {HEAVY!r} & {{name.split(".")[0] for name in sys.modules}}
    assert not heavy, f"{{core}} loads {{heavy}}"
"""
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("package", [*PACKAGES, "simulator"])
def test_init_files_hold_a_docstring_and_nothing_else(package: str) -> None:
    for path in (ROOT / package).rglob("__init__.py"):
        body = ast.parse(path.read_text()).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant), path


def test_no_pickle_in_our_code() -> None:
    forbidden = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    for package in [*PACKAGES, "simulator"]:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    assert not forbidden & {alias.name.split(".")[0] for alias in node.names}, path
                elif isinstance(node, ast.ImportFrom):
                    assert (node.module or "").split(".")[0] not in forbidden, path
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id not in {"eval", "exec"}, path
                elif isinstance(node, ast.Attribute):
                    assert node.attr not in {"recv_pyobj", "send_pyobj"}, path

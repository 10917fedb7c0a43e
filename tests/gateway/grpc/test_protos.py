"""Promise: what is kept of generated code is what the .proto files beside it say."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROTOS = ROOT / "gateway" / "protos"
WITH_SERVICES = ("vllm_engine", "open_inference")


def test_the_kept_stubs_are_the_generated_ones(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    kept = {path.name: path.read_text() for path in PROTOS.glob("*_pb2*.py*")}
    names = [str(path.relative_to(ROOT)) for path in sorted(PROTOS.glob("*.proto"))]
    served = [name for name in names if Path(name).stem in WITH_SERVICES]
    protoc = [sys.executable, "-m", "grpc_tools.protoc", "--proto_path", "."]
    for command in (
        [*protoc, "--python_out", str(tmp_path), "--pyi_out", str(tmp_path), *names],
        [*protoc, "--grpc_python_out", str(tmp_path), *served],
    ):
        subprocess.run(command, cwd=ROOT, check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "gateway" / "protos").iterdir()}
    assert made == kept, "run `make protos`"

"""Programs of others, run as they are against a Baton that runs: each in an environment of its own that `make peers`
makes; without it they are skipped."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BATON = Path(sys.executable).with_name("baton")
TOPOLOGY = ROOT / "configs" / "topologies" / "local.yaml"


def program(peer: str, name: str) -> Path:
    """A program of a peer's environment; the test is skipped where there is none."""
    path = ROOT / ".peers" / peer / "bin" / name
    if not path.exists():
        pytest.skip(f"there is no {path.relative_to(ROOT)}: `make peers` installs it")
    return path


def run(*command: str | Path, cwd: Path | None = None, within: float = 240.0, **environment: str) -> str:
    """What it prints; it must end well."""
    own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=within,
        env=own | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="package")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The gateway of a real cluster, prefill and decode apart, in fp32; or BATON_URL, one that serves tiny-llama so."""
    if "BATON_URL" in os.environ:
        yield os.environ["BATON_URL"]
        return
    folder = tmp_path_factory.mktemp("run")
    topology = folder / "local.yaml"
    text = TOPOLOGY.read_text().replace("../../models", str(ROOT / "models"))
    topology.write_text(text.replace("dtype: auto ", "dtype: float32 ", 1))
    environment = os.environ | {"XDG_RUNTIME_DIR": str(folder)}
    command = [BATON, "up", "--detach", str(topology), "--port", "0"]
    up = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert up.returncode == 0, up.stdout + up.stderr
    found = re.search(r"http://127\.0\.0\.1:\d+", up.stdout)
    assert found is not None, up.stdout
    try:
        yield found[0]
    finally:
        subprocess.run([BATON, "down"], check=True, capture_output=True, timeout=120, env=environment)

"""Programs of others, run as they are against a Baton that runs: each in an environment of its own that `make peers`
makes; without it they are skipped."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Served(NamedTuple):
    """A cluster's only gateway."""

    url: str
    grpc: str
    """Its address."""


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real cluster, prefill and decode apart, in fp32; or BATON_URL and BATON_GRPC, one that serves tiny-llama so."""
    if "BATON_URL" in os.environ:
        yield Served(os.environ["BATON_URL"], os.environ.get("BATON_GRPC", ""))
        return
    folder, port = tmp_path_factory.mktemp("run"), free_port()
    topology = yaml.safe_load(TOPOLOGY.read_text())
    topology |= {"model": str(ROOT / "models" / "tiny-llama"), "dtype": "float32"}
    topology["gateway"] |= {"port": 0, "grpc_port": port}
    file = folder / TOPOLOGY.name
    file.write_text(yaml.safe_dump(topology))
    environment = os.environ | {"XDG_RUNTIME_DIR": str(folder)}
    command = [BATON, "up", "--detach", str(file)]
    try:
        up = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert up.returncode == 0, up.stdout + up.stderr
        found = re.search(r"http://127\.0\.0\.1:\d+", up.stdout)
        assert found is not None, up.stdout
        yield Served(found[0], f"127.0.0.1:{port}")
    except BaseException:  # what `down` says then would hide why
        subprocess.run([BATON, "down"], capture_output=True, timeout=120, env=environment)
        raise
    subprocess.run([BATON, "down"], check=True, capture_output=True, timeout=120, env=environment)


@pytest.fixture(scope="package")
def url(served: Served) -> str:
    return served.url


@pytest.fixture(scope="package")
def grpc_address(served: Served) -> str:
    if not served.grpc:
        pytest.skip("BATON_URL is there, and no BATON_GRPC")
    return served.grpc

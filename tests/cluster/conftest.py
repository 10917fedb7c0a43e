from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.server import Server


@pytest.fixture(autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Clusters that run on this machine are none of these tests' business."""
    runtime = tmp_path_factory.mktemp("runtime")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    return runtime / "baton"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()

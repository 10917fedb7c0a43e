"""Promise: whatever goes wrong while a cluster is taken down, its Ray goes too, and the processes' logs are kept."""

from pathlib import Path

import pytest

from cluster import launch
from cluster.launch import Cluster
from cluster.plan import make_plan
from cluster.topology import Topology


class Ray:
    """A session whose Ray leaves a process behind."""

    folder = head_pid = joined = None

    def __init__(self, address: str, namespace: str) -> None:
        self.logs: Path | None = None
        self.stopped = 0

    def stop(self) -> list[str]:
        self.stopped += 1
        return ["raylet (pid 7)"]


class Stuck:
    """Processes that cannot be stopped in good order."""

    def close(self) -> list[str]:
        raise ConnectionError("Ray does not answer")


def test_what_keeps_processes_from_ending_is_told_when_ray_is_down(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "RaySession", Ray)
    topology = Topology.parse({"model": str(tiny_llama), "pools": [{"name": "a", "role": "colocated"}]})
    cluster = Cluster(make_plan(topology), keep_logs_in=tmp_path / "kept")
    session = cluster._session
    assert isinstance(session, Ray)
    session.logs = tmp_path / "logs"
    session.logs.mkdir()
    (session.logs / "worker.err").write_text("its last words")
    cluster._processes = Stuck()  # type: ignore[assignment]
    with pytest.raises(ConnectionError, match="Ray does not answer") as raised:
        cluster.stop()
    assert session.stopped == 1
    assert (tmp_path / "kept" / "worker.err").read_text() == "its last words"
    assert raised.value.__notes__ == [
        f"the processes' logs are in {tmp_path / 'kept'}",
        "raylet (pid 7) is still there",
    ]
    assert cluster.stop().items == ["raylet (pid 7)"], "harmless twice"

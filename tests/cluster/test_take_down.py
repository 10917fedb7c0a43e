"""Promise: whatever goes wrong while a cluster is taken down, its Ray goes too, and the processes' logs are kept."""

from pathlib import Path

import pytest
from rich.console import Console

from cluster import launch, running, state
from cluster.errors import ClusterError
from cluster.launch import Cluster, Remains
from cluster.plan import make_plan
from cluster.topology import Topology


class Ray:
    """A session whose Ray leaves a process behind."""

    folder = head_pid = joined = None

    def __init__(self, address: str, namespace: str, *, allow_open: bool) -> None:
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


class Leaving:
    """A cluster that cannot end something."""

    ray_folder = ray_address = None
    url, grpc_ports = "http://127.0.0.1:9", ()

    def __init__(self, *_: object, **options: object) -> None: ...

    def start(self) -> None: ...

    def stop(self) -> Remains:
        return Remains(["what may be left on h2, which does not answer"])


def test_what_is_left_stays_known_to_down(
    tiny_llama: Path, tmp_path: Path, state_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "Cluster", Leaving)
    topology = Topology.parse({"model": str(tiny_llama), "pools": [{"name": "a", "role": "colocated"}]})
    source = tmp_path / "topology.yaml"
    with (
        pytest.raises(
            ClusterError, match=r"could not remove: .* h2, which does not answer; `baton down .*` looks once"
        ),
        running.running(topology, Console(), source=source),
    ):
        pass
    assert [file.name for file in state.every()] == [topology.name]

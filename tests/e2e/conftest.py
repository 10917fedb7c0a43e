"""Whole clusters on Ray, each started once for all tests that want it; every one must leave nothing behind."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import psutil
import pytest

from cluster.launch import Cluster
from cluster.topology import Topology
from cluster.validate import check

CONFIGS = Path(__file__).parents[2] / "configs" / "topologies"
FP32 = {"dtype": "float32", "gateway.port": 0}
CLUSTERS = {
    "shm": ("local.yaml", {**FP32, "kv.transport": "shm"}),
    "zmq": ("local.yaml", {**FP32, "kv.transport": "zmq"}),
    "colocated": ("colocated.yaml", FP32),
}


@pytest.fixture(scope="package")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A ready cluster of the kind that the test names by ``on``; ``shm`` where it names none."""
    kind = getattr(request, "param", "shm")
    file, overrides = CLUSTERS[kind]
    topology = Topology.load(CONFIGS / file).with_overrides({**overrides, "cluster.name": f"test-{kind}"})
    before = remains()
    cluster = Cluster(check(topology))
    cluster.start()
    try:
        yield cluster
        wait_until_idle(cluster, within=30)
    finally:
        left = cluster.stop()
    assert not left.items
    assert remains() <= before


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def workers(cluster: Cluster) -> dict[str, dict[str, int]]:
    """``inspect()`` of each worker, after its ``check_integrity``."""
    seen = cluster.inspect()
    return {name: figures for name, figures in seen.items() if name != "router"}


def wait_until(done: Callable[[], bool], within: float, what: str) -> float:
    """Ask until ``done()``; how many seconds it took."""
    started = time.monotonic()
    while not done():
        assert time.monotonic() - started < within, f"{what}: not within {within} s"
    return time.monotonic() - started


def wait_until_idle(cluster: Cluster, within: float) -> float:
    """Until no worker and no router holds anything of any request."""

    def idle() -> bool:
        for figures in workers(cluster).values():
            assert figures["free"] + figures["held"] + figures["cached"] == figures["total"]
            if any(count for kind, count in figures.items() if kind not in ("free", "cached", "total")):
                return False
        return cluster.inspect()["router"]["placed"] == 0

    return wait_until(idle, within, "idle")


def remains() -> set[str]:
    """What a cluster could leave: children, listening sockets, shared memory, Ray's files, state files."""
    from cluster import state

    me = psutil.Process()
    found = {f"process {child.pid} {child.name()}" for child in me.children(recursive=True)}
    found |= {f"socket {socket.laddr}" for socket in me.net_connections() if socket.status == psutil.CONN_LISTEN}
    found |= {str(path) for path in Path("/dev/shm").glob("*")}
    found |= {str(path) for path in Path("/tmp").glob("baton-*")}
    return found | {str(path) for path in state.folder().glob("*.json")}

"""Whole clusters on Ray, each started once for all tests that want it; every one must leave nothing behind."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from cluster import state
from cluster.core.events import Done, DrainWanted, FlipWanted, RestartWanted, UndrainWanted, Wanted
from cluster.core.units import Status
from cluster.doctor import examine_started
from cluster.launch import Cluster
from cluster.topology import Topology
from cluster.validate import check
from messages.common import CacheCounts, DecisionCounts

CONFIGS = Path(__file__).parents[2] / "configs" / "topologies"
FP32 = {"dtype": "float32", "gateway.port": 0}


def ranks_of(pool: int) -> dict[str, Any]:
    """One prefill worker, two decode workers, and two ranks for each of this pool."""
    return {"pools.0.replicas": 1, f"pools.{pool}.tensor_parallel": 2, f"pools.{pool}.resources.cpus": 0.1}


CLUSTERS = {
    "shm": ("local.yaml", {**FP32, "kv.transport": "shm", "gateway.replicas": 2, "gateway.grpc_port": 0}),
    "zmq": ("local.yaml", {**FP32, "kv.transport": "zmq"}),
    "two-to-one": ("local.yaml", {**FP32, "kv.transport": "zmq", **ranks_of(0)}),
    "one-to-two": ("local.yaml", {**FP32, "kv.transport": "shm", **ranks_of(1)}),
    "colocated": ("colocated.yaml", FP32),
}

COUNTED = (*CacheCounts.__struct_fields__, *DecisionCounts.__struct_fields__, "tails_yielded")
"""Since the start; nothing is held of it."""
NOT_HELD = ("free", "cached", "total", *COUNTED)


class Running:
    """A cluster whose launcher is a child of the tests, since Ray leaves threads and sockets in a process."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        spawn = multiprocessing.get_context("spawn")
        self._ours, theirs = spawn.Pipe()
        self._launcher = spawn.Process(target=launch, args=(kind, theirs))
        self._launcher.start()
        theirs.close()
        self.url: str = self._ours.recv()

    def inspect(self) -> dict[str, dict[str, int]]:
        """``Cluster.inspect``."""
        return self._ask("inspect")

    def status(self) -> dict[str, Status]:
        """``Cluster.status``, by name."""
        return {status.name: status for status in self._ask("status")}

    def pids(self) -> dict[str, int]:
        """Of every process, and of Ray's head ("ray")."""
        pids: dict[str, int] = self._ask("pids")
        return pids

    def urls(self) -> list[str]:
        """Of its gateways."""
        return list(self._ask("urls"))

    def grpc_ports(self) -> list[int]:
        """Of its gateways."""
        return list(self._ask("grpc"))

    def restart(self, *units: str) -> str:
        """Have them restarted one after the other; what went wrong, or nothing."""
        return str(self._ask(" ".join(["restart", *units])))

    def drain(self, worker: str) -> str:
        return str(self._ask(f"drain {worker}"))

    def undrain(self, worker: str) -> str:
        return str(self._ask(f"undrain {worker}"))

    def flip(self, worker: str) -> str:
        return str(self._ask(f"flip {worker}"))

    def examine(self) -> dict[str, Any]:
        """What ``baton doctor --json`` says."""
        return self._ask("examine")

    def stop(self) -> list[str]:
        """Take it down; what could not be removed."""
        left = self._ask("stop")
        self._launcher.join(30)
        assert self._launcher.exitcode == 0
        return left

    def _ask(self, what: str) -> Any:
        self._ours.send(what)
        answer = self._ours.recv()
        if isinstance(answer, AssertionError):
            raise answer
        return answer


def launch(kind: str, tests: Connection) -> None:
    """The launcher's life; a start that fails is an ``EOFError`` for the tests, and its traceback on stderr."""
    file, overrides = CLUSTERS[kind]
    topology = Topology.load(CONFIGS / file).with_overrides({**overrides, "cluster.name": f"test-{kind}"})
    cluster = Cluster(check(topology), lambda who, what: print(f"{who}: {what}", flush=True))
    cluster.start()
    answers: dict[str, Callable[..., Any]] = {
        "inspect": cluster.inspect,
        "status": cluster.status,
        "pids": lambda: {name: process.pid for name, process in cluster.processes.items()} | {"ray": cluster.head_pid},
        "urls": lambda: cluster.urls,
        "grpc": lambda: cluster.grpc_ports,
        "restart": lambda *units: operate(cluster, RestartWanted(0, units)),
        "drain": lambda worker: operate(cluster, DrainWanted(0, worker)),
        "undrain": lambda worker: operate(cluster, UndrainWanted(0, worker)),
        "flip": lambda worker: operate(cluster, FlipWanted(0, worker)),
        "examine": lambda: examine_started(cluster).to_json(),
    }
    try:
        tests.send(cluster.url)
        while (wanted := tests.recv()) != "stop":
            try:
                what, *arguments = wanted.split()
                tests.send(answers[what](*arguments))
            except AssertionError as error:
                tests.send(error)
    finally:
        left = cluster.stop()
    tests.send(left.items)


def operate(cluster: Cluster, wanted: Wanted) -> str:
    """Have it done; what went wrong, or nothing."""
    *_, done = cluster.operate(wanted)
    assert isinstance(done, Done)
    return done.problem


@pytest.fixture(scope="package")
def cluster(request: pytest.FixtureRequest) -> Iterator[Running]:
    """A ready cluster of the kind that the test names."""
    resource_tracker.ensure_running()  # a child that multiprocessing keeps for good
    before = remains()
    cluster = Running(request.param)
    try:
        yield cluster
        wait_until_idle(cluster, within=30)
    finally:
        left = cluster.stop()
    assert not left
    assert remains() <= before


@pytest.fixture
def client(cluster: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def workers(cluster: Running) -> dict[str, dict[str, int]]:
    """``inspect()`` of each worker, after its ``check_integrity``."""
    seen = cluster.inspect()
    return {name: figures for name, figures in seen.items() if name != "router"}


def wait_until(done: Callable[[], bool], within: float, what: str) -> float:
    """Ask until ``done()``; how many seconds it took."""
    started = time.monotonic()
    while not done():
        assert time.monotonic() - started < within, f"{what}: not within {within} s"
    return time.monotonic() - started


def wait_until_idle(cluster: Running, within: float) -> float:
    """Until no worker and no router holds anything of any request."""

    def idle() -> bool:
        for figures in workers(cluster).values():
            assert figures["free"] + figures["held"] + figures["cached"] == figures["total"]
            if any(count for kind, count in figures.items() if kind not in NOT_HELD):
                return False
        return cluster.inspect()["router"]["placed"] == 0

    return wait_until(idle, within, "idle")


def remains() -> set[str]:
    """What a cluster could leave: children, listening sockets, shared memory, Ray's files, state files."""
    me = psutil.Process()
    found = {f"process {child.pid} {child.name()}" for child in me.children(recursive=True)}
    found |= {f"socket {socket.laddr}" for socket in me.net_connections() if socket.status == psutil.CONN_LISTEN}
    found |= {str(path) for path in Path("/dev/shm").glob("*")}
    found |= {str(path) for path in Path("/tmp").glob("baton-*")}
    return found | {str(path) for path in state.folder().glob("*.json")}

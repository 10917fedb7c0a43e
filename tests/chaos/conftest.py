"""One cluster for all tests: faults are put into it under load, and each test leaves it whole."""

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import pytest

from cluster.chaos.catalogue import catalogue
from cluster.chaos.command import OVERRIDES
from cluster.chaos.core.answers import Verdict
from cluster.chaos.core.faults import Victim
from cluster.chaos.core.report import REACTION, held
from cluster.chaos.load import Load, Stream
from cluster.chaos.processes import ANSWER_WITHIN, Life, OwnCluster
from cluster.chaos.recorder import Recorder
from cluster.launch import Cluster
from cluster.topology import Topology
from cluster.validate import check
from simulator.history import Started
from tests.e2e.conftest import CONFIGS, remains

MODEL = "tiny-llama"
AT_ONCE = 8
WORKERS = 4


class Running:
    """The cluster, in a child of the tests, since Ray leaves threads and sockets in a process."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._ours, theirs = spawn.Pipe()
        self._launcher = spawn.Process(target=launch, args=(theirs,))
        self._launcher.start()
        theirs.close()
        self._one_at_a_time = threading.Lock()
        self.urls: dict[str, str] = self._ours.recv()
        self.compute = 0.0
        """Seconds that all prompts together take when nothing fails, on this machine: what bounds do not count in."""
        self._recorder = Recorder(None)
        self.load = Load(list(self.urls.values()), catalogue(MODEL, 1, 16, longest=160), AT_ONCE, 1, self._recorder)

    def lives(self) -> dict[str, Life]:
        return self._ask("lives")

    def records(self, at: float) -> list[Started]:
        return self._ask("records", at)

    def call(self, name: str, method: str, *arguments: Any, within: float = ANSWER_WITHIN) -> Any:
        return self._ask("call", name, method, *arguments)

    def losses(self, since: float) -> list[tuple[float, str, int]]:
        return self._ask("losses", since)

    def inspect(self) -> dict[str, dict[str, int]]:
        return self._ask("inspect")

    def victims(self) -> list[Victim]:
        return self._ask("victims")

    def head(self) -> int | None:
        return self._ask("head")

    def stop(self) -> list[str]:
        left = self._ask("stop")
        self._recorder.close()
        self._launcher.join(30)
        assert self._launcher.exitcode == 0
        return left

    def _ask(self, what: str, *arguments: Any) -> Any:
        with self._one_at_a_time:
            self._ours.send((what, *arguments))
            answer = self._ours.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer


def launch(tests: Connection) -> None:
    """The launcher's life: it watches over its cluster, and does what the tests ask."""
    topology = Topology.load(CONFIGS / "local.yaml").with_overrides({**OVERRIDES, "cluster.name": "test-chaos"})
    cluster = Cluster(check(topology))
    cluster.start()
    started = OwnCluster(cluster)
    try:
        tests.send(started.urls)
        while True:
            cluster.supervise(0.02)
            if not tests.poll():
                continue
            what, *arguments = tests.recv()
            if what == "stop":
                break
            try:
                tests.send(getattr(started, what)(*arguments))
            except Exception as error:  # noqa: BLE001, it is raised in the tests
                tests.send(error)
    finally:
        left = cluster.stop()
    tests.send(left.items)


@pytest.fixture(scope="package")
def cluster() -> Iterator[Running]:
    resource_tracker.ensure_running()  # a child that multiprocessing keeps for good
    before = remains()
    cluster = Running()
    try:
        asyncio.run(cluster.load.learn())
        calm = through(cluster, lambda: None, when=lambda streams: True)
        cluster.compute = max(stream.first - stream.begun for stream in calm.streams)
        yield cluster
    finally:
        left = cluster.stop()
    assert not left
    assert remains() <= before


@pytest.fixture(autouse=True)
def whole(cluster: Running) -> None:
    """Every process serves when a test begins: those that the last one killed have been started again."""
    wait(lambda: all(victim.usable for victim in cluster.victims()), 60, "all processes serve")
    wait(lambda: cluster.inspect()["router"]["workers"] == WORKERS, 10, "the router knows every worker")


@dataclass(frozen=True, slots=True)
class Run:
    """Streams through which a fault went, at this second of the monotonic clock."""

    struck: float
    streams: list[Stream]

    @property
    def resumed(self) -> list[Stream]:
        return [stream for stream in self.streams if stream.attempts > 1]

    @property
    def slowest(self) -> float:
        """Seconds from the fault to the next token of the stream that waited longest for it."""
        waited = [begin + length - self.struck for each in self.resumed for begin, length in each.pauses
                  if begin <= self.struck + REACTION and begin + length >= self.struck]  # fmt: skip
        return max(waited, default=0.0)


def through(cluster: Running, strike: Callable[[], None], *, when: Callable[[list[Stream]], bool]) -> Run:
    """Ask every request at once, ``strike`` ``when`` the streams are so far, and see them to their ends."""

    async def run() -> Run:
        load = cluster.load
        asked = asyncio.create_task(load.once(load.cases))
        deadline = time.monotonic() + 20
        while not when(list(load.in_flight.values())):
            assert time.monotonic() < deadline and not asked.done(), "the streams are never so far"
            await asyncio.sleep(0.005)
        struck = time.monotonic()
        await asyncio.to_thread(strike)
        return Run(struck, await asked)

    return asyncio.run(run())


def check_same(run: Run) -> None:
    """Every stream is what it is without faults."""
    assert {f"{each.case}: {each.detail}" for each in run.streams if each.verdict is not Verdict.SAME} == set()


def wait(done: Callable[[], bool], within: float, what: str) -> float:
    """Look until ``done()``; how many seconds it took."""
    begun = time.monotonic()
    while not done():
        assert time.monotonic() - begun < within, f"{what}: not within {within} s"
        time.sleep(0.02)
    return time.monotonic() - begun


def wait_until_idle(cluster: Running, within: float) -> float:
    return wait(lambda: not held(cluster.inspect()), within, "everything is given back")


def detected(cluster: Running, run: Run, worker: str) -> float:
    """Seconds from the fault to the router's taking ``worker`` for lost."""
    return min(at for at, name, _ in cluster.losses(run.struck) if name == worker) - run.struck

"""Promise: workers of several ranks on Ray answer with the right tokens; one rank's death is the end of its worker
only, soon and with the reason; nothing of it is left, and it is replaced as a whole."""

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.launch import Cluster
from cluster.topology import Topology
from cluster.validate import check
from tests.e2e.conftest import CONFIGS, FP32, remains, wait_until
from tests.e2e.test_relay import answers
from tests.relay_cases import relay_cases

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600)]
TWO_RANKS = {**FP32, "pools.0.tensor_parallel": 2, "pools.0.resources.cpus": 0.1, "cluster.name": "test-ranks"}


def launch(tests: Connection) -> None:
    """A launcher that supervises, and tells the tests what it has seen."""
    told: list[tuple[str, str]] = []
    topology = Topology.load(CONFIGS / "colocated.yaml").with_overrides(TWO_RANKS)
    cluster = Cluster(check(topology), lambda who, what: told.append((who, what)))
    cluster.start()
    try:
        tests.send((cluster.url, {name: process.pid for name, process in cluster.processes.items()}))
        while True:
            cluster.supervise(0.05)
            if tests.poll():
                match tests.recv():
                    case "told":
                        tests.send(told)
                    case "inspect":
                        tests.send(cluster.inspect())
                    case _:
                        break
    finally:
        left = cluster.stop()
    tests.send(left.items)


class Running:
    """A supervised cluster, in a process of its own since Ray leaves threads and sockets in one."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._ours, theirs = spawn.Pipe()
        self._launcher = spawn.Process(target=launch, args=(theirs,))
        self._launcher.start()
        theirs.close()
        self.url, self.pids = self._ours.recv()

    def ask(self, what: str) -> Any:
        self._ours.send(what)
        return self._ours.recv()

    def stop(self) -> None:
        left = self.ask("stop")
        self._launcher.join(30)
        assert self._launcher.exitcode == 0
        assert not left


@pytest.fixture(scope="module")
def cluster() -> Iterator[Running]:
    resource_tracker.ensure_running()  # a child that multiprocessing keeps for good
    before = remains()
    cluster = Running()
    try:
        yield cluster
    finally:
        cluster.stop()
    assert remains() <= before


def test_two_workers_of_two_ranks_answer_as_transformers(cluster: Running, tiny_llama: Path) -> None:
    cases = list(relay_cases(tiny_llama))[::8]
    got = asyncio.run(answers(cluster.url, cases))
    assert [tokens for tokens, _ in got] == [case.answer for case in cases]
    assert {trace["decode_worker"] for _, trace in got} == {"worker-0", "worker-1"}


def test_the_death_of_one_rank_ends_its_worker_soon_with_the_reason_and_harms_no_stream(cluster: Running) -> None:
    body = {"model": "tiny-llama", "max_tokens": 200, "temperature": 0, "ignore_eos": True}

    def text(prompt: str) -> str:
        with httpx.Client(base_url=cluster.url, timeout=120) as web:
            answer = web.post("/v1/completions", json={**body, "prompt": prompt})
            return str(answer.json()["choices"][0]["text"])

    with ThreadPoolExecutor(8) as pool:
        prompts = [f"There were once {number} princes" for number in range(8)]
        alone = list(pool.map(text, prompts))
        assert len(set(alone)) > 4
        streams = [pool.submit(text, prompt) for prompt in prompts]
        wait_until(lambda: all(running(cluster, name) for name in ("worker-0", "worker-1")), 30, "both are busy")
        rank_0 = psutil.Process(cluster.pids["worker-0"])
        killed = time.monotonic()
        os.kill(cluster.pids["worker-0.rank1"], signal.SIGKILL)
        wait_until(lambda: ended(rank_0), 10, "rank 0 has ended")
        took = time.monotonic() - killed
        assert [stream.result() for stream in streams] == alone
    assert took < 3, "and less than 2 s where the machine is not busy"
    died = {who: what for who, what in cluster.ask("told") if what.startswith("died")}
    assert set(died) == {"worker-0", "worker-0.rank1"}
    assert died["worker-0"] == "died: GroupLost: rank 1 of 2 has died"
    assert not psutil.pid_exists(cluster.pids["worker-0.rank1"])
    wait_until(lambda: set(cluster.ask("inspect")) == {"router", "worker-0", "worker-1"}, 60, "it is there again")
    assert cluster.ask("inspect")["router"]["workers"] == 2
    assert text(prompts[0]) == alone[0]


def ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def running(cluster: Running, worker: str) -> int:
    """Sequences that hold blocks there."""
    held: int = cluster.ask("inspect")[worker]["held"]
    return held

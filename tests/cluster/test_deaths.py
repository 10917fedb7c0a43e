"""Promise: a process's death is heard of at once, whoever its parent is, and never another process's for it."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from cluster.deaths import Deaths
from cluster.state import started_at


@pytest.fixture
def deaths() -> Iterator[Deaths]:
    deaths = Deaths()
    yield deaths
    deaths.close()


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def test_a_death_is_heard_of_within_milliseconds(deaths: Deaths, process: subprocess.Popen[bytes]) -> None:
    died = threading.Event()
    assert deaths.watch(process.pid, started_at(process.pid), died.set) is not None
    assert not died.wait(0.05)
    killed = time.monotonic()
    os.kill(process.pid, signal.SIGKILL)
    assert died.wait(5)
    assert time.monotonic() - killed < 0.5


def test_who_is_watched_can_be_killed_and_dead_once_more_does_no_harm(
    deaths: Deaths, process: subprocess.Popen[bytes]
) -> None:
    died = threading.Event()
    watched = deaths.watch(process.pid, started_at(process.pid), died.set)
    assert watched is not None
    deaths.kill(watched)
    assert died.wait(5)
    deaths.kill(watched)
    assert process.wait() == -signal.SIGKILL


def test_another_process_with_its_number_is_not_taken_for_it(deaths: Deaths, process: subprocess.Popen[bytes]) -> None:
    began = started_at(process.pid)
    assert began is not None
    assert deaths.watch(process.pid, began - 1, lambda: None) is None


def test_who_is_gone_already_is_not_watched(deaths: Deaths, process: subprocess.Popen[bytes]) -> None:
    began = started_at(process.pid)
    process.kill()
    process.wait()
    assert deaths.watch(process.pid, began, lambda: None) is None


def test_those_who_live_when_nobody_watches_any_more_are_let_alone(process: subprocess.Popen[bytes]) -> None:
    deaths = Deaths()
    deaths.watch(process.pid, started_at(process.pid), lambda: None)
    deaths.close()
    assert process.poll() is None

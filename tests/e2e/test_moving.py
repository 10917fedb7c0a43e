"""Promise: workers are drained and change their roles under load: no error, the same tokens, no pause above 2 s."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from tests.e2e.conftest import Running, wait_until, wait_until_idle

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.parametrize("cluster", ["shm"], indirect=True)]
STREAMS = 6
PROMPTS = [f"The {number}. bird flew over the sea to the golden mountain" for number in range(STREAMS)]
LONGEST_PAUSE = 2.0


@dataclass
class Load:
    """What streams have seen so far."""

    texts: dict[str, str] = field(default_factory=dict)
    """By prompt, of the run in which nothing was moved."""
    ended: int = 0
    pauses: list[tuple[float, float]] = field(default_factory=list)
    """Between two events, the first of which is the request: when one ended (monotonic), and its seconds."""

    def longest(self, since: float) -> float:
        return max(seconds for ended, seconds in self.pauses if ended > since)


def stream(web: httpx.Client, prompt: str, load: Load) -> str:
    body = {"model": "tiny-llama", "prompt": prompt, "max_tokens": 96, "temperature": 0, "ignore_eos": True}
    text, last = "", time.monotonic()
    with web.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                now = time.monotonic()
                load.pauses.append((now, now - last))
                last = now
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, line
                text += event["choices"][0]["text"]
    return text


@contextmanager
def under_load(cluster: Running) -> Iterator[Load]:
    """Six streams at a time, one after the other, all of which say what they always say."""
    load, stop = Load(), threading.Event()

    def run(prompt: str) -> None:
        with httpx.Client(base_url=cluster.url, timeout=60) as web:
            while not stop.is_set():
                assert stream(web, prompt, load) == load.texts[prompt]
                load.ended += 1

    with ThreadPoolExecutor(STREAMS) as pool:
        with httpx.Client(base_url=cluster.url, timeout=60) as web:
            load.texts.update((prompt, stream(web, prompt, load)) for prompt in PROMPTS)
        running = [pool.submit(run, prompt) for prompt in PROMPTS]
        try:
            wait_until(lambda: cluster.inspect()["router"]["placed"] >= STREAMS - 1, 30, "all streams run")
            yield load
        finally:
            stop.set()
        for each in running:
            each.result()


def told(cluster: Running, worker: str, role: str) -> None:
    """Soon, that is: a gateway's view of the cluster is up to a second old."""

    def now() -> bool:
        with httpx.Client(base_url=cluster.url, timeout=10) as web:
            workers = web.get("/status").json()["cluster"]["workers"]
        return bool(next(each["role"] for each in workers if each["worker"] == worker) == role)

    wait_until(now, 5, f"{worker} is told of as a {role} worker")


def test_workers_are_drained_and_flipped_under_load_and_no_stream_pauses_for_long(cluster: Running) -> None:
    steps = {
        "drain prefill-0": lambda: cluster.drain("prefill-0"),
        "undo": lambda: cluster.undrain("prefill-0"),
        "drain decode-0": lambda: cluster.drain("decode-0"),
        "undo that": lambda: cluster.undrain("decode-0"),
        "flip decode-1": lambda: cluster.flip("decode-1"),
        "and back": lambda: cluster.flip("decode-1"),
    }
    before = cluster.pids()
    with under_load(cluster) as load:
        for name, step in steps.items():
            begun, ended = time.monotonic(), load.ended
            assert step() == "", name
            took = time.monotonic() - begun
            wait_until(lambda ended=ended: load.ended >= ended + STREAMS, 60, "every stream has seen it")  # type: ignore[misc]
            pause = load.longest(begun)
            print(f"{name}: {took:.2f} s, {load.ended - ended} streams ended, longest pause {pause:.2f} s")
            assert pause < LONGEST_PAUSE, name
            if name == "flip decode-1":
                told(cluster, "decode-1", "prefill")
    told(cluster, "decode-1", "decode")
    assert cluster.pids() == before, "nobody was started anew"
    wait_until_idle(cluster, within=10)

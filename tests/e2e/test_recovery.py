"""Promise: any process may be killed while streams run: they go on with the same tokens, and it comes back."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from cluster.core.units import Phase
from tests.e2e.conftest import Running, wait_until, wait_until_idle

pytestmark = [
    pytest.mark.ray,
    pytest.mark.chaos,
    pytest.mark.parametrize("cluster", ["shm"], indirect=True),
]
PROMPTS = [f"There were once {number} princes who went into the wide world" for number in range(8)]


def text(cluster: Running, prompt: str) -> str:
    body = {"model": "tiny-llama", "prompt": prompt, "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    with httpx.Client(base_url=cluster.url, timeout=120) as web:
        answer = web.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])


ALONE: dict[str, str] = {}
"""What is said when nothing dies."""


@contextmanager
def streams(cluster: Running) -> Iterator[None]:
    """Eight at once, which run when this is entered, and have said by its end what they always say."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        if not ALONE:
            ALONE.update(zip(PROMPTS, pool.map(lambda prompt: text(cluster, prompt), PROMPTS), strict=True))
        running: list[Future[str]] = [pool.submit(text, cluster, prompt) for prompt in PROMPTS]
        wait_until(lambda: held(cluster, "decode-0") > 0 and held(cluster, "decode-1") > 0, 30, "both are busy")
        yield
        assert [each.result() for each in running] == list(ALONE.values())


def held(cluster: Running, worker: str) -> int:
    return cluster.inspect()[worker]["held"]


def kill(cluster: Running, name: str) -> float:
    """With SIGKILL; when."""
    os.kill(cluster.pids()[name], signal.SIGKILL)
    return time.monotonic()


def wait_until_back(cluster: Running, name: str, restarts: int, within: float) -> None:
    def back() -> bool:
        status = cluster.status()[name]
        assert status.restarts <= restarts, f"it had to be started more often: {status}"
        return status.phase is Phase.RUNNING and status.restarts == restarts

    wait_until(back, within, f"{name} is back")


@pytest.mark.parametrize("name", ["decode-0", "prefill-0", "router", "gateway-1"])
def test_what_is_killed_comes_back_and_no_stream_notices(cluster: Running, name: str) -> None:
    before = cluster.status()[name].restarts
    pid = cluster.pids()[name]
    if name == "gateway-1":
        kill(cluster, name)
    else:
        with streams(cluster):
            kill(cluster, name)
    wait_until_back(cluster, name, before + 1, within=60)
    assert f"(pid {pid})" in cluster.status()[name].cause
    wait_until(lambda: cluster.inspect()["router"]["workers"] == 4, 10, "the router knows all")
    wait_until_idle(cluster, within=10)


def test_what_is_to_be_restarted_gives_away_what_it_runs_before_and_no_stream_notices(cluster: Running) -> None:
    before, pids = cluster.status(), cluster.pids()
    with streams(cluster):
        assert cluster.restart("decode-0", "gateway-0") == ""
    after = cluster.status()
    for name in ("decode-0", "gateway-0"):
        assert after[name].restarts == before[name].restarts + 1
        assert after[name].cause == before[name].cause, "that is no death"
        assert cluster.pids()[name] != pids[name]
    wait_until_idle(cluster, within=10)


def test_rays_head_may_go_and_a_worker_with_it(cluster: Running) -> None:
    before = cluster.status()
    with streams(cluster):
        kill(cluster, "ray")
        kill(cluster, "decode-1")
    wait_until_back(cluster, "ray", before["ray"].restarts + 1, within=30)
    wait_until_back(cluster, "decode-1", before["decode-1"].restarts + 1, within=60)
    wait_until(lambda: cluster.inspect()["router"]["workers"] == 4, 10, "the router knows all")
    wait_until_idle(cluster, within=10)


def test_a_stream_goes_on_at_the_other_gateway_with_just_what_is_missing(cluster: Running) -> None:
    """Killed in the middle: the client names the request and the last event that it has."""
    here, there = cluster.urls()
    body = {"model": "tiny-llama", "prompt": PROMPTS[0], "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    asked = body | {"logprobs": 1, "stream": True, "stream_options": {"include_usage": True}}
    restarts = cluster.status()["gateway-0"].restarts
    with httpx.Client(timeout=60) as web:
        whole = web.post(here + "/v1/completions", json=body | {"logprobs": 1}).json()
        seen: list[str] = []
        with (
            pytest.raises(httpx.HTTPError),
            web.stream("POST", here + "/v1/completions", json=asked) as answer,
        ):
            id = answer.headers["x-request-id"]
            for line in answer.iter_lines():
                seen.append(line)
                if len(seen) == 60:
                    kill(cluster, "gateway-0")
        seen = seen[: len(seen) - seen[::-1].index("")]  # an event that was cut off has no empty line behind it
        last = [line for line in seen if line.startswith("id: ")][-1].removeprefix("id: ")
        killed = time.monotonic()
        rest = web.get(f"{there}/v1/streams/{id}", headers={"Last-Event-ID": last})
        assert rest.status_code == 200, rest.text
        assert time.monotonic() - killed < 10
    events = [line.removeprefix("data: ") for line in [*seen, *rest.text.split("\n")] if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    logprobs = [value for choice in choices for value in choice["logprobs"]["token_logprobs"]]
    assert logprobs == pytest.approx(whole["choices"][0]["logprobs"]["token_logprobs"], abs=1e-4)
    assert next(chunk["usage"] for chunk in chunks if chunk["usage"])["completion_tokens"] == 400
    wait_until_back(cluster, "gateway-0", restarts + 1, within=60)
    wait_until_idle(cluster, within=15)

"""What can be done through the dashboard of a Ray that has a cluster: jobs. Used by the test that has such a Ray."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.e2e.conftest import wait_until

Command = Callable[..., str]


def request(number: int, max_tokens: int) -> str:
    body = {"model": "tiny-llama", "prompt": f"Story {number}: once", "max_tokens": max_tokens, "ignore_eos": True}
    return json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body})


def use_jobs(ray: Command, baton: Command, dashboard: str, folder: Path) -> None:
    """``ray`` and ``baton`` run these commands, and give what they print."""
    folder.mkdir()
    in_a_job_of_rays(ray, dashboard, folder)
    stopped_and_resumed(baton, dashboard, folder)


def in_a_job_of_rays(ray: Command, dashboard: str, folder: Path) -> None:
    prompts, results = folder / "prompts.jsonl", folder / "results.jsonl"
    prompts.write_text("\n".join(request(number, 2) for number in range(20)))
    command = ["baton", "submit", "prompts.jsonl", "-o", str(results)]
    said = ray("job", "submit", "--address", dashboard, "--working-dir", str(folder), "--", *command)
    assert "20 of 20 lines have their results" in said
    answered_once(results, 20)


def stopped_and_resumed(baton: Command, dashboard: str, folder: Path) -> None:
    """A batch is stopped in the middle by a client that has none of its results, and another one brings them all."""
    prompts, results, lines = folder / "long.jsonl", folder / "long-results.jsonl", 40
    prompts.write_text("\n".join(request(number, 100) for number in range(lines)))
    said = baton("submit", "--address", dashboard, "--no-wait", "--concurrency", "2", str(prompts))
    job = re.search(r"baton-[0-9a-f]{12}", said)
    assert job is not None
    written = folder.parent / "state" / "baton" / "jobs" / job[0] / "results.jsonl"
    wait_until(lambda: written.exists() and written.stat().st_size > 0, within=60, what="some results")
    assert "is being stopped" in baton("job", "stop", job[0], "--address", dashboard)

    def told() -> str:
        return str(httpx.get(f"{dashboard}/api/jobs/{job[0]}").json()["status"])

    wait_until(lambda: told() == "STOPPED", within=60, what="it ended")
    before = len(written.read_bytes().splitlines())
    assert 0 < before < lines
    said = baton("job", "resume", job[0], "-o", str(results), "--address", dashboard)
    assert f"{lines} of {lines} lines have their results" in said
    answered_once(results, lines)
    assert results.read_bytes() == written.read_bytes()
    log = httpx.get(f"{dashboard}/api/jobs/{job[0]}.2/logs").json()["logs"]
    assert f"{before} before" in log
    assert "Story" not in log, "prompts are in no log"


def answered_once(results: Path, lines: int) -> None:
    told = [json.loads(line) for line in results.read_bytes().splitlines()]
    assert sorted(int(line["custom_id"]) for line in told) == list(range(lines))
    assert {line["response"]["status_code"] for line in told} == {200}

"""`baton trace`: one request's life, as a file for Perfetto and as a table."""

import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
from rich.console import Console
from rich.table import Table

from cluster.client import TIMELINE, TIMEOUT, credentials, get, only_model, problem, trust
from cluster.errors import ClusterError
from cluster.plan import size

COMPLETE_WITHIN = 3.0
"""Seconds after a request's end in which its workers' timelines come; one may be lost."""
POLL = 0.05
_ID = re.compile(r"(?:cmpl-|chatcmpl-)?([0-9A-Za-z_-]{1,100})")


def trace(
    console: Console, url: str, request: str | None, prompt: str | None, max_tokens: int, output: Path | None
) -> None:
    """Show the trace of ``request``, or of one that is made of ``prompt``."""
    if request is None:
        assert prompt is not None, "nothing to trace"
        request = ask(url, prompt, max_tokens)
    name = _ID.fullmatch(request)
    if name is None:
        raise ClusterError(f"{request[:100]!r} is no request: take the x-request-id of an answer, or its id")
    found = fetch(url, name[1])
    if output is not None:
        try:
            output.write_bytes(msgspec.json.encode(found))
        except OSError as error:
            raise ClusterError(f"{output} cannot be written: {error.strerror}") from error
    show(console, found)
    if output is not None:
        console.print(f"{output}: open it at https://ui.perfetto.dev", highlight=False, soft_wrap=True)


def ask(url: str, prompt: str | list[int], max_tokens: int) -> str:
    """Run a completion that is traced; its id."""
    body = {"model": only_model(url), "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    try:
        answer = httpx.post(
            url + "/v1/completions",
            json=body,
            headers=TIMELINE | credentials(),
            timeout=TIMEOUT,
            trust_env=False,
            verify=trust(url),
        )
    except httpx.HTTPError as error:
        raise ClusterError(f"{url} does not answer: {str(error) or type(error).__name__}") from error
    if answer.status_code != 200:
        raise ClusterError(f"{url}: {problem(answer.status_code, answer.content)}")
    request: str = answer.headers["x-request-id"]
    return request


def fetch(url: str, request: str) -> dict[str, Any]:
    """The trace, complete if it can be had."""
    deadline = time.monotonic() + COMPLETE_WITHIN
    while True:
        found: dict[str, Any] = get(url, f"/traces/{quote(request, safe='')}")
        if found["otherData"]["complete"] or time.monotonic() > deadline:
            return found
        time.sleep(POLL)


def show(console: Console, found: dict[str, Any]) -> None:
    """What happened, in order."""
    events, other = found["traceEvents"], found["otherData"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("ms", "took"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("who", "what", ""):
        table.add_column(column)
    for event in sorted((event for event in events if event["ph"] != "M"), key=lambda event: event["ts"]):
        facts = " ".join(f"{name}={value}" for name, value in event["args"].items())
        took = f"{event['dur'] / 1e3:.2f}" if "dur" in event else ""
        table.add_row(f"{event['ts'] / 1e3:.2f}", took, names[event["pid"]], event["name"], facts)
    console.print(table, markup=False)
    for moved in other["transfers"]:
        hidden = f"{moved['share_hidden']:.0%} of it while the prompt was computed"
        after = f"{1e3 * moved['seconds_after_prefill']:.2f} ms after it"
        console.print(f"{size(moved['bytes'])} of KV left {moved['from']}, {hidden}, the last {after}", highlight=False)
    for clock in other["clocks"]:
        if not clock["same_clock"] or clock["uncertainty_ms"]:
            text = f"{clock['worker']} has a clock of its own: its times may be wrong by {clock['uncertainty_ms']} ms"
            console.print(text, highlight=False)
    for missing in other["missing"]:
        console.print(f"what {missing['worker']} did has not come", highlight=False)

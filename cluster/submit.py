"""`baton submit`: runs a file of requests against a gateway, many at once, and never the same line twice."""

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from cluster.batch import Request, Results, count_lines, read_requests
from cluster.client import KEY_VARIABLE, credentials, trust
from cluster.errors import ClusterError

COME_BACK = (429, 503)
"""Answers that say: later."""
TRIES = 3
"""For other failures of the server (500, 502, 504) before they are taken for its answer."""
NO_ENTRY = (401, 403)
KEY_ADVICE = f"let {KEY_VARIABLE} be one of the cluster's API keys, in the environment of what asks"
PROBLEMS_SHOWN = 10
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
SYNC_EVERY = 1.0
"""Seconds of results that a host that crashes may take along; their lines are asked again."""
TIMEOUT = httpx.Timeout(connect=10.0, read=3600.0, write=60.0, pool=None)


@dataclass(slots=True)
class Summary:
    """How it went, in lines of the input."""

    total: int = 0
    before: int = 0
    """Had their results from earlier runs."""
    succeeded: int = 0
    failed: int = 0
    """Have an error for a result."""
    retries: int = 0
    completion_tokens: int = 0
    trouble: str = ""
    """Why the server is asked again at this moment; empty if it answers."""
    problems: list[str] = field(default_factory=list)
    """The first lines that failed in this run, and why."""
    seconds: float = 0.0

    @property
    def finished(self) -> int:
        return self.before + self.succeeded + self.failed


def check_files(source: Path, target: Path | None) -> None:
    """Say what would keep a run from starting."""
    if not os.path.isfile(source):  # False for a path that cannot be
        raise ClusterError(f"there is no file {source}; name one with a request on each line")
    if not os.access(source, os.R_OK):
        raise ClusterError(f"{source} cannot be read: you may not")
    if target is None:
        return
    if os.path.exists(target) and target.samefile(source):
        raise ClusterError(f"{target} is the input; name another file for the results")
    if not target.parent.is_dir():
        raise ClusterError(f"there is no folder {target.parent} for {target.name}; make it, or name another file")


@dataclass(slots=True)
class Batch:
    """One run over one file; ``on_progress`` hears of every result."""

    url: str
    source: Path
    target: Path
    concurrency: int = 32
    patience: float = 300.0
    """Seconds without any answer, of a server that is not there or busy, after which the run is given up for now."""
    on_progress: Callable[[Summary], None] = lambda summary: None
    rng: random.Random = field(default_factory=random.Random)
    summary: Summary = field(default_factory=Summary)
    _last_answer: float = 0.0

    def run(self) -> Summary:
        """Until every line has its result. ``ClusterError`` if it cannot go on; running it again then goes on."""
        check_files(self.source, self.target)
        started = time.monotonic()
        self.summary.total = count_lines(self.source)
        with Results(self.target) as results:
            try:
                asyncio.run(self._run(results))
            finally:
                self.summary.seconds = time.monotonic() - started
        return self.summary

    async def _run(self, results: Results) -> None:
        requests = read_requests(self.source)
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        options: dict[str, Any] = {"timeout": TIMEOUT, "limits": limits, "headers": credentials(), "trust_env": False}
        async with httpx.AsyncClient(base_url=self.url, verify=trust(self.url), **options) as client:
            try:
                async with asyncio.TaskGroup() as tasks:
                    syncing = tasks.create_task(_sync(results))
                    async with asyncio.TaskGroup() as work:
                        for _ in range(self.concurrency):
                            work.create_task(self._work(client, requests, results))
                    syncing.cancel()
            except ExceptionGroup as group:  # one is enough to say
                raise _first(group) from None

    async def _work(self, client: httpx.AsyncClient, requests: Iterator[Request], results: Results) -> None:
        """Take lines until there are none: what is in memory is one line a worker."""
        for request in requests:
            if results.take(request):
                self.summary.before += 1
            else:
                result = await self._answer(client, request)
                results.write(result)
                self._last_answer, self.summary.trouble = time.monotonic(), ""
                count(self.summary, result, f"{self.source}:{request.number}")
            self.on_progress(self.summary)

    async def _answer(self, client: httpx.AsyncClient, request: Request) -> dict[str, Any]:
        if request.error:
            return request.result(None, "invalid_line", f"line {request.number}: {request.error}")
        pause, failures, trouble_since = FIRST_PAUSE, 0, float("inf")
        while True:
            wanted, problem = 0.0, ""
            try:
                response = await client.post(request.url, json=request.body)
            except httpx.TransportError as error:
                problem = f"{self.url} does not answer ({type(error).__name__})"
            except ValueError as error:  # NaN, or half a surrogate pair: no JSON that could be sent
                return request.result(None, "invalid_line", f"line {request.number}: body cannot be sent: {error}")
            else:
                if response.status_code in COME_BACK:
                    problem, wanted = f"{self.url} is busy ({response.status_code})", retry_after(response)
                elif response.status_code in NO_ENTRY:  # and so for every other line
                    raise ClusterError(
                        f"{self.url} lets nobody in without a key ({response.status_code}); {KEY_ADVICE}"
                    )
                elif response.status_code < 500 or failures + 1 >= TRIES:
                    return request.result(_response(response))
                else:
                    failures += 1
            trouble_since = min(trouble_since, time.monotonic()) if problem else float("inf")
            if time.monotonic() - max(trouble_since, self._last_answer) > self.patience:
                again = "run the same command again to go on where it stopped"
                raise ClusterError(f"{self.source}:{request.number}: {problem} for {self.patience:.0f} s; {again}")
            self.summary.retries += 1
            self.summary.trouble = problem
            self.on_progress(self.summary)
            await asyncio.sleep(max(wanted, pause * self.rng.uniform(0.5, 1.5)))
            pause = min(2 * pause, LONGEST_PAUSE)


def count(summary: Summary, result: dict[str, Any], where: str) -> None:
    """A result more, of the line that ``where`` names."""
    response = result["response"]
    if response is None or response["status_code"] != 200:
        summary.failed += 1
        if len(summary.problems) < PROBLEMS_SHOWN:
            summary.problems.append(f"{where}: {reason_of(result)}")
        return
    summary.succeeded += 1
    usage = response["body"].get("usage") if isinstance(response["body"], dict) else None
    if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
        summary.completion_tokens += usage["completion_tokens"]


async def _sync(results: Results) -> None:
    """For ever."""
    while True:
        await asyncio.sleep(SYNC_EVERY)
        await asyncio.to_thread(results.sync)


def _first(group: ExceptionGroup[Exception]) -> Exception:
    error: Exception = group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def reason_of(result: dict[str, Any]) -> str:
    """Why a line has no answer, in one line."""
    response = result["response"]
    if response is None:
        return str(result["error"]["message"]).partition(": ")[2]
    try:
        message = response["body"]["error"]["message"]
    except (LookupError, TypeError):
        message = "no reason given"
    return f"the server answered {response['status_code']}: {' '.join(str(message).split())[:200]}"


def _response(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = response.text
    request_id = response.headers.get("x-request-id") or (body.get("id") if isinstance(body, dict) else None)
    return {"status_code": response.status_code, "request_id": request_id, "body": body}


def retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait (RFC 9110, 10.2.3): a number or a date; 0 if it does not say."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), 120.0) if seconds == seconds else 0.0

"""`baton submit --address` and `baton job`: batches that run as Ray jobs, told and watched through Ray's dashboard, the
one port of a cluster that its users have to reach.

1. ``submit`` reads the input once for its size and digest, and has Ray run ``job_run.py`` on the cluster.
2. It sends the input in pieces (``spool.py``).
3. ``follow`` copies the results as they are written, and looks after the job's status, until both have ended. If the
   client goes away the job goes on; ``follow`` can be called again, from anywhere.

A job that ended early is resumed as a new Ray job on the same files: what has a result is not asked again.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import httpx

from cluster.client import KEY_VARIABLE
from cluster.errors import ClusterError
from cluster.spool import IN_FLIGHT, key_piece, pieces
from cluster.submit import Summary, count

JOB, ATTEMPT, LINES, SOURCE, OPTIONS = "baton_job", "baton_attempt", "baton_lines", "baton_source", "baton_options"
"""In the metadata of Ray's jobs."""
LOOK_EVERY = 1.0
LAST_RESULTS_WITHIN = 5.0
"""Seconds after a job's end in which what it has written comes through the stream that is open."""
AWAY_FOR = 60.0
"""Seconds without any answer of the dashboard until it is given up."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, slots=True)
class Job:
    """The newest Ray job of one batch."""

    id: str
    attempt: int
    submission: str
    """Ray's id."""
    status: str
    lines: int
    source: str
    """The name of the input."""
    options: tuple[str, ...]
    node: str | None
    """Where it runs; None before it does."""
    message: str
    started: float
    """Unix time."""
    size: int = 0
    digest: str = ""

    @property
    def ended(self) -> bool:
        return self.status in ENDED


@dataclass(frozen=True, slots=True)
class Input:
    """What is known of an input before it is sent."""

    path: Path
    size: int
    lines: int
    digest: str

    @classmethod
    def of(cls, path: Path) -> "Input":
        hashed, lines, size = hashlib.blake2b(digest_size=16), 0, 0
        with path.open("rb") as file:
            for line in file:
                hashed.update(line)
                size += len(line)
                lines += bool(line.strip())
        return cls(path, size, lines, hashed.hexdigest())


class Dashboard:
    """Ray's dashboard at ``address``; every error of it is a ``ClusterError``."""

    def __init__(self, address: str) -> None:
        from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
        from ray.job_submission import JobSubmissionClient

        self.address = address.rstrip("/")
        # Ray's client prefers what the environment says to what it is told, RAY_ADDRESS among it.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        with self._told():
            self._jobs = JobSubmissionClient(self.address)
            self._headers = get_auth_headers_if_auth_enabled({})

    def jobs(self) -> list[Job]:
        """The newest attempt of each batch, newest first."""
        newest: dict[str, Job] = {}
        with self._told():
            for details in self._jobs.list_jobs():
                job = _job(details)
                if job is not None and (job.id not in newest or job.attempt > newest[job.id].attempt):
                    newest[job.id] = job
        return sorted(newest.values(), key=lambda job: -job.started)

    def job(self, id: str) -> Job:
        for job in self.jobs():
            if id in (job.id, job.submission):
                return job
        raise ClusterError(f"there is no job {id} at {self.address}; `baton job list` names those that there are")

    def start(self, job: Job) -> None:
        """Have Ray run it. ``job.submission`` must be new."""
        run = ["baton", "job", "run", job.id, "--size", str(job.size), "--digest", job.digest, *job.options]
        if job.attempt > 1:
            run.append("--resumed")
        if key := os.environ.get(KEY_VARIABLE):
            run.append("--keyed")
            with self.http() as http:
                _package(http, "PUT", key_piece(job.id), key.encode())
        metadata = {
            JOB: job.id, ATTEMPT: str(job.attempt), LINES: str(job.lines), SOURCE: job.source,
            OPTIONS: json.dumps({"size": job.size, "digest": job.digest, "options": job.options}),
        }  # fmt: skip
        with self._told():
            self._jobs.submit_job(entrypoint=shlex.join(run), submission_id=job.submission, metadata=metadata)

    def stop(self, job: Job) -> bool:
        with self._told():
            return bool(self._jobs.stop_job(job.submission))

    def logs(self, job: Job) -> str:
        with self._told():
            return str(self._jobs.get_job_logs(job.submission))

    def tail(self, job: Job) -> AsyncIterator[str]:
        lines: AsyncIterator[str] = self._jobs.tail_job_logs(job.submission)
        return lines

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.address, headers=self._headers, timeout=60.0, trust_env=False)

    def async_http(self) -> httpx.AsyncClient:
        timeout = httpx.Timeout(60.0, read=None)
        return httpx.AsyncClient(base_url=self.address, headers=self._headers, timeout=timeout, trust_env=False)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            advice = "let RAY_AUTH_MODE be token, and RAY_AUTH_TOKEN_PATH name a file with the cluster's token"
            raise ClusterError(f"{self.address} wants Ray's token: {advice}") from error
        except (ConnectionError, requests.ConnectionError, requests.Timeout) as error:
            advice = "is this the address of Ray's dashboard, and a tunnel to it open?"
            raise ClusterError(f"{self.address} does not answer; {advice}") from error
        except (RuntimeError, requests.RequestException) as error:
            raise ClusterError(f"{self.address}: {_short(error)}") from error


def new_job(source: Input, options: tuple[str, ...]) -> Job:
    id = f"baton-{secrets.token_hex(6)}"
    return Job(id, 1, id, "NEW", source.lines, source.path.name, options, None, "", 0.0, source.size, source.digest)


def next_attempt(job: Job) -> Job:
    """The same batch once more, on the files that are there. Raises ``ClusterError`` while it runs."""
    if not job.ended:
        raise ClusterError(f"{job.id} is {job.status.lower()}; `baton job results {job.id} -o FILE` follows it")
    attempt = job.attempt + 1
    return Job(
        job.id, attempt, f"{job.id}.{attempt}", "NEW", job.lines, job.source, job.options, None, "", 0.0,
        job.size, job.digest,
    )  # fmt: skip


def send(dashboard: Dashboard, job: Job, source: Input) -> None:
    """Send the input. Raises ``ClusterError`` where the job ends before it has it."""
    names = list(pieces(job.id, source.size))
    with dashboard.http() as http, source.path.open("rb") as file:
        for number, (name, size) in enumerate(names):
            if number >= IN_FLIGHT:
                _wait_until_taken(dashboard, http, job, names[number - IN_FLIGHT][0])
            piece = file.read(size)
            if len(piece) != size:
                raise ClusterError(f"{source.path} has become shorter; submit it again")
            _package(http, "PUT", name, piece)
        for name, _ in names[-IN_FLIGHT:]:
            _wait_until_taken(dashboard, http, job, name)


def _wait_until_taken(dashboard: Dashboard, http: httpx.Client, job: Job, name: str) -> None:
    pause = 0.05
    while _package(http, "GET", name) == 200:
        now = dashboard.job(job.id)
        if now.ended:
            raise ClusterError(f"{job.id} has ended before it had its input: {_cause(dashboard, now)}")
        time.sleep(pause)
        pause = min(2 * pause, LOOK_EVERY)


def _package(http: httpx.Client, method: str, name: str, content: bytes | None = None) -> int:
    """The status: 200, or 404 for one that is not there."""
    try:
        response = http.request(method, f"/api/packages/gcs/{name}", content=content)
    except httpx.HTTPError as error:
        raise ClusterError(f"{http.base_url} has gone away ({type(error).__name__}); submit it again") from error
    if response.status_code not in (200, 404):
        raise ClusterError(f"{http.base_url} does not take the input: {response.status_code}; submit it again")
    return response.status_code


class Copy:
    """A local file that becomes a copy of a job's results, for one process at a time. What is in it already must be
    the begin of them."""

    def __init__(self, path: Path) -> None:
        try:
            self._file: BinaryIO = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")  # noqa: SIM115
        except OSError as error:
            raise ClusterError(f"{path} cannot be written: {error.strerror}; name another file") from error
        self.path = path
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ClusterError(f"another `baton` is writing {path}; wait for it") from error
        self._had = os.fstat(self._file.fileno()).st_size
        self._at = 0

    def begin(self) -> None:
        """What comes next is the results' begin."""
        self._had, self._at = max(self._had, self._at), 0
        self._file.seek(0)

    def add(self, data: bytes) -> bytes:
        """The next bytes; returns those of them that are new. ``ClusterError`` if they are not what the file has."""
        known = min(len(data), max(0, self._had - self._at))
        if known:
            if self._file.read(known) != data[:known]:
                raise ClusterError(f"{self.path} is no part of this job's results; name another file")
            self._at += known
        if new := data[known:]:
            self._file.seek(self._at)
            self._file.write(new)
            self._file.flush()
            self._at += len(new)
        return new

    def so_far(self) -> Iterator[bytes]:
        """What it has, for counting."""
        self._file.seek(0)
        while data := self._file.read(1 << 20):
            yield data

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


@dataclass(slots=True)
class Follower:
    """Copies a job's results while it runs."""

    dashboard: Dashboard
    job: Job
    copy: Copy
    on_progress: Callable[[Summary], None]
    summary: Summary = field(default_factory=Summary)
    _rest: bytes = b""
    """Of a line whose end has not come."""

    def run(self) -> Summary:
        """Until the job has ended and all of its results are here. ``ClusterError`` if it ended without some."""
        started = time.monotonic()
        self.summary.total = self.job.lines
        try:
            for data in self.copy.so_far():
                self._count(data, before=True)
            asyncio.run(self._follow())
        finally:
            self.copy.close()
            self.summary.seconds = time.monotonic() - started
        if self.summary.finished < self.summary.total:
            missing = self.summary.total - self.summary.finished
            cause = _cause(self.dashboard, self.job)
            cure = f"`baton job resume {self.job.id}` goes on where it stopped"
            raise ClusterError(
                f"{self.job.id} has ended without {missing} of {self.job.lines} results: {cause}; {cure}"
            )
        return self.summary

    async def _follow(self) -> None:
        async with self.dashboard.async_http() as http:
            if not self.job.ended:
                await self._while_it_runs(http)
            if self.summary.finished < self.summary.total and self.job.node is not None:
                try:
                    await self._copy(http, "file")
                except httpx.HTTPError as error:
                    cure = f"`baton job results {self.job.id}` goes on"
                    raise ClusterError(f"{http.base_url} has gone away ({type(error).__name__}); {cure}") from error

    async def _while_it_runs(self, http: httpx.AsyncClient) -> None:
        copying = asyncio.create_task(self._copy_on(http))
        try:
            await self._until_ended(copying)
            give_up = time.monotonic() + LAST_RESULTS_WITHIN
            while self.summary.finished < self.summary.total and time.monotonic() < give_up and not copying.done():
                await asyncio.sleep(0.05)
        finally:
            copying.cancel()
            await asyncio.wait([copying])
        if not copying.cancelled() and (error := copying.exception()) is not None:
            raise error

    async def _until_ended(self, copying: "asyncio.Task[None]") -> None:
        away_since: float | None = None
        while not self.job.ended and not copying.done():
            await asyncio.sleep(LOOK_EVERY)
            try:
                self.job = await asyncio.to_thread(self.dashboard.job, self.job.id)
                away_since = None
            except ClusterError:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > AWAY_FOR:
                    raise
            self.on_progress(self.summary)

    async def _copy_on(self, http: httpx.AsyncClient) -> None:
        """For ever, also where the connection breaks."""
        while True:
            if self.job.node is not None:
                with contextlib.suppress(httpx.HTTPError):  # `_until_ended` tells whether anybody is there
                    await self._copy(http, "stream")
            await asyncio.sleep(LOOK_EVERY)

    async def _copy(self, http: httpx.AsyncClient, media: str) -> None:
        """``media``: "file" ends where the results end now, "stream" waits for more."""
        query: dict[str, Any] = {"node_id": self.job.node, "filename": f"{self.job.id}.jsonl", "lines": -1}
        async with http.stream("GET", f"/api/v0/logs/{media}", params={**query, "interval": 0.5}) as response:
            if response.status_code != 200:  # it has not begun to write
                return
            self.copy.begin()
            async for data in response.aiter_bytes():
                self._count(self.copy.add(data), before=False)
                self.on_progress(self.summary)

    def _count(self, data: bytes, *, before: bool) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if before:
                self.summary.before += 1
            else:
                result = json.loads(line)
                number = result["id"].removeprefix("line-")
                count(self.summary, result, f"{self.job.source}:{number}")


def _job(details: Any) -> Job | None:
    """None for what is no batch of ours."""
    metadata = details.metadata or {}
    try:
        more = json.loads(metadata[OPTIONS])
        return Job(
            id=metadata[JOB],
            attempt=int(metadata[ATTEMPT]),
            submission=str(details.submission_id),
            status=str(getattr(details.status, "value", details.status)),
            lines=int(metadata[LINES]),
            source=metadata[SOURCE],
            options=tuple(map(str, more["options"])),
            node=details.driver_node_id,
            message=details.message or "",
            started=(details.start_time or 0) / 1000,
            size=int(more["size"]),
            digest=str(more["digest"]),
        )
    except (LookupError, ValueError, TypeError):
        return None


def _cause(dashboard: Dashboard, job: Job) -> str:
    """Why a job has ended, from the end of its log."""
    lines = [line for line in dashboard.logs(job).splitlines() if line.strip()]
    if lines and ("not found" in lines[-1] and "baton" in lines[-1]):
        return f"{lines[-1]} (`baton` must be on the PATH of Ray's processes there)"
    return f"{job.status.lower()}: {lines[-1] if lines else job.message}"


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__

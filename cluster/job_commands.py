"""`baton submit --address` and `baton job` on a terminal."""

import asyncio
import os
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from cluster.batch_run import progress
from cluster.discovery import in_a_job
from cluster.errors import ClusterError, Interrupted
from cluster.jobs import Copy, Dashboard, Follower, Input, Job, new_job, next_attempt, send
from cluster.submit import Summary


class Options(NamedTuple):
    concurrency: int
    patience: float
    cluster: str | None

    def arguments(self) -> tuple[str, ...]:
        named = ("--cluster", self.cluster) if self.cluster is not None else ()
        return ("--concurrency", str(self.concurrency), "--patience", str(self.patience), *named)


def submit(console: Console, address: str, source: Path, target: Path | None, options: Options) -> Summary | None:
    """As a job; None where its results are not waited for."""
    if target is not None and os.path.exists(target) and target.stat().st_size:
        other = "name another file, or go on with that job: `baton job resume ID -o FILE`"
        raise ClusterError(f"{target} has results of something else; {other}")
    dashboard = Dashboard(address)
    given = Input.of(source)
    job = new_job(given, options.arguments())
    dashboard.start(job)
    console.print(f"{job.id}: sending {source.name}, {given.lines} lines", highlight=False, markup=False)
    try:
        send(dashboard, job, given)
    except KeyboardInterrupt:
        dashboard.stop(dashboard.job(job.id))
        raise Interrupted(f"{job.id} is stopped: it does not have its whole input") from None
    if target is None:
        here = f"--address {shlex.quote(address)}"
        console.print(f"it runs; `baton job results {job.id} -o FILE {here}` brings what comes", highlight=False)
        return None
    return _follow(console, dashboard, dashboard.job(job.id), target)


def resume(address: str, id: str, target: Path | None) -> Summary | None:
    console, dashboard = Console(), Dashboard(address)
    job = next_attempt(dashboard.job(id))
    dashboard.start(job)
    if target is None:
        console.print(f"{job.id} goes on", highlight=False)
        return None
    return _follow(console, dashboard, dashboard.job(job.id), target)


def fetch(address: str, id: str, target: Path) -> Summary:
    dashboard = Dashboard(address)
    return _follow(Console(), dashboard, dashboard.job(id), target)


def show_all(address: str) -> None:
    rows = [("job", "status", "lines", "started", "attempt", "input")]
    for job in Dashboard(address).jobs():
        rows.append((job.id, job.status.lower(), str(job.lines), _when(job), str(job.attempt), job.source))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def show(address: str, id: str) -> None:
    job = Dashboard(address).job(id)
    text = f"{job.id}: {job.status.lower()}; {job.lines} lines of {job.source}; attempt {job.attempt}, {_when(job)}"
    Console().print(text, highlight=False, markup=False, soft_wrap=True)
    if job.message:
        Console().print(job.message, highlight=False, markup=False, soft_wrap=True)


def show_logs(address: str, id: str, *, follow: bool) -> None:
    dashboard = Dashboard(address)
    job = dashboard.job(id)
    if not follow:
        sys.stdout.write(dashboard.logs(job))
        return

    async def tail() -> None:
        async for text in dashboard.tail(job):
            sys.stdout.write(text)
            sys.stdout.flush()

    asyncio.run(tail())


def stop(address: str, id: str) -> None:
    dashboard = Dashboard(address)
    job = dashboard.job(id)
    if job.ended or not dashboard.stop(job):
        raise ClusterError(f"{job.id} has ended already: {job.status.lower()}")
    Console().print(f"{job.id} is being stopped; `baton job resume {job.id}` goes on", highlight=False)


def warn_of_a_passing_folder(target: Path) -> None:
    """In a Ray job a relative path is one in Ray's copy of the working directory, which Ray removes after it."""
    if in_a_job() and "/runtime_resources/" in str(target.resolve()):
        stays = "give -o the path of a file that stays, or use `baton submit --address`, which brings the results"
        print(f"{target.resolve()} is in Ray's copy of the working directory, and will go with it: {stays}")


def _follow(console: Console, dashboard: Dashboard, job: Job, target: Path) -> Summary:
    with progress(console) as show_progress:
        try:
            return Follower(dashboard, job, Copy(target), show_progress).run()
        except KeyboardInterrupt:
            again = f"`baton job results {job.id} -o {shlex.quote(str(target))}` goes on following"
            end = f"`baton job stop {job.id}` ends it"
            raise Interrupted(f"{job.id} goes on without you: {again}, {end}") from None


def _when(job: Job) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started)) if job.started else "not yet"

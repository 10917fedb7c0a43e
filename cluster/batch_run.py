"""`baton submit` on a terminal: a progress bar, or a line now and then in a log; a cluster for the time of the run
where one is asked for; or a job of a cluster that is elsewhere.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cluster.errors import Interrupted
from cluster.submit import Batch, Summary

LINE_EVERY = 10.0
"""Seconds between lines that tell a log how far it is."""


@dataclass(slots=True)
class BatchRun:
    console: Console
    source: Path
    target: Path
    concurrency: int
    patience: float

    def on_url(self, url: str) -> Summary:
        """Against a gateway that is there."""
        with progress(self.console) as show:
            batch = Batch(
                url, self.source, self.target, concurrency=self.concurrency, patience=self.patience, on_progress=show
            )
            try:
                return batch.run()
            except KeyboardInterrupt:
                raise Interrupted("stopped; run the same command again to go on where it stopped") from None

    def on_topology(self, source: Path) -> Summary:
        """Against a cluster of its own."""
        from cluster.running import running
        from cluster.topology import Topology

        with running(Topology.load(source), self.console, source=source.resolve()) as (cluster, _):
            return self.on_url(cluster.url)


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Callable[[Summary], None]]:
    """What shows how far it is: a bar, or lines where nobody looks."""
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}", style="dim"))
    timing = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *timing, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, note="")
        yield lambda now: bar.update(task, completed=now.finished, total=now.total, note=_note(now))


def _lines(console: Console) -> Callable[[Summary], None]:
    last = time.monotonic()

    def show(now: Summary) -> None:
        nonlocal last
        if time.monotonic() - last < LINE_EVERY:
            return
        last = time.monotonic()
        note = f"; {text}" if (text := _note(now)) else ""
        console.print(f"{now.finished} of {now.total} lines{note}", highlight=False, markup=False, soft_wrap=True)

    return show


def _note(now: Summary) -> str:
    errors = f"{now.failed} errors" if now.failed else ""
    return f"{now.trouble}; trying again" if now.trouble else errors

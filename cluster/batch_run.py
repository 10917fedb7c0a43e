"""`baton submit` on a terminal: a progress bar, and a cluster for the time of the run where one is asked for."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cluster.errors import Interrupted
from cluster.submit import Batch, Summary


@dataclass(slots=True)
class BatchRun:
    console: Console
    source: Path
    target: Path
    concurrency: int
    patience: float

    def on_url(self, url: str) -> Summary:
        """Against a gateway that is there."""
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}", style="dim"))
        timing = (TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, *timing, console=self.console, transient=True) as bar:
            task = bar.add_task("", total=None, note="")

            def show(summary: Summary) -> None:
                errors = f"{summary.failed} errors" if summary.failed else ""
                note = f"{summary.trouble}; trying again" if summary.trouble else errors
                bar.update(task, completed=summary.finished, total=summary.total, note=note)

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

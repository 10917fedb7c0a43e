"""`baton chaos` on a terminal: starts the topology, shows the run, tells what it found."""

import asyncio
import threading
import time
from pathlib import Path

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.chaos.core.answers import Verdict
from cluster.chaos.core.faults import HEAD_SECONDS, Kind
from cluster.chaos.core.report import LEAST_SPAN, MOST_GROWTH, Report
from cluster.chaos.page import VIOLATIONS, page, picture
from cluster.chaos.processes import OwnCluster
from cluster.chaos.recorder import Recorder
from cluster.chaos.session import Now, Session, Settings
from cluster.core.units import BackOff
from cluster.errors import ClusterError, Interrupted
from cluster.launch import Cluster
from cluster.running import Signals, running
from cluster.topology import Topology

EVERY_LINE = 10.0
"""Seconds between two lines where there is no terminal."""
OVERRIDES = {"dtype": "float32", "gateway.port": 0, "gateway.replicas": 2, "cluster.chaos": True}
"""The same answer whatever else is in a step, a port of its own, and links that can be made bad."""


def chaos(
    console: Console, source: Path, settings: Settings, *, report: Path | None, history: Path | None, as_json: bool
) -> bool:
    """Run; whether nothing was lost, repeated, leaked or wrong."""
    for file in (report, history):
        if file is not None and not file.parent.is_dir():
            raise ClusterError(f"there is no folder {file.parent} for {file.name}; make it, or name another file")
    quiet = Console(stderr=True, quiet=as_json and not console.is_terminal)
    topology = Topology.load(source)
    if topology.security.tls is not None:
        raise topology.error(
            ("security", "tls"), "security.tls: `baton chaos` speaks plain HTTP; write another topology"
        )
    topology = topology.with_overrides({**OVERRIDES, "cluster.name": f"{topology.name}-chaos"[:40]})
    head = BackOff(at_once=HEAD_SECONDS, first=HEAD_SECONDS)
    up = running(topology, quiet, source=source.resolve(), head_back_off=head)
    with Recorder(history) as recorder, up as (cluster, signals):
        signals.only_note()
        found = _run(quiet, cluster, signals, settings, recorder)
    if report is not None:
        report.write_text(picture(found) if report.suffix == ".svg" else page(found, figures(found)))
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found.to_json())).decode())
    else:
        show(console, found)
        if report is not None:
            console.print(f"{report}: open it in a browser", highlight=False, soft_wrap=True)
    return found.ok


def _run(console: Console, cluster: Cluster, signals: Signals, settings: Settings, recorder: Recorder) -> Report:
    """The session in a thread of its own, while this one watches over the cluster."""
    stage = Stage(console)
    session = Session(OwnCluster(cluster), settings, recorder, stage.note)
    results: list[Report | BaseException] = []

    def run() -> None:
        try:
            results.append(asyncio.run(session.run()))
        except BaseException as error:  # noqa: BLE001, it is raised below
            results.append(error)

    thread = threading.Thread(target=run, name="chaos", daemon=True)
    thread.start()
    with stage.live():
        while thread.is_alive():
            cluster.supervise(0.1)
            stage.show(session.now)
            if signals.seen.is_set():
                raise Interrupted("stopped")
    result = results[0]
    if isinstance(result, BaseExceptionGroup):
        result = result.exceptions[0]  # one is enough to say
    if isinstance(result, BaseException):
        raise result
    return result


class Stage:
    """What is seen while it runs: a table on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._line_at = 0.0

    def live(self) -> "Live | Stage":
        return self if self._live is None else self._live

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: object) -> None: ...

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, now: Now) -> None:
        if self._live is not None:
            self._live.update(_picture(now))
        elif time.monotonic() > self._line_at:
            self._line_at = time.monotonic() + EVERY_LINE
            self.note(f"{now.phase}: {_progress(now)}; {_counts(now)}")


def _progress(now: Now) -> str:
    done, total = now.progress
    return f"{done:.0f} of {total:.0f}"


def _counts(now: Now) -> str:
    tally = now.tally
    verdicts = ", ".join(f"{tally.verdicts[each]} {each.value}" for each in Verdict)
    return (
        f"{len(now.strikes)} faults, {tally.resumes} resumes, streams: {verdicts}, {now.tokens_per_second:.0f} tokens/s"
    )


def _picture(now: Now) -> RenderableType:
    done, total = now.progress
    line = Table.grid(padding=(0, 1))
    line.add_row(Text(now.phase), ProgressBar(total=total, completed=done, width=30), Text(_progress(now), style="dim"))
    return Group(line, Text(f"{now.in_flight} in flight; {_counts(now)}", style="dim"))


def show(console: Console, found: Report) -> None:
    """Figures, then what went wrong."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row, text in figures(found):
        table.add_row(row, escape(text))
    console.print(table)
    for problem in found.problems:
        console.print(f"[red]{escape(problem)}[/]", highlight=False, soft_wrap=True)
    for violation in found.violations[:VIOLATIONS]:
        console.print(f"[yellow]{escape(violation)}[/]", highlight=False, soft_wrap=True)
    verdict = (
        "[green]OK[/]  nothing lost, repeated, leaked or wrong, and no memory grows" if found.ok else "[red]FAILED[/]"
    )
    console.print(verdict, highlight=False)


def figures(found: Report) -> list[tuple[str, str]]:
    """The report as rows of name and text."""
    told = found.to_json()
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(found.faults.items())) or "none"
    rows = [
        (
            "faults",
            faults + (f" ({found.skipped} left out for want of others to do the work)" if found.skipped else ""),
        ),
        ("streams", f"{told['streams']}, {told['tokens']} tokens in {found.seconds:.0f} s"),
        ("left out", "; ".join(found.left_out) or "none"),
        ("resumes", f"{told['resumes']} further attempts"),
    ]
    for kind in (Kind.KILL, Kind.STOP):
        rows.append((f"{kind.value}: to detect", _times(told["detect_seconds"][kind.value])))
        rows.append((f"{kind.value}: to resume", _times(told["resume_seconds"][kind.value])))
    rows += [
        ("restarts", _times(told["restart_seconds"])),
        ("longest pauses", _times(told["pause_seconds"])),
        ("refused, asked again", str(told["refusals"])),
        ("went on elsewhere", str(told["attached"])),
        ("while Ray's head was gone", f"{told['headless']} streams"),
        *((each.value, str(found.count(each))) for each in Verdict if each is not Verdict.SAME),
        ("leaked", str(len(found.leaked))),
        ("growing", str(len(found.growing))),
        ("the checker's", f"{len(found.violations)} violations"),
        ("memory", _growths(found)),
    ]
    return rows


def _times(spread: dict[str, float]) -> str:
    if not spread["count"]:
        return "-"
    return f"p50 {spread['p50']:.2f} s, p99 {spread['p99']:.2f} s, most {spread['max']:.2f} s, of {spread['count']}"


def _growths(found: Report) -> str:
    if not found.judged:
        return f"no process was watched for {LEAST_SPAN:.0f} s after its warm-up"
    most, growth = max(found.judged, key=lambda pair: pair[1])
    others = len(found.memory) - len(found.judged)
    return (
        f"{most.name} grows most: {growth:+.2f} MB/min ({MOST_GROWTH} are too many), of {len(found.judged)} processes "
        f"that were watched for {LEAST_SPAN:.0f} s or more after their warm-up; {others} lived too shortly"
    )

"""`baton status`: what runs, and what each worker is doing."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster import state
from cluster.client import get
from cluster.control import StatusAsked, Statuses, ask
from cluster.core.units import Phase, Status
from cluster.errors import ClusterError
from cluster.plan import size


def show_status(console: Console, name: str | None) -> None:
    """One cluster in full, or all that run; one that does not answer keeps no other from being shown."""
    if name is None:
        files = state.every()
    else:
        named = state.read(name)
        files = [named] if named is not None else []
    if not files:
        advice = "start one with `baton up TOPOLOGY`" if name is None else "`baton status` lists those that do"
        raise ClusterError(f"no cluster {'' if name is None else f'named {name!r} '}runs; {advice}")
    for file in files:
        console.print(f"[bold]{file.name}[/]  {_state(file)}", highlight=False, soft_wrap=True)
        if file.alive and file.url is not None:
            try:
                console.print(_table(get(file.url, "/status")))
            except ClusterError as error:
                console.print(f"  [red]{escape(str(error))}[/]", highlight=False, soft_wrap=True)
            _show_launcher(console, file)


def _show_launcher(console: Console, file: state.ClusterFile) -> None:
    """What its launcher knows: further gateways, what has died, and what does not run now."""
    try:
        answers = list(ask(file.name, StatusAsked()))
    except ClusterError as error:
        console.print(f"  [red]{escape(str(error))}[/]", highlight=False, soft_wrap=True)
        return
    for answer in answers:
        if not isinstance(answer, Statuses):
            continue
        further = [url for url in answer.urls if url != file.url]
        if further:
            console.print(f"  also at {', '.join(further)}", highlight=False, soft_wrap=True)
        for unit in answer.units:
            trouble = ", ".join(_troubles(unit))
            if trouble:
                colour = "yellow" if unit.phase is Phase.RUNNING else "red"
                console.print(f"  [{colour}]{unit.name}[/]: {escape(trouble)}", highlight=False, soft_wrap=True)


def _troubles(unit: Status) -> Iterator[str]:
    if unit.phase is Phase.BACK_OFF:
        yield f"back-off, starts again in {unit.retry_in:.0f} s" if unit.retry_in else "waits for Ray's head"
    elif unit.phase is not Phase.RUNNING:
        yield f"{unit.phase} for {unit.seconds:.0f} s"
    if unit.drained:
        yield "drained"
    if unit.restarts:
        yield f"{unit.restarts} restart{'s' if unit.restarts > 1 else ''}"
    if unit.cause:
        yield f"last death: {unit.cause}"


def _state(file: state.ClusterFile) -> str:
    if not file.alive:
        return f"[red]its launcher (pid {file.pid}) is gone[/]; `baton down {file.name}` cleans up"
    return f"{file.url or 'starting'}  pid {file.pid}  {escape(file.topology)}"


def _table(status: dict[str, Any]) -> Table:
    cluster = status["cluster"] or {"workers": [], "queued": 0}
    in_flight = f"{status['sequences_in_flight']} sequences in flight, {cluster['queued']} waiting for a worker"
    ready = "ready" if status["ready"] else "not ready"
    # No wider than a terminal of 80 columns, or rich leaves the last ones out.
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0), caption=f"{ready}; {in_flight}")
    table.caption_justify = "left"
    for column in ("worker", "role"):
        table.add_column(column)
    for column in ("running", "waiting", "free", "held", "cached", "blocks", "KV out", "KV in"):
        table.add_column(column, justify="right", no_wrap=True)
    for worker in cluster["workers"]:
        blocks = worker["blocks"]
        table.add_row(
            worker["worker"],
            worker["role"] if worker["alive"] else "[red]lost[/]",
            str(worker["running"]),
            str(worker["waiting"]),
            *(str(blocks[kind]) for kind in ("free", "held", "cached", "total")),
            size(worker["kv_bytes_sent"]),
            size(worker["kv_bytes_received"]),
        )
    return table

"""`baton drain`, `baton flip` and `baton restart`: ask the launcher, and show what it does."""

from rich.console import Console

from cluster import control, state
from cluster.errors import ClusterError


def drain(console: Console, worker: str, cluster: str | None, *, undo: bool) -> None:
    _operate(console, cluster, control.DrainAsked(worker, undo))


def flip(console: Console, worker: str, cluster: str | None) -> None:
    _operate(console, cluster, control.FlipAsked(worker))


def restart(console: Console, units: tuple[str, ...], cluster: str | None, *, force: bool) -> None:
    """``units``: empty for all."""
    _operate(console, cluster, control.RestartAsked(units, force))


def _operate(console: Console, cluster: str | None, question: control.Question) -> None:
    """One line for each thing that happens; ``ClusterError`` if it does not end well."""
    file = state.find(cluster)
    for answer in control.ask(file.name, question):
        match answer:
            case control.Told(who, what):
                console.print(f"{who}: {what}", highlight=False, markup=False)
            case control.Ended(problem):
                if problem:
                    raise ClusterError(problem)
                return
    raise ClusterError(f"the launcher of {file.name} ended before it was done; see `baton status`")

"""`baton replay`: whether recorded state machines answer today what they answered then."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ClusterError
from messages.codec import BadMessage
from simulator.replay import replay

if TYPE_CHECKING:
    from rich.console import Console


def replay_all(console: "Console", journals: Iterable[Path]) -> bool:
    """One line a file; whether all answers were equal. ``ClusterError`` for what is no journal."""
    equal = True
    for path in journals:
        try:
            result = replay(path)
        except (OSError, BadMessage) as error:
            raise ClusterError(f"cannot replay {path}: {error}") from error
        equal = equal and result.difference is None
        console.print(f"{path.name}: {result}", markup=False, highlight=False, soft_wrap=True)
    return equal

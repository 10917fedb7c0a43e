"""What a placement policy is: it keeps the live workers of one role in its own order, and picks one."""

from collections.abc import Callable
from typing import Protocol

from router.core.views import WorkerView

Suits = Callable[[WorkerView], bool]

LOOK = 4
"""Workers without room that a choice looks at."""


class Policy(Protocol):
    """Told of every change, so that a choice need not look at every worker.

    ``choose`` may cost O(log workers), and more only for workers that do not suit.
    """

    def add(self, worker: WorkerView) -> None:
        """A worker that can be chosen from now on."""

    def remove(self, worker: WorkerView) -> None:
        """It cannot be chosen any more; harmless twice."""

    def changed(self, worker: WorkerView) -> None:
        """What is placed on ``worker`` is another load now."""

    def choose(self, suits: Suits, has_room: Suits | None = None) -> WorkerView | None:
        """The best worker that suits and has room, or None. Changes nothing that a caller could see.

        The order puts room first: when ``LOOK`` workers that suit have none, it looks no further.
        """

    def __len__(self) -> int:
        """Workers that can be chosen."""

    def __contains__(self, worker: WorkerView) -> bool: ...

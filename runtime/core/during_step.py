"""What comes while a worker's step runs."""

from typing import Any


class DuringStep:
    """It waits for the end of the step, but for what may be handled at once. What is about one request stays in order.

    ``early``: the types of messages that may be handled at once. ``limit``: about how many may wait, so that a flood
    cannot keep the loop from its next step.
    """

    def __init__(self, early: tuple[type, ...], limit: int) -> None:
        self._early = early
        self._limit = limit
        self._waiting: list[Any] = []

    @property
    def full(self) -> bool:
        """Whether no more is to be taken before the step ends."""
        return len(self._waiting) >= self._limit

    def admits(self, event: Any) -> bool:
        """Whether ``event`` is to be handled now; else it waits."""
        request = getattr(event, "request", None)
        behind = any(getattr(before, "request", None) == request for before in self._waiting)
        if isinstance(event, self._early) and not behind:
            return True
        self._waiting.append(event)
        return False

    def take(self) -> list[Any]:
        """What has waited, in the order in which it came; the step is over."""
        waiting, self._waiting = self._waiting, []
        return waiting

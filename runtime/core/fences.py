"""What a newer attempt leaves behind: older ones, and repeats, are not let in any more."""

from collections import OrderedDict

from messages.ids import Attempt, RequestId

REMEMBERED = 65_536
"""Requests whose attempts are remembered; a message that is older than this many requests is not expected."""


class Fences:
    """The newest attempt seen of each request, the least recently used forgotten first."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._seen: OrderedDict[RequestId, Attempt] = OrderedDict()

    def admits(self, request: RequestId, attempt: Attempt) -> bool:
        """Whether ``attempt`` is newer than every one seen."""
        return attempt > self._seen.get(request, 0)

    def raise_to(self, request: RequestId, attempt: Attempt) -> None:
        """From now on only newer attempts are let in."""
        self._seen[request] = max(attempt, self._seen.get(request, attempt))
        self._seen.move_to_end(request)
        if len(self._seen) > self._remembered:
            self._seen.popitem(last=False)

"""The requests that wait for a placement, in the order in which they get one.

A further attempt of a request that was placed before stands in front of all first attempts, for its client may be
reading already. Within both kinds it is first come, first served. A first attempt waits for a bounded time; a further
one is given up only when a role that it needs has had no live worker for a while, which is shorter: its client reads.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from messages.gateway_to_router import PlacementWanted
from messages.ids import Address, RequestId


@dataclass(slots=True)
class Waiting:
    wanted: PlacementWanted
    since: float


class Line:
    """``timeout``: seconds that a first attempt may wait; ``deserted``: that further ones do without a live worker."""

    def __init__(self, timeout: float, deserted: float) -> None:
        self._timeout = timeout
        self._patience = deserted
        self._further: OrderedDict[RequestId, Waiting] = OrderedDict()
        self._first: OrderedDict[RequestId, Waiting] = OrderedDict()
        self._deserted: float | None = None  # since when a role has had no live worker

    def __len__(self) -> int:
        return len(self._further) + len(self._first)

    def __iter__(self) -> Iterator[RequestId]:
        return iter((*self._further, *self._first))

    def get(self, request: RequestId) -> PlacementWanted | None:
        waiting = self._further.get(request) or self._first.get(request)
        return waiting.wanted if waiting is not None else None

    def head(self) -> PlacementWanted | None:
        """Whose turn it is."""
        lane = self._further or self._first
        return _oldest(lane).wanted if lane else None

    def push(self, wanted: PlacementWanted, now: float) -> None:
        """At the end of its kind. One that stands there already keeps its place."""
        lane = self._further if wanted.attempt > 1 else self._first
        waiting = lane.get(wanted.request)
        if waiting is not None:
            waiting.wanted = wanted
        else:
            self.remove(wanted.request)
            lane[wanted.request] = Waiting(wanted, now)

    def remove(self, request: RequestId) -> None:
        """Harmless for one that does not wait."""
        self._further.pop(request, None)
        self._first.pop(request, None)

    def note(self, *, ready: bool, since: float) -> None:
        """Whether there is a live worker of every role that a request needs; if not, since when."""
        if ready:
            self._deserted = None
        elif self._deserted is None:
            self._deserted = since

    @property
    def deadline(self) -> float:
        """When the next one has waited for too long."""
        first = _oldest(self._first).since + self._timeout if self._first else float("inf")
        if self._further and self._deserted is not None:
            return min(first, self._deserted + self._patience)
        return first

    def take_late(self, now: float) -> list[PlacementWanted]:
        """Take those out who have waited for too long."""
        late: list[PlacementWanted] = []
        while self.deadline <= now:
            in_first = bool(self._first) and _oldest(self._first).since + self._timeout <= now
            _, waiting = (self._first if in_first else self._further).popitem(last=False)
            late.append(waiting.wanted)
        return late

    def take_from(self, gateway: Address) -> None:
        """Forget those of a gateway that is lost."""
        for lane in (self._further, self._first):
            for request in [request for request, waiting in lane.items() if waiting.wanted.gateway == gateway]:
                del lane[request]

    def check_integrity(self) -> None:
        for lane in (self._further, self._first):
            assert all(request == waiting.wanted.request for request, waiting in lane.items())
            arrivals = [waiting.since for waiting in lane.values()]
            assert arrivals == sorted(arrivals), "requests do not wait in order"
        assert all(waiting.wanted.attempt > 1 for waiting in self._further.values())
        assert not self._further.keys() & self._first.keys(), "a request waits twice"


def _oldest(lane: OrderedDict[RequestId, Waiting]) -> Waiting:
    return next(iter(lane.values()))

"""Virtual time: what is due next happens next, and takes no time."""

from collections.abc import Callable
from heapq import heappop, heappush

Call = Callable[[], None]


class Alarm:
    """Something that will happen, unless it is called off."""

    __slots__ = ("call", "time")

    def __init__(self, time: float, call: Call) -> None:
        self.time = time
        self.call: Call | None = call

    def off(self) -> None:
        self.call = None


class Clock:
    """``now`` in seconds. What is due at the same time happens in the order in which it was asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        """That have happened."""
        self._heap: list[tuple[float, int, Alarm]] = []
        self._number = 0

    def at(self, time: float, call: Call) -> Alarm:
        """Have ``call`` happen at ``time``, or now if that is over."""
        alarm = Alarm(max(time, self.now), call)
        self._number += 1
        heappush(self._heap, (alarm.time, self._number, alarm))
        return alarm

    def run(self, until: float) -> None:
        """Everything up to and including ``until`` happens."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            time, _, alarm = heappop(heap)
            if alarm.call is not None:
                self.now = time
                self.events += 1
                alarm.call()
        self.now = max(self.now, until)

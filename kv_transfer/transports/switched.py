"""Senders whose links can be made bad, and sound again, while a worker serves: for `baton chaos` and its tests.

A worker has them only where its topology says ``cluster.chaos``. While its links are sound every push goes the plain
way; while they are not, through a ``FaultySender``.
"""

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from kv_transfer.transports.base import (
    Blocks,
    Cancelled,
    Heads,
    OnEvent,
    Pool,
    Pushed,
    PushFailed,
    Sender,
    StepLayers,
    TransferKey,
    TransportEvent,
)
from kv_transfer.transports.faulty import Fault, FaultySender
from messages.common import KVEndpoint

WIRE_BLOCKS = 256
"""Blocks that may be under way through bad links; if there are more they spoil each other, which is a fault too."""


@dataclass(frozen=True, slots=True)
class LinkState:
    """What links are like."""

    rates: Mapping[Fault, float] = field(default_factory=dict)
    """How probable each fault is, for a push."""
    latency: float = 0.0
    """Seconds by which the end of a push, or its failure, is heard of later."""
    bytes_per_second: float = float("inf")

    @property
    def slow(self) -> bool:
        return self.latency > 0 or self.bytes_per_second < float("inf")

    @property
    def sound(self) -> bool:
        return not self.rates and not self.slow


SOUND = LinkState()


class Links:
    """The links out of one process. ``state`` may be set from any thread; it is the schedule of a ``FaultySender``."""

    def __init__(self, rng: Random | None = None) -> None:
        self.rng = Random() if rng is None else rng
        self._state = SOUND
        self._on_sound: list[Callable[[], None]] = []

    @property
    def state(self) -> LinkState:
        return self._state

    @state.setter
    def state(self, state: LinkState) -> None:
        self._state = state
        if state.sound:
            for call in self._on_sound:
                call()

    def on_sound(self, call: Callable[[], None]) -> None:
        """Have it called, in the thread that sets it, whenever ``state`` is sound again."""
        self._on_sound.append(call)

    def __iter__(self) -> Iterator[Fault]:
        return self

    def __next__(self) -> Fault:
        rates = self.state.rates
        kinds = [*rates, Fault.NONE]
        return self.rng.choices(kinds, [*rates.values(), 1 - sum(rates.values())])[0]


class MakeSender(Protocol):
    def __call__(self, *, pool: Pool, on_event: OnEvent) -> Sender: ...


class SwitchedSender:
    """Two senders of the kind that ``make`` makes: a plain one, and a faulty one while ``links`` are not sound.

    On slow links the data goes at once, but the sender hears of it as late as if it had not.
    """

    def __init__(self, pool: Pool, make: MakeSender, on_event: OnEvent, links: Links) -> None:
        self._links = links
        self._on_event = on_event
        self._late = LateReports(on_event)
        links.on_sound(self._late.hurry)
        self._plain = make(pool=pool, on_event=on_event)
        self._faulty = FaultySender(
            pool,
            lambda wire, report: make(pool=wire, on_event=report),
            self._report,
            links,
            links.rng,
            wire_blocks=WIRE_BLOCKS,
        )

    def push(
        self,
        key: TransferKey,
        to: KVEndpoint,
        heads: Heads,
        first: int,
        source: Blocks,
        target: Blocks,
        layers: StepLayers | None = None,
    ) -> None:
        sender = self._plain if self._links.state.sound else self._faulty
        sender.push(key, to, heads, first, source, target, layers)

    def cancel(self, key: TransferKey) -> None:
        """The faulty sender's first; when it has let go of ``key``, the plain one's answer is that of both."""
        self._late.drop(key)
        self._faulty.cancel(key)

    def forget(self, to: KVEndpoint) -> None:
        self._faulty.forget(to)
        self._plain.forget(to)

    def shutdown(self) -> None:
        self._late.shutdown()
        self._faulty.shutdown()
        self._plain.shutdown()

    def _report(self, event: TransportEvent) -> None:
        state = self._links.state
        if isinstance(event, Cancelled):
            self._late.drop(event.key)
            self._plain.cancel(event.key)
        elif isinstance(event, Pushed | PushFailed) and state.slow:
            self._late.put(event, state)
        else:
            self._on_event(event)


class LateReports:
    """Passes reports of pushes on when a slow link would have taken the bytes; one that is dropped never comes."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._waiting: list[tuple[float, int, Pushed | PushFailed]] = []
        self._numbers = itertools.count()
        self._free_at = 0.0
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="slow-links", daemon=True)
        self._thread.start()

    def put(self, event: Pushed | PushFailed, state: LinkState) -> None:
        num_bytes = event.num_bytes if isinstance(event, Pushed) else 0
        with self._changed:
            self._free_at = max(self._free_at, time.monotonic()) + num_bytes / state.bytes_per_second
            heapq.heappush(self._waiting, (self._free_at + state.latency, next(self._numbers), event))
            self._changed.notify()

    def hurry(self) -> None:
        """The link is fast again: what was slow is there at once. What was lost is still found out in its time."""
        with self._changed:
            self._free_at = 0.0
            self._waiting = [
                (0.0 if isinstance(event, Pushed) else due, number, event) for due, number, event in self._waiting
            ]
            heapq.heapify(self._waiting)
            self._changed.notify()

    def drop(self, key: TransferKey) -> None:
        with self._changed:
            self._waiting = [each for each in self._waiting if each[2].key != key]
            heapq.heapify(self._waiting)

    def shutdown(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                while self._waiting and self._waiting[0][0] <= now:
                    self._on_event(heapq.heappop(self._waiting)[2])
                self._changed.wait(self._waiting[0][0] - now if self._waiting else None)

"""Any transport, with faults put in by a schedule: the same schedule makes the same faults.

A schedule is any iterable of ``Fault``: one is drawn for each push of a ``FaultySender`` and for each arrival that a
``FaultyReceiver`` reports; when it has run out there are no more. Nothing here knows a clock: what is delayed waits for
the next push or arrival, or for ``release``.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum, auto
from random import Random
from typing import NamedTuple

import numpy as np

from kv_transfer.transports.base import (
    Blocks,
    Cancelled,
    Heads,
    Landed,
    OnEvent,
    Pool,
    Pushed,
    PushFailed,
    Receiver,
    Sender,
    StepLayers,
    TransferKey,
    TransportEvent,
)
from messages.common import KVEndpoint


class Fault(Enum):
    """What happens to one push, or to one arrival."""

    NONE = auto()
    DROP = auto()
    """It is lost. The sender reports it as pushed all the same; the receiver does not report it as landed."""
    DUPLICATE = auto()
    """It comes twice."""
    DELAY = auto()
    """It comes after the next one."""
    CORRUPT = auto()
    """One bit of one block arrives flipped."""
    SWAP = auto()
    """Two of its blocks arrive in each other's place."""
    FAIL = auto()
    """``PushFailed``. At a receiver the same as ``DROP``."""
    DIE = auto()
    """This and everything later goes unheard and unanswered."""


def random_faults(rng: Random, rates: Mapping[Fault, float]) -> Iterator[Fault]:
    """For ever: each fault with its probability, else none."""
    kinds = [*rates, Fault.NONE]
    weights = [*rates.values(), 1 - sum(rates.values())]
    while True:
        yield rng.choices(kinds, weights)[0]


class _Push(NamedTuple):
    key: TransferKey
    to: KVEndpoint
    heads: Heads
    first: int
    source: Blocks
    target: Blocks
    layers: StepLayers | None


class FaultySender:
    """Wraps the sender that ``make`` makes over a wire, rows of its own into which each push is copied first.

    So faults never touch the caller's blocks, nor those of another push. The wire's rows are used in turn, and no more
    than there are may be under way: ``wire_blocks``, or four times as many as the pool has.
    """

    def __init__(
        self,
        pool: Pool,
        make: Callable[[Pool, OnEvent], Sender],
        on_event: OnEvent,
        faults: Iterable[Fault],
        rng: Random,
        wire_blocks: int = 0,
    ) -> None:
        self._pool = pool
        # Touched at once, so that faults do not make a process grow.
        self._wire = np.full((wire_blocks or 4 * len(pool), pool.shape[1]), 0, np.uint8)
        self._next = 0
        self._on_event = on_event
        self._faults = iter(faults)
        self._rng = rng
        self._held: list[_Push] = []
        self._lock = threading.Lock()  # of the two below, which the inner sender's thread reads
        self._repeats: Counter[Pushed] = Counter()
        self._dead = False
        self._inner = make(self._wire, self._report)

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
        if self._dead:
            return
        held, self._held = self._held, []
        push = _Push(key, to, heads, first, source, target, layers)
        match next(self._faults, Fault.NONE):
            case Fault.DROP:
                self._on_event(Pushed(key, first, len(source)))
            case Fault.FAIL:
                self._on_event(PushFailed(key, "an injected fault"))
            case Fault.DELAY:
                self._held = [push]
            case Fault.DIE:
                self._dead = True
                return
            case Fault.DUPLICATE:
                with self._lock:
                    self._repeats[Pushed(key, first, len(source))] += 1
                self._forward(push)
                self._forward(push)
            case fault:
                self._forward(push, fault)
        for late in held:
            self._forward(late)

    def cancel(self, key: TransferKey) -> None:
        if not self._dead:
            self._held = [push for push in self._held if push.key != key]
            self._inner.cancel(key)

    def forget(self, to: KVEndpoint) -> None:
        self.release()
        self._inner.forget(to)

    def release(self) -> None:
        """Let through what is delayed."""
        held, self._held = self._held, []
        for push in held:
            self._forward(push)

    def shutdown(self) -> None:
        self._inner.shutdown()

    def _forward(self, push: _Push, fault: Fault = Fault.NONE) -> None:
        rows = np.arange(self._next, self._next + len(push.source), dtype=np.int32) % len(self._wire)
        self._next += len(rows)
        live = push.layers
        if live is None:
            self._wire[rows] = self._pool[push.source]
            _spoil(fault, self._wire, rows, self._rng)
            self._inner.push(push.key, push.to, push.heads, push.first, rows, push.target)
            return
        on_wire = StepLayers(live.num_layers)
        layer_bytes = self._wire.shape[1] // live.num_layers

        def follow() -> None:
            """Put on the wire what has come; the fault hits the first of it."""
            if live.failed:
                on_wire.fail()
                return
            part = slice(on_wire.num_ready * layer_bytes, live.num_ready * layer_bytes)
            if part.stop > part.start:
                self._wire[rows, part] = self._pool[push.source, part]
                if not part.start:
                    _spoil(fault, self._wire[:, part], rows, self._rng)
            on_wire.advance(live.num_ready)

        self._inner.push(push.key, push.to, push.heads, push.first, rows, push.target, on_wire)
        live.listen(follow)
        if live.num_ready or live.failed:
            follow()

    def _report(self, event: TransportEvent) -> None:
        if self._dead:
            return
        with self._lock:
            if isinstance(event, Pushed) and self._repeats[event]:
                self._repeats[event] -= 1
                return
            if isinstance(event, Cancelled):
                for pushed in [pushed for pushed in self._repeats if pushed.key == event.key]:
                    del self._repeats[pushed]
        self._on_event(event)


class FaultyReceiver:
    """Wraps the receiver that ``make`` makes over ``pool``; a one-sided one reports nothing, so nothing happens."""

    def __init__(
        self,
        pool: Pool,
        make: Callable[[OnEvent], Receiver],
        on_event: OnEvent,
        faults: Iterable[Fault],
        rng: Random,
    ) -> None:
        self._pool = pool
        self._on_event = on_event
        self._faults = iter(faults)
        self._rng = rng
        self._held: list[Landed] = []
        self._lock = threading.Lock()
        self._open: dict[TransferKey, tuple[int, Blocks]] = {}
        self._dead = False
        self._inner = make(self._report)
        self.one_sided = self._inner.one_sided
        self.endpoint = self._inner.endpoint

    def open(self, key: TransferKey, first: int, blocks: Blocks, lanes: tuple[Heads, ...]) -> None:
        with self._lock:
            self._open[key] = (first, blocks)
        self._inner.open(key, first, blocks, lanes)

    def close(self, key: TransferKey) -> None:
        with self._lock:
            self._open.pop(key, None)
        self._inner.close(key)

    def writer_gone(self, writer: KVEndpoint) -> bool:
        return self._inner.writer_gone(writer)

    def release(self) -> None:
        """Report what is delayed."""
        with self._lock:
            held, self._held = self._held, []
        for landed in held:
            self._on_event(landed)

    def shutdown(self) -> None:
        self._inner.shutdown()

    def _report(self, event: TransportEvent) -> None:
        if self._dead or not isinstance(event, Landed):
            return
        with self._lock:
            fault = next(self._faults, Fault.NONE)
            held, self._held = self._held, [event] if fault is Fault.DELAY else []
            self._dead = fault is Fault.DIE
            if event.key in self._open:
                first, blocks = self._open[event.key]
                _spoil(fault, self._pool, blocks[event.indices - first], self._rng)
        if self._dead:
            return
        times = {Fault.DROP: 0, Fault.FAIL: 0, Fault.DELAY: 0, Fault.DUPLICATE: 2}.get(fault, 1)
        for landed in [event] * times + held:
            self._on_event(landed)


def _spoil(fault: Fault, pool: Pool, rows: Blocks, rng: Random) -> None:
    if fault is Fault.CORRUPT and len(rows):
        pool[rng.choice(rows.tolist()), rng.randrange(pool.shape[1])] ^= 1 << rng.randrange(8)
    elif fault is Fault.SWAP and len(rows) > 1:
        here, there = rng.sample(rows.tolist(), 2)
        pool[[here, there]] = pool[[there, here]]

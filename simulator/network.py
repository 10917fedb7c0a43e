"""The links between processes. A link keeps the order of what it carries, as TCP does, and loses nothing by itself.

Faults make it do otherwise: each has a window of time, and all but a cut a chance with which it strikes a message.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, Protocol

from messages.codec import Decode, encode
from messages.ids import Address, Attempt, RequestId
from simulator.clock import Clock
from simulator.history import Delivered, Dropped, History, Sent
from simulator.rank import Landing

LATENCY = 0.0001, 0.0005
"""Seconds, from and to."""
RECONNECT = 0.1
"""Seconds until what waited for a process that is started again at the same address gets there."""
QUEUED = 10_000
"""Messages that wait for one address at the most."""


class Process(Protocol):
    """What listens at an address."""

    name: str
    alive: bool

    def deliver(self, message: Any) -> None: ...
    def land(self, landing: Landing) -> None: ...


@dataclass(slots=True)
class Weather:
    """What a link does to messages; chances in [0, 1]."""

    cut: int = 0
    """Cuts that are in force: nothing gets through."""
    holds: bool = False
    """Whether a cut keeps what is sent until it heals, as TCP does, or drops it."""
    loss: float = 0.0
    twice: float = 0.0
    astray: float = 0.0
    """Takes another way, and overtakes or is overtaken."""
    delay: float = 0.0
    """Seconds on top, up to."""
    slowness: float = 1.0
    """Times as long as else for the bytes of KV."""
    flip: float = 0.0
    swap: float = 0.0
    stale: float = 0.0
    """KV is changed, lands in the wrong place, does not land."""


@dataclass(slots=True)
class Link:
    weather: Weather = field(default_factory=Weather)
    last: float = 0.0
    """When the last message in line arrives."""
    held: list[Callable[[], None]] = field(default_factory=list)


CLEAR = Weather()


class Network:
    def __init__(self, clock: Clock, rng: Random, history: History, *, story: bool) -> None:
        """``story``: each message gets a record."""
        self._clock, self._rng, self._history, self._story = clock, rng, history, story
        self._links: dict[tuple[str, str], Link] = {}
        self._names: dict[Address, str] = {}
        self._senders: dict[str, Process] = {}
        self._processes: dict[Address, Process] = {}
        self._waiting: dict[Address, list[tuple[int, Any, Process | None]]] = {}
        self._number = 0
        self.codecs: dict[str, Decode] = {}
        """By name of the receiver: makes messages of bytes again. Where there is none they stay what they are."""
        self.struck: Counter[tuple[str, str, str]] = Counter()
        """How often what is wrong with a link (a field of its weather, source, target) has struck."""
        self.watch: Callable[[str, str, Any], None] | None = None
        """Told of each message before it leaves: by whom, for whom, which."""

    def bind(self, address: Address, process: Process) -> None:
        """``process`` listens there from now on."""
        self._processes[address] = process
        self._names[address] = process.name
        self._senders[process.name] = process
        for number, message, sender in self._waiting.pop(address, []):
            if sender is None or sender.alive:  # with its process a queue is gone
                self._clock.at(self._clock.now + RECONNECT, partial(self._arrive, address, number, message, sender))

    def unbind(self, address: Address, *, comes_back: bool) -> None:
        """Nobody listens there. ``comes_back``: another process will, and what is sent meanwhile waits for it."""
        self._processes.pop(address, None)
        if comes_back:
            self._waiting[address] = []

    def link(self, source: str, target: str) -> Link:
        link = self._links.get((source, target))
        if link is None:
            link = self._links[source, target] = Link()
        return link

    def weather(self, source: str, target: str) -> Weather:
        link = self._links.get((source, target))
        return CLEAR if link is None else link.weather

    def heal(self, source: str, target: str) -> None:
        """One cut is over; what it held goes on, in order."""
        link = self.link(source, target)
        link.weather.cut -= 1
        if not link.weather.cut:
            held, link.held = link.held, []
            for go in held:
                go()

    def send(self, source: str, to: Address, message: Any) -> None:
        target = self._names.get(to, to)
        if self.watch is not None:
            self.watch(source, target, message)
        self._number += 1
        number = self._number
        if self._story:
            self._tell(number, source, target, message)
        codec = self.codecs.get(target)
        if codec is not None:
            message = codec(encode(message))
        sender = self._senders.get(source)
        self._carry(source, target, number, lambda: self._arrive(to, number, message, sender))

    def send_data(self, source: str, target: str, process: Callable[[], Process | None], landing: Landing) -> None:
        """KV for a two-sided receiver."""
        self._number += 1

        def arrive() -> None:
            receiver = process()
            if receiver is not None:
                receiver.land(landing)

        self._carry(source, target, self._number, arrive)

    def strikes(self, what: str, source: str, target: str) -> None:
        """Bad weather has done something."""
        self.struck[what, source, target] += 1

    def _carry(self, source: str, target: str, number: int, arrive: Callable[[], None]) -> None:
        link = self.link(source, target)
        weather, rng, clock = link.weather, self._rng, self._clock
        if weather.cut:
            self.strikes("cut", source, target)
            if weather.holds:
                link.held.append(lambda: self._carry(source, target, number, arrive))
            else:
                self._drop(number, "cut")
            return
        if weather.loss and rng.random() < weather.loss:
            self.strikes("loss", source, target)
            self._drop(number, "lost")
            return
        arrival = clock.now + rng.uniform(*LATENCY)
        if weather.delay:
            self.strikes("delay", source, target)
            arrival += rng.random() * weather.delay
        if weather.astray and rng.random() < weather.astray:
            self.strikes("astray", source, target)
            clock.at(arrival + rng.random() * 0.3, arrive)
        else:
            link.last = max(link.last, arrival)
            clock.at(link.last, arrive)
        if weather.twice and rng.random() < weather.twice:
            self.strikes("twice", source, target)
            clock.at(arrival + rng.random() * 0.5, arrive)

    def _arrive(self, to: Address, number: int, message: Any, sender: Process | None) -> None:
        process = self._processes.get(to)
        if process is not None:
            if self._story:
                self._history.append(Delivered(self._clock.now, number))
            process.deliver(message)
        elif to in self._waiting and len(self._waiting[to]) < QUEUED:
            self._waiting[to].append((number, message, sender))
        else:
            self._drop(number, "nobody listens")

    def _drop(self, number: int, why: str) -> None:
        if self._story:
            self._history.append(Dropped(self._clock.now, number, why))

    def _tell(self, number: int, source: str, target: str, message: Any) -> None:
        request: RequestId | None = getattr(message, "request", None)
        attempt: Attempt | None = getattr(message, "attempt", None)
        chunks = getattr(message, "chunks", None)
        if chunks:
            request, attempt = chunks[0].request, chunks[0].attempt
        kind = type(message).__name__
        self._history.append(Sent(self._clock.now, number, source, target, kind, request, attempt))

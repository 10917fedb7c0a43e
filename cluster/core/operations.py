"""What people ask the controller for: draining, flipping and restarting, one rolling restart at a time.

A rolling restart takes one unit after the other. A worker's turn comes when another one of its role takes work; it is
drained, stopped, and started anew, and the next one's turn comes when it is ready. The router is restarted without
that: nothing is lost with it that others do not know. A gateway's replacement listens before it stops to.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.core.events import (
    Action,
    Done,
    Drain,
    DrainWanted,
    Flip,
    FlipWanted,
    Moved,
    Note,
    RestartWanted,
    Start,
    Stop,
    Undrain,
    UndrainWanted,
)
from cluster.core.units import NEVER, Kind, Phase, Unit

STOP_WITHIN = 20.0
"""Seconds that a unit gets to end in good order before it is killed."""
DRAIN_WITHIN = 600.0
"""Seconds that a worker gets to give away what it has: as long as the longest answers take."""
OTHER = {"prefill": "decode", "decode": "prefill"}


class Refused(Exception):
    """What was asked for cannot be done; the text says why, and what could."""


@dataclass(slots=True)
class Rollout:
    """A rolling restart under way."""

    ticket: int
    waiting: list[str]
    force: bool
    current: Unit | None = None
    before: int = 0
    """The current one's incarnation that is to go."""
    deaths: int = 0
    draining: bool = False
    deadline: float = NEVER
    said: set[str] = field(default_factory=set)


class Under(NamedTuple):
    """A drain or flip under way."""

    ticket: int
    incarnation: int
    what: str
    role: str


class Operations:
    """Changes the controller's units. ``advance`` after every event."""

    def __init__(self, units: Mapping[str, Unit]) -> None:
        self._units = units
        self._rollout: Rollout | None = None
        self._under: dict[str, Under] = {}

    @property
    def deadline(self) -> float:
        return NEVER if self._rollout is None else self._rollout.deadline

    def moves(self, unit: Unit) -> bool:
        """Whether it is being drained or flipped now."""
        rollout = self._rollout
        return unit.name in self._under or (rollout is not None and rollout.current is unit and rollout.draining)

    # Asked for

    def restart(self, wanted: RestartWanted, _now: float) -> list[Action]:
        if self._rollout is not None:
            raise Refused("a restart is under way; wait for its end")
        in_order = (Kind.WORKER, Kind.ROUTER, Kind.GATEWAY)
        every = [unit.name for kind in in_order for unit in self._units.values() if unit.kind is kind]
        for name in wanted.units or every:
            unit = self._find(name)
            if unit.kind is Kind.HEAD:
                raise Refused("Ray's head is restarted when it dies, and never else")
            if unit.kind is Kind.WORKER and not wanted.force and not self._others(unit, running=False):
                advice = "requests would have to wait until it is back; --force does it nevertheless"
                raise Refused(f"{name} is the only {unit.role} worker: {advice}")
        self._rollout = Rollout(wanted.ticket, list(wanted.units or every), wanted.force)
        return []

    def drain(self, wanted: DrainWanted, _now: float) -> list[Action]:
        unit = self._free(wanted.worker)
        if not self._others(unit, running=True):
            raise Refused(f"{unit.name} is the last {unit.role} worker that takes work: drain it when there is another")
        unit.drained = True
        self._under[unit.name] = Under(wanted.ticket, unit.incarnation, "drained", unit.role)
        return [Note(unit.name, "draining"), Drain(unit.name, unit.incarnation)]

    def undrain(self, wanted: UndrainWanted, _now: float) -> list[Action]:
        unit = self._worker(wanted.worker)
        if not unit.drained:
            raise Refused(f"{unit.name} is not drained")
        unit.drained = False
        actions: list[Action] = [Note(unit.name, "takes work again"), Undrain(unit.name, unit.incarnation)]
        under = self._under.pop(unit.name, None)
        if under is not None:
            actions.append(Done(under.ticket, "it was told to take work again"))
        return [*actions, Done(wanted.ticket, "")]

    def flip(self, wanted: FlipWanted, _now: float) -> list[Action]:
        unit = self._free(wanted.worker)
        role = OTHER.get(unit.role)
        if role is None:
            raise Refused(f"{unit.name} is a {unit.role} worker, which does prefill and decode already")
        if not self._others(unit, running=True):
            raise Refused(f"{unit.name} is the last {unit.role} worker that takes work: requests would have to wait")
        self._under[unit.name] = Under(wanted.ticket, unit.incarnation, f"a {role} worker now", role)
        return [Note(unit.name, f"becomes a {role} worker"), Flip(unit.name, unit.incarnation, role)]

    # Going on

    def moved(self, event: Moved, _now: float) -> list[Action]:
        unit, under, rollout = self._units[event.unit], self._under.get(event.unit), self._rollout
        if event.incarnation != unit.incarnation:
            return []
        if under is not None:
            del self._under[unit.name]
            if event.problem:
                unit.drained = False
                return [Note(unit.name, event.problem), Done(under.ticket, f"{unit.name}: {event.problem}")]
            unit.role = under.role
            return [Note(unit.name, under.what), Done(under.ticket, "")]
        if rollout is None or rollout.current is not unit or not rollout.draining:
            return [Note(unit.name, event.problem)] if event.problem else []
        if event.problem:
            return self._end(f"{unit.name} could not be drained: {event.problem}")
        rollout.draining = False
        return [Note(unit.name, "drained")]

    def advance(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for name, under in list(self._under.items()):
            unit = self._units[name]
            if unit.incarnation != under.incarnation or unit.phase is not Phase.RUNNING:
                del self._under[name]
                actions.append(Done(under.ticket, f"{name} died before that: {unit.cause}"))
        while self._rollout is not None:
            more = self._next(self._rollout, now)
            if more is None:
                break
            actions += more
        return actions

    def _next(self, rollout: Rollout, now: float) -> list[Action] | None:
        """What there is to do for the rolling restart; None: it has to wait."""
        unit = rollout.current
        if unit is None:
            return self._begin_next(rollout, now)
        if rollout.draining and unit.phase is Phase.RUNNING:
            if now < rollout.deadline:
                return None
            undrain = [] if unit.drained else [Undrain(unit.name, unit.incarnation)]
            return [*undrain, *self._end(f"{unit.name} was not drained within {DRAIN_WITHIN:.0f} s")]
        rollout.draining, rollout.deadline = False, NEVER
        if unit.incarnation == rollout.before and unit.phase is Phase.RUNNING and unit.kind is Kind.GATEWAY:
            unit.former = unit.incarnation  # on the same port, so that nobody is turned away
            unit.begin(now)
            unit.restarts += 1
            return [Note(unit.name, "starting another beside it"), Start(unit.name, unit.incarnation, unit.role)]
        if unit.incarnation == rollout.before and unit.phase is Phase.RUNNING:
            unit.move(Phase.STOPPING, now, now + STOP_WITHIN)
            return [Note(unit.name, "stopping"), Stop(unit.name, unit.incarnation)]
        if unit.incarnation > rollout.before and unit.phase is Phase.RUNNING:
            rollout.current = None
            return []
        if unit.incarnation > rollout.before and unit.deaths > rollout.deaths:
            return self._end(f"{unit.name} did not come back: {unit.cause}; it is tried again, the others are left")
        return None

    def _begin_next(self, rollout: Rollout, now: float) -> list[Action] | None:
        if not rollout.waiting:
            return self._end("")
        unit = self._units[rollout.waiting[0]]
        settled = unit.phase in (Phase.RUNNING, Phase.BACK_OFF)
        alone = unit.kind is Kind.WORKER and not rollout.force and not self._others(unit, running=True)
        if not settled or (alone and unit.phase is Phase.RUNNING):
            if unit.name in rollout.said:
                return None
            rollout.said.add(unit.name)
            return [
                Note(unit.name, f"waits for another {unit.role} worker" if alone else f"waits, for it is {unit.phase}")
            ]
        rollout.waiting.pop(0)
        rollout.current, rollout.before = unit, unit.incarnation
        if unit.phase is Phase.BACK_OFF:
            unit.deaths, unit.retry_at = 0, now
        rollout.deaths = unit.deaths
        if unit.kind is Kind.WORKER and unit.phase is Phase.RUNNING and not rollout.force:
            rollout.draining, rollout.deadline = True, now + DRAIN_WITHIN
            return [Note(unit.name, "draining"), Drain(unit.name, unit.incarnation)]
        return []

    def _end(self, problem: str) -> list[Action]:
        assert self._rollout is not None
        ticket, self._rollout = self._rollout.ticket, None
        return [Done(ticket, problem)]

    # Who

    def _others(self, unit: Unit, *, running: bool) -> list[Unit]:
        """Other workers that could do what ``unit`` does; ``running``: those that can at this moment."""
        return [
            other
            for other in self._units.values()
            if other is not unit and other.kind is Kind.WORKER and other.role == unit.role and not other.drained
            if not running or (other.phase is Phase.RUNNING and other.name not in self._under)
        ]

    def _find(self, name: str) -> Unit:
        unit = self._units.get(name)
        if unit is not None:
            return unit
        close = difflib.get_close_matches(name, self._units, n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(self._units)}"
        raise Refused(f"there is no {name!r}; {advice}")

    def _worker(self, name: str) -> Unit:
        unit = self._find(name)
        if unit.kind is not Kind.WORKER:
            raise Refused(f"{name} is no worker")
        return unit

    def _free(self, name: str) -> Unit:
        """A worker that runs, and of which nothing else is wanted now."""
        unit = self._worker(name)
        if unit.phase is not Phase.RUNNING:
            raise Refused(f"{name} does not run: it is {unit.phase}{f'; it died: {unit.cause}' if unit.cause else ''}")
        if unit.drained:
            raise Refused(f"{name} is drained; `baton drain {name} --undo` has it take work again")
        if name in self._under or (self._rollout is not None and self._rollout.current is unit):
            raise Refused(f"{name} is being moved already; wait for the end of that")
        return unit

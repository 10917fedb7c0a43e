"""The controller: what shall run, what does, and what is done about the difference. A unit's life here:

1. ``Begin``: every unit is started at once; the shell has each wait for what it needs of the others.
2. ``Ready``. Once ``Up`` has said that all work together, nothing is given up any more: what dies is started again.
3. A process dies: the router is told of a worker's or gateway's death before anything else. A worker's other ranks end
   by themselves, or are killed soon. When nothing is left, the unit waits as long as its back-off says, and is started.
4. Ray's head is a unit like any other, but while it is away none can be started: those that are due wait for it.
5. Asked to (``operations.py``), a unit is stopped in good order and started anew: that counts as no death.
"""

from collections.abc import Iterable
from typing import Any

from cluster.core.events import (
    Action,
    Begin,
    Died,
    Drain,
    DrainWanted,
    Event,
    Failed,
    FlipWanted,
    GiveUp,
    Gone,
    Kill,
    Moved,
    Note,
    Ready,
    RestartWanted,
    Retire,
    Start,
    TellDied,
    Tick,
    Undrain,
    UndrainWanted,
    Up,
)
from cluster.core.operations import Operations
from cluster.core.units import START_WITHIN, Kind, Phase, Status, Unit
from runtime.core.actions import WakeAt

KILL_EVERY = 5.0
"""Seconds from one attempt to kill what has to go to the next."""
END_WITHIN = 2.0
"""Seconds from the death of one rank to the end of its worker's other ranks, which are killed then."""


class Controller:
    """``handle(event, now)``; ``now`` never goes back. Raises ``Refused`` where what people ask for cannot be done."""

    def __init__(self, units: Iterable[Unit]) -> None:
        """``units`` have not been started yet, but for Ray's head, which is there."""
        self._units = {unit.name: unit for unit in units}
        self._operations = Operations(self._units)
        self._up = False
        self._untold: list[TellDied] = []
        """Deaths while there was no router to tell."""
        self._handlers: dict[type[Any], Any] = {
            Begin: self._begin,
            Up: self._now_up,
            Ready: self._ready,
            Failed: self._failed,
            Died: self._died,
            Gone: self._gone,
            Tick: lambda _event, _now: [],
            RestartWanted: self._operations.restart,
            DrainWanted: self._operations.drain,
            UndrainWanted: self._operations.undrain,
            FlipWanted: self._operations.flip,
            Moved: self._operations.moved,
        }

    def handle(self, event: Event, now: float) -> list[Action]:
        actions: list[Action] = self._handlers[type(event)](event, now)
        actions += self._operations.advance(now)
        actions += self._due(now)
        wake = min([*(self._wake(unit) for unit in self._units.values()), self._operations.deadline])
        return [*actions, WakeAt(wake)]

    def status(self, now: float) -> list[Status]:
        """Of every unit, in the order in which they were given."""
        return [unit.status(now) for unit in self._units.values()]

    def check_integrity(self) -> None:
        for unit in self._units.values():
            assert unit.alive <= set(unit.processes), f"{unit.name} has processes that are none of its own"
            assert bool(unit.alive) or unit.phase in (Phase.BACK_OFF, Phase.ENDING), f"{unit.name} is {unit.phase}"
            assert not unit.alive or unit.phase is not Phase.BACK_OFF, f"{unit.name} waits, and {unit.alive} live"

    # A unit's life

    def _begin(self, _event: Begin, now: float) -> list[Action]:
        for unit in self._units.values():
            if unit.kind is Kind.HEAD:
                unit.begin(now)
                unit.move(Phase.RUNNING, now)
        return []

    def _now_up(self, _event: Up, _now: float) -> list[Action]:
        self._up = True
        return []

    def _ready(self, event: Ready, now: float) -> list[Action]:
        unit = self._units[event.unit]
        if event.incarnation != unit.incarnation or unit.phase is not Phase.STARTING:
            return []
        unit.move(Phase.RUNNING, now)
        actions: list[Action] = [Note(unit.name, "ready")]
        if unit.former is not None:
            actions.append(Retire(unit.name, unit.former))
            unit.former = None
        if unit.kind is Kind.ROUTER:
            actions += self._untold
            self._untold.clear()
            actions += [self._standing(each) for each in self._units.values() if self._settled(each)]
        elif unit.drained:
            actions.append(Drain(unit.name, unit.incarnation))
        return actions

    def _failed(self, event: Failed, now: float) -> list[Action]:
        unit = self._units[event.unit]
        if event.incarnation != unit.incarnation or unit.phase is not Phase.STARTING:
            return []
        if not self._up:
            return [GiveUp(event.cause)]
        return [Note(unit.name, f"did not start: {event.cause}"), *self._end(unit, event.cause, now, at_once=True)]

    def _died(self, event: Died, now: float) -> list[Action]:
        unit = self._units[event.unit]
        if event.incarnation != unit.incarnation or event.process not in unit.alive:
            return []
        wanted = unit.phase is Phase.STOPPING
        note = Note(event.process, "has ended" if wanted else f"died: {event.cause}")
        if not self._up:
            return [note, GiveUp(f"{event.process} died: {event.cause}")]
        unit.alive.remove(event.process)
        actions: list[Action] = []
        if unit.phase in (Phase.STARTING, Phase.RUNNING):
            one_of_several = event.process != unit.processes[0]
            cause = f"{event.process} died: {event.cause}" if one_of_several else event.cause
            actions += self._tell(unit, cause)
            actions += self._end(unit, cause, now, at_once=unit.phase is Phase.STARTING)
        actions.append(note)
        if not unit.alive:
            actions += self._over(unit, now)
        return actions

    def _tell(self, unit: Unit, cause: str) -> list[Action]:
        if unit.kind not in (Kind.WORKER, Kind.GATEWAY):
            return []
        told = TellDied(unit.name, unit.incarnation, cause)
        if all(each.phase is Phase.RUNNING for each in self._units.values() if each.kind is Kind.ROUTER):
            return [told]
        self._untold.append(told)
        return []

    def _end(self, unit: Unit, cause: str, now: float, *, at_once: bool) -> list[Action]:
        """Something of it is dead, so all of it has to go."""
        unit.count_death(now, cause)
        unit.move(Phase.ENDING, now, now if at_once else now + END_WITHIN)
        if unit.kind is Kind.HEAD:
            return [Note(unit.name, "what runs goes on without it; nothing can be started until it is back")]
        return []

    def _gone(self, event: Gone, now: float) -> list[Action]:
        unit = self._units[event.unit]
        if event.incarnation != unit.incarnation or unit.phase not in (Phase.STOPPING, Phase.ENDING):
            return []
        return self._over(unit, now)

    def _over(self, unit: Unit, now: float) -> list[Action]:
        """Nothing of it is left."""
        unit.alive.clear()
        if unit.phase is Phase.STOPPING:
            unit.retry_at = now
        unit.move(Phase.BACK_OFF, now)
        delay = unit.retry_at - now
        return [Note(unit.name, f"back-off: is started again in {delay:.1f} s")] if delay > 0 else []

    # Time

    def _wake(self, unit: Unit) -> float:
        if unit.phase is Phase.BACK_OFF:
            return unit.retry_at if self._can_start(unit) else float("inf")
        return unit.deadline

    def _due(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for unit in self._units.values():
            if unit.phase is Phase.BACK_OFF:
                if now >= unit.retry_at and self._can_start(unit):
                    actions += self._start(unit, now)
            elif now >= unit.deadline:
                actions += self._late(unit, now)
        return actions

    def _late(self, unit: Unit, now: float) -> list[Action]:
        actions: list[Action] = []
        if unit.phase is Phase.STARTING:
            cause = f"it did not start within {START_WITHIN:.0f} s"
            if not self._up:
                return [GiveUp(f"{unit.name}: {cause}")]
            actions += [Note(unit.name, cause), *self._end(unit, cause, now, at_once=True)]
        unit.deadline = now + KILL_EVERY
        return [*actions, Kill(unit.name, unit.incarnation)]

    def _can_start(self, unit: Unit) -> bool:
        heads = [each for each in self._units.values() if each.kind is Kind.HEAD]
        return unit.kind is Kind.HEAD or all(head.phase is Phase.RUNNING for head in heads)

    def _start(self, unit: Unit, now: float) -> list[Action]:
        unit.begin(now)
        again: list[Action] = []
        if unit.incarnation > 1:
            unit.restarts += 1
            again.append(Note(unit.name, "starting again"))
        return [*again, Start(unit.name, unit.incarnation, unit.role)]

    def _started(self, unit: Unit, now: float) -> None:
        unit.incarnation += 1
        unit.alive = set(unit.processes)
        unit.move(Phase.STARTING, now, now + START_WITHIN)

    def _settled(self, unit: Unit) -> bool:
        """A worker of which nothing is wanted that is not told to each router anyway."""
        return unit.kind is Kind.WORKER and unit.phase is Phase.RUNNING and not self._operations.moves(unit)

    def _standing(self, worker: Unit) -> Action:
        """What a new router is told, which believes the worker, which may not have heard of the last change."""
        return (Drain if worker.drained else Undrain)(worker.name, worker.incarnation)

"""A unit is what starts and ends as a whole: Ray's head, the router, a gateway, a worker with all of its ranks."""

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

NEVER = float("inf")
START_WITHIN = 600.0
"""Seconds for loading a model."""


class Kind(enum.StrEnum):
    HEAD = "head"
    """Ray's, without which no process can be started; those that run go on."""
    ROUTER = "router"
    GATEWAY = "gateway"
    WORKER = "worker"


class Phase(enum.StrEnum):
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    """It was asked to end."""
    ENDING = "ending"
    """One of its processes is dead; the others end by themselves, or are killed."""
    BACK_OFF = "back-off"
    """Nothing is left of it; it is started again when its time has come."""


_MOVES = {
    Phase.STARTING: {Phase.RUNNING, Phase.ENDING},
    Phase.RUNNING: {Phase.STARTING, Phase.STOPPING, Phase.ENDING},
    Phase.STOPPING: {Phase.BACK_OFF},
    Phase.ENDING: {Phase.BACK_OFF},
    Phase.BACK_OFF: {Phase.STARTING},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BackOff:
    """When what died is started again, as Kubernetes does it (CrashLoopBackOff): at once after its first death, then
    after a delay that doubles with each further one, until it was healthy for a while."""

    at_once: float = 0.0
    """Seconds after the first death."""
    first: float = 0.5
    """Seconds after the second."""
    most: float = 60.0
    reset_after: float = 60.0
    """Seconds of health after which a death counts as the first."""

    def delay(self, deaths: int) -> float:
        """Seconds from the ``deaths``-th death in a row to the next start."""
        return self.at_once if deaths <= 1 else min(self.most, self.first * 2.0 ** min(deaths - 2, 64))


class Status(NamedTuple):
    """What people are shown of a unit."""

    name: str
    kind: Kind
    phase: Phase
    seconds: float
    """In this phase."""
    restarts: int
    retry_in: float | None
    """Seconds to its next start; None in other phases than back-off."""
    cause: str
    """Of its last death; empty if it never died."""
    drained: bool
    """It is to take no new work."""


@dataclass(slots=True, kw_only=True)
class Unit:
    """One unit, in its newest incarnation."""

    name: str
    kind: Kind
    processes: tuple[str, ...]
    """Its processes' names, the one that leads first."""
    back_off: BackOff
    role: str = ""
    """Of a worker: what it registers as."""
    incarnation: int = 0
    former: int | None = None
    """An older incarnation that serves until this one does."""
    phase: Phase = Phase.BACK_OFF
    since: float = 0.0
    deadline: float = NEVER
    """When something is done about it if nothing happens until then."""
    alive: set[str] = field(default_factory=set)
    """Processes of this incarnation that are not known to be dead."""
    retry_at: float = 0.0
    """When it may be started again."""
    deaths: int = 0
    """In a row."""
    restarts: int = 0
    cause: str = ""
    drained: bool = False

    def move(self, phase: Phase, now: float, deadline: float = NEVER) -> None:
        assert phase in _MOVES[self.phase], f"{self.name} cannot go from {self.phase} to {phase}; last: {self.cause}"
        self.phase, self.since, self.deadline = phase, now, deadline

    def begin(self, now: float) -> None:
        """The next incarnation."""
        self.incarnation += 1
        self.alive = set(self.processes)
        self.move(Phase.STARTING, now, now + START_WITHIN)

    def count_death(self, now: float, cause: str) -> None:
        """One that nobody asked for; ``retry_at`` is set by it."""
        if self.phase is Phase.RUNNING and now - self.since >= self.back_off.reset_after:
            self.deaths = 0
        self.deaths += 1
        self.cause = cause
        self.retry_at = now + self.back_off.delay(self.deaths)

    def status(self, now: float) -> Status:
        waits = self.phase is Phase.BACK_OFF
        return Status(
            name=self.name,
            kind=self.kind,
            phase=self.phase,
            seconds=now - self.since,
            restarts=self.restarts,
            retry_in=max(0.0, self.retry_at - now) if waits else None,
            cause=self.cause,
            drained=self.drained,
        )

"""Which fault comes next, and where: by seed, number and who is there to be hit."""

from collections.abc import Callable, Iterable, MutableSequence, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, TypeVar


class Kind(StrEnum):
    KILL = "kill"
    """SIGKILL."""
    STOP = "stop"
    """SIGSTOP, and SIGCONT some seconds later."""
    CUT = "cut"
    """KV that a worker pushes is lost; half of the times the sender is told. For requests it is as if it were dead."""
    SLOW = "slow"
    """KV that a worker pushes takes long."""
    CORRUPT = "corrupt"
    """KV that a worker pushes arrives with flipped bits, swapped, twice, or not at all."""
    HEAD = "head"
    """SIGKILL of Ray's own head, which is not started again for a minute."""

    @property
    def of_links(self) -> bool:
        return self in (Kind.CUT, Kind.SLOW, Kind.CORRUPT)


STOP_SECONDS = (1.0, 10.0)
LINK_SECONDS = (1.0, 4.0)
HEAD_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Victim:
    """A process that faults may hit."""

    name: str
    role: str
    """``prefill``, ``decode``, ``colocated``, ``router``, ``gateway`` or ``head``."""
    usable: bool
    """It serves, and no fault holds it."""
    restarts: bool = False
    """Whether somebody starts it anew when it is dead, so that the cluster may do without it for a while."""
    sends: bool = False
    """Whether KV leaves it, so that its links can be bad."""


@dataclass(frozen=True, slots=True)
class Fault:
    number: int
    """From 0."""
    kind: Kind
    victim: str
    seconds: float = 0.0
    """How long it lasts; a kill takes no time."""
    silent: bool = False
    """Of a cut: the sender is not told."""


T = TypeVar("T")


class Rng(Protocol):
    """What is wanted of a ``random.Random``."""

    def random(self) -> float: ...
    def uniform(self, a: float, b: float) -> float: ...
    def choice(self, seq: Sequence[T]) -> T: ...
    def shuffle(self, x: MutableSequence[Any]) -> None: ...


@dataclass(slots=True)
class Planner:
    """One seed is one sequence of faults, for the same victims."""

    kinds: Sequence[Kind]
    rng: Callable[[int], Rng]
    """Of the fault with this number."""
    _deck: list[Kind] = field(default_factory=list)
    _number: int = 0

    def next(self, victims: Iterable[Victim]) -> Fault | None:
        """A fault that leaves somebody to do the work, of a kind whose turn it is; None where there is none."""
        number, self._number = self._number, self._number + 1
        rng = self.rng(number)
        fresh = list(self.kinds)
        rng.shuffle(fresh)
        known = sorted(victims, key=lambda victim: victim.name)
        for kind in self._deck or fresh:
            if possible := _victims(kind, known):
                self._deck = [other for other in self._deck or fresh if other is not kind]
                return _fault(number, kind, rng.choice(possible), rng)
        for kind in fresh:  # those whose turn it is have to wait
            if possible := _victims(kind, known):
                self._deck = list(dict.fromkeys([*self._deck, *(other for other in fresh if other is not kind)]))
                return _fault(number, kind, rng.choice(possible), rng)
        return None


def _victims(kind: Kind, known: Sequence[Victim]) -> list[Victim]:
    return [victim for victim in known if _may_hit(kind, victim, known)]


def _may_hit(kind: Kind, victim: Victim, known: Sequence[Victim]) -> bool:
    if not victim.usable or (kind is Kind.HEAD) != (victim.role == "head"):
        return False
    if kind is Kind.HEAD:
        return True  # whatever is on its way does without it
    if kind.of_links and not victim.sends:
        return False
    if kind in (Kind.SLOW, Kind.CORRUPT):
        return True
    if victim.role == "router":
        return victim.restarts  # streams do without it for a while
    if victim.role == "gateway" and kind is not Kind.KILL:
        return False  # one that stands still holds its clients up, and nobody else could know
    return any(other.role == victim.role and other.usable and other is not victim for other in known)


def _fault(number: int, kind: Kind, victim: Victim, rng: Rng) -> Fault:
    seconds = HEAD_SECONDS if kind is Kind.HEAD else 0.0
    if kind not in (Kind.KILL, Kind.HEAD):
        seconds = round(rng.uniform(*(STOP_SECONDS if kind is Kind.STOP else LINK_SECONDS)), 2)
    return Fault(number, kind, victim.name, seconds, silent=kind is Kind.CUT and rng.random() < 0.5)

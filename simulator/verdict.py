"""The promises that a history is held to, and what comes of it.

The numbers are those of the failure table: seconds, for 99 of 100 and for all.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from messages.common import Role
from messages.ids import RequestId
from messages.sampling import FinishReason
from simulator.history import Asked


class Invariant(StrEnum):
    """What must hold, whatever happened. The first seven are numbered in the promises."""

    ONE_END = "each request ends once"
    CONTIGUOUS = "no gap, no repeat"
    ACCOUNTED = "every block is accounted for and has a live owner"
    FENCED = "nothing of a superseded attempt or epoch is delivered"
    USAGE = "usage is what was delivered"
    NO_CRASH = "no exception is unhandled"
    NO_ERROR = "no error while there is spare capacity"
    SAME_TOKENS = "the answer is the one without faults"
    OWN_BLOCKS = "only verified blocks of its own are read, only promised ones written"
    LEDGER = "the router knows what is placed"
    DETECTED = "a fault is detected in time, and only a fault"
    RESUMED = "a stream goes on in time"
    FREED = "what nobody wants is freed in time"
    TYPED_ERROR = "an error has a type, and comes in time"


class Bound(NamedTuple):
    """Seconds."""

    p99: float
    hard: float


class Fault(StrEnum):
    """What befell a worker of a request; each has its own bounds."""

    PREFILL_CRASH = "prefill crash"
    DECODE_CRASH = "decode crash"
    HANG = "hang"
    CUT = "cut"
    DRAIN = "drain"


_DETECT_CRASH, _DETECT_HANG = Bound(0.5, 1.0), Bound(2.0, 3.0)
_RESUME = {
    Fault.PREFILL_CRASH: Bound(1.0, 2.0),
    Fault.DECODE_CRASH: Bound(1.5, 3.0),
    Fault.HANG: Bound(4.0, 4.0),
    Fault.CUT: Bound(4.0, 4.0),
    Fault.DRAIN: Bound(2.0, 2.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Seconds where nothing else is said."""

    detect_crash: Bound = _DETECT_CRASH
    detect_hang: Bound = _DETECT_HANG
    """Also a worker that the router hears no more."""
    resume: dict[Fault, Bound] = field(default_factory=lambda: dict(_RESUME))
    """From the fault to the next token, without ``compute``."""
    compute: float = 0.0
    """What prefilling the longest prompt again may take, its wait in the queue counted in."""
    silence: float = 4.0
    """Of a stream while there is spare capacity, without ``compute``."""
    stall: float = 30.0
    """Of a stream while there is too much to do."""
    error: float = 5.0
    """From the moment at which nothing can serve a request to its error."""
    freed: float = 2.0
    """From the end, by whomever, to the last block."""
    orphaned: float = 12.0
    """The same where the gateway died: others have a while to adopt its streams."""
    lease: float = 160.0
    """The same where the words of two that would have told it were lost."""
    attach: float = 2.0
    """From a client's coming to another gateway to the first that it hears there."""
    settled: float = 1.0
    """After which a process that has started is known to the others."""
    rebuilt: float = 3.0
    """Until a new router knows what its predecessor had placed."""
    max_attempts: int = 5
    """After which a gateway may give up, if each met a fault."""
    spare: float = 0.5
    """Up to this part of what the able decode workers hold, the load leaves capacity to spare."""
    needed: tuple[Role, ...] = (Role.PREFILL, Role.DECODE)
    """Roles without any of which no request can be served."""
    logprobs: float = 0.0
    """By which a log-probability may differ from that of the run without faults."""


class Answer(NamedTuple):
    """What the run without faults delivers."""

    tokens: tuple[int, ...] | None
    """None where only the text is known."""
    reason: FinishReason | None
    logprobs: tuple[float, ...] | None = None
    text: str | None = None
    status: int = 200
    """Any other: the request has to be refused with it."""


Truth = Callable[[Asked], Answer]


class Violation(NamedTuple):
    invariant: Invariant
    at: float
    detail: str
    request: RequestId | None = None

    def __str__(self) -> str:
        whose = f" {self.request}" if self.request is not None else ""
        return f"{self.at:.3f}{whose}: {self.invariant}: {self.detail}"


@dataclass(slots=True)
class Times:
    """Seconds that something took, each time; only where one fault came alone and capacity was left."""

    detect: dict[str, list[float]] = field(default_factory=dict)
    """By ``crash``, ``hang`` and ``cut``."""
    resume: dict[Fault, list[float]] = field(default_factory=dict)
    """Compute counted in."""

    def add(self, other: "Times") -> None:
        for kind, seconds in other.detect.items():
            self.detect.setdefault(kind, []).extend(seconds)
        for fault, seconds in other.resume.items():
            self.resume.setdefault(fault, []).extend(seconds)

    def broken(self, bounds: Bounds) -> list[str]:
        """The bounds for 99 of 100 that these do not keep."""
        wanted = [
            ("detect", kind, seconds, (bounds.detect_crash if kind == "crash" else bounds.detect_hang).p99)
            for kind, seconds in self.detect.items()
        ]
        wanted += [
            ("resume", fault, seconds, bounds.resume[fault].p99 + bounds.compute)
            for fault, seconds in self.resume.items()
        ]
        return [
            f"time to {what} ({kind}): p99 of {len(seconds)} is {quantile(seconds, 0.99):.3f} s, not {bound:g} s"
            for what, kind, seconds, bound in wanted
            if quantile(seconds, 0.99) > bound
        ]


def quantile(values: Iterable[float], part: float) -> float:
    """The smallest value that ``part`` of all do not exceed; NaN of none."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    return ordered[max(0, -int(-part * len(ordered) // 1) - 1)]


@dataclass(slots=True)
class Verdict:
    violations: list[Violation] = field(default_factory=list)
    times: Times = field(default_factory=Times)
    requests: int = 0
    faults: int = 0
    resumes: int = 0
    """Attempts after the first."""
    late_tokens: int = 0
    """Of superseded attempts, that reached a gateway; none of them was delivered unless a violation says so."""
    lost: int = 0
    """Requests whose client did not get all of its answer, and was not told in time that there is no capacity."""
    repeated: int = 0
    """Tokens that a client got twice."""
    leaked: int = 0
    """Blocks that were held when nobody wanted anything."""

    @property
    def clean(self) -> bool:
        return not self.violations

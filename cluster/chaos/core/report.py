"""What a chaos run found: figures and a verdict, from what was noted while it ran."""

import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.chaos.core.answers import Verdict
from cluster.chaos.core.faults import Fault, Kind
from cluster.chaos.core.figures import percentile, slope

REACTION = 0.3
"""Seconds after a fault in which what was under way may still come."""
WARM_UP = 120.0
"""Seconds of load, and of a process's life, in which caches fill up; memory is judged from then on."""
LEAST_SPAN = 300.0
"""Seconds that memory must have been watched for after that, to be judged: over less, a cache that still fills and the
grain of what allocators take are as steep as a leak."""
FLOOR_OF = 60.0
"""Seconds of which the least counts: what steps work with comes and goes, some 10 MB in a prefill worker, and twice in
that time a process gives back what it does not use."""
MOST_GROWTH = 0.5
"""MB a minute: a process whose memory grows faster leaks."""
EXAMPLES = 20
"""Streams that went wrong and are told of."""


@dataclass(slots=True)
class Strike:
    """A fault that was put in. Times are seconds of the monotonic clock."""

    fault: Fault
    role: str
    began: float
    epoch: int = 0
    """Of the process that was hit."""
    ended: float | None = None
    detected: float | None = None
    """When the router took the worker for lost."""
    restarted: float | None = None
    """When another incarnation served."""


@dataclass(slots=True)
class Resume:
    """A stream that paused because of a fault, and went on."""

    at: float
    """When it went on."""
    seconds: float
    """Since the fault."""
    kind: Kind
    role: str


@dataclass(slots=True)
class Tally:
    """What became of the streams; holds no more than what is told of them."""

    verdicts: Counter[Verdict] = field(default_factory=Counter)
    resumes: int = 0
    refusals: int = 0
    attached: int = 0
    """How often a client went on with its stream after its connection had broken."""
    headless: int = 0
    """Streams that were under way, or began, while Ray's head was gone."""
    pauses: list[float] = field(default_factory=list)
    """The longest of each stream."""
    resumed: list[Resume] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    """Streams that did not end as they should, in words."""

    def add(
        self,
        verdict: Verdict,
        attempts: int,
        refusals: int,
        longest_pause: float,
        story: str,
        resumed: Iterable[Resume],
    ) -> None:
        self.verdicts[verdict] += 1
        self.resumes += attempts - 1
        self.refusals += refusals
        self.pauses.append(longest_pause)
        self.resumed += resumed
        if verdict is not Verdict.SAME and len(self.bad) < EXAMPLES:
            self.bad.append(f"{verdict.value}: {story}")


@dataclass(slots=True)
class Memory:
    """Private memory of one incarnation of a process: seconds since the load began, and bytes."""

    name: str
    pid: int
    times: Sequence[float]
    bytes: Sequence[int]

    @property
    def growth(self) -> float:
        """MB a minute after the warm-up; NaN where it was not watched for long enough."""
        if self.watched < LEAST_SPAN:
            return math.nan
        floors = self._floors()
        return slope([at for at, _ in floors], [size for _, size in floors]) * 60 / 1e6

    @property
    def watched(self) -> float:
        """Seconds after the warm-up."""
        points = self._warm()
        return points[-1][0] - points[0][0] if points else 0.0

    def _floors(self) -> list[tuple[float, int]]:
        """The least of each whole minute after the warm-up, and when that was."""
        warm = self._warm()
        minutes = int(self.watched // FLOOR_OF)
        least: list[tuple[float, int]] = [(0.0, sys.maxsize)] * minutes
        for at, size in warm:
            minute = int((at - warm[0][0]) // FLOOR_OF)
            if minute < minutes and size < least[minute][1]:
                least[minute] = (at, size)
        return [floor for floor in least if floor[1] < sys.maxsize]

    def _warm(self) -> list[tuple[float, int]]:
        begin = WARM_UP + max(0.0, self.times[0] if self.times else 0.0)
        return [(at, size) for at, size in zip(self.times, self.bytes, strict=True) if at >= begin]


@dataclass(slots=True, kw_only=True)
class Report:
    """``ok`` unless something was lost, repeated, leaked or wrong, or memory grows, or nothing was tried."""

    topology: str
    seed: int
    every: float
    concurrency: int
    began: float
    """Seconds of the monotonic clock; times in the series below are since then."""
    seconds: float
    strikes: list[Strike]
    skipped: int
    """Faults for which nobody could be hit without leaving nobody to do the work."""
    tally: Tally
    tokens: int
    tokens_per_second: list[tuple[float, float]]
    leaked: list[str]
    """What is still held, or open, when everything is over."""
    left_out: list[str]
    """Requests whose answers differ even without a fault."""
    violations: list[str]
    """What the checker says of the history."""
    memory: list[Memory]

    def count(self, verdict: Verdict) -> int:
        return self.tally.verdicts[verdict]

    @property
    def judged(self) -> list[tuple[Memory, float]]:
        """Those that were watched for long enough, and MB a minute."""
        growths = [(each, each.growth) for each in self.memory]
        return [(each, growth) for each, growth in growths if not math.isnan(growth)]

    @property
    def growing(self) -> list[str]:
        """Whose memory grows, in words."""
        return [
            f"{each.name} (pid {each.pid}) grows by {growth:.2f} MB a minute, seen for {each.watched:.0f} s"
            for each, growth in self.judged
            if growth >= MOST_GROWTH
        ]

    @property
    def problems(self) -> list[str]:
        """What makes it fail, in words, but for the checker's complaints."""
        return [*self.leaked, *self.growing, *self.tally.bad]

    @property
    def ok(self) -> bool:
        wrong = (
            self.leaked
            or self.growing
            or self.violations
            or any(self.count(each) for each in Verdict if each is not Verdict.SAME)
        )
        return not wrong and bool(self.strikes) and self.count(Verdict.SAME) > 0

    @property
    def faults(self) -> dict[str, int]:
        return dict(Counter(strike.fault.kind.value for strike in self.strikes))

    def detections(self, kind: Kind) -> list[float]:
        """Seconds from a fault to the router's knowing it."""
        return [
            strike.detected - strike.began
            for strike in self.strikes
            if strike.fault.kind is kind and strike.detected is not None
        ]

    def resumes(self, kind: Kind) -> list[float]:
        return [resume.seconds for resume in self.tally.resumed if resume.kind is kind]

    def to_json(self) -> dict[str, Any]:
        verdicts = {verdict.value: self.count(verdict) for verdict in Verdict}
        streams = {"streams": sum(self.tally.verdicts.values())} | verdicts
        run = {"topology": self.topology, "seed": self.seed, "every": self.every, "concurrency": self.concurrency}
        return run | {
            "ok": self.ok,
            "seconds": round(self.seconds, 1),
            "faults": self.faults,
            "skipped": self.skipped,
            **streams,
            "tokens": self.tokens,
            "resumes": self.tally.resumes,
            "refusals": self.tally.refusals,
            "attached": self.tally.attached,
            "headless": self.tally.headless,
            "leaked": self.leaked,
            "left_out": self.left_out,
            "violations": self.violations,
            "bad": self.tally.bad,
            "detect_seconds": {kind.value: _spread(self.detections(kind)) for kind in (Kind.KILL, Kind.STOP)},
            "resume_seconds": {kind.value: _spread(self.resumes(kind)) for kind in (Kind.KILL, Kind.STOP)},
            "pause_seconds": _spread(self.tally.pauses),
            "restart_seconds": _spread([each.restarted - each.began for each in self.strikes if each.restarted]),
            "growing": self.growing,
            "memory_mb_per_minute": {f"{each.name} ({each.pid})": round(growth, 3) for each, growth in self.judged},
            "strikes": [self._strike(strike) for strike in self.strikes],
        }

    def _strike(self, strike: Strike) -> dict[str, Any]:
        fault = strike.fault
        return {
            "number": fault.number,
            "at": round(strike.began - self.began, 2),
            "kind": fault.kind.value,
            "victim": fault.victim,
            "seconds": fault.seconds,
            "detected_after": None if strike.detected is None else round(strike.detected - strike.began, 3),
        }


def _spread(values: Sequence[float]) -> dict[str, float | int]:
    if not values:
        return {"count": 0}
    named = {"p50": percentile(values, 50), "p99": percentile(values, 99), "max": max(values)}
    return {"count": len(values)} | {name: round(value, 4) for name, value in named.items()}


def resumes_of(pauses: Sequence[tuple[float, float]], attempts: int, strikes: Sequence[Strike]) -> list[Resume]:
    """Which of a stream's ``pauses`` (begin, length) a death or a stop has caused: those that it falls into, the
    longest first, as many as there were further attempts. A pause belongs to the first fault that falls into it."""
    resumed = []
    for begin, length in sorted(pauses, key=lambda pause: -pause[1])[: attempts - 1]:
        for strike in strikes:
            struck = strike.fault.kind in (Kind.KILL, Kind.STOP)
            if struck and begin - REACTION <= strike.began <= begin + length:
                resumed.append(Resume(begin + length, begin + length - strike.began, strike.fault.kind, strike.role))
                break
    return resumed


def unexplained(cuts: Sequence[tuple[float, str]], strikes: Sequence[Strike]) -> list[str]:
    """The processes of those ``cuts`` (when, and whose connection broke) that had not just been killed."""
    return [
        name
        for at, name in cuts
        if not any(
            strike.fault.kind is Kind.KILL
            and strike.fault.victim == name
            and strike.began <= at <= (at if strike.restarted is None else strike.restarted + REACTION)
            for strike in strikes
        )
    ]


HOLDINGS = ("held", "legs", "handoffs", "deliveries", "runs", "reservations", "placed", "waiting")
"""Of ``inspect()``: what a request holds while it is under way, in a worker or in the router."""


def held(figures: dict[str, dict[str, int]]) -> list[str]:
    """What is not given back, in words."""
    found = []
    for name, counts in figures.items():
        found += [f"{name}: {what} {counts[what]}" for what in HOLDINGS if counts.get(what)]
        total = counts.get("total")
        if total is not None and counts["free"] + counts["held"] + counts["cached"] != total:
            found.append(f"{name}: blocks do not add up to {total}")
    return found

"""What befell the processes: whether the router found out in time, and took nobody for lost who was not."""

from simulator.history import (
    Crashed,
    Cut,
    DeclaredLost,
    Draining,
    Frozen,
    Healed,
    Incarnation,
    Injected,
    Killed,
    Started,
    Stopped,
    Thawed,
)
from simulator.judges.case import Case
from simulator.judges.health import NEVER, Misfortune
from simulator.judges.waits import Waits
from simulator.verdict import Fault, Invariant

LOSSY = "lose"
"""The injected fault by which messages get lost for good; the others delay, repeat or spoil them."""


class Faults:
    """``started`` and the others: one for each kind of record."""

    def __init__(self, case: Case, waits: Waits) -> None:
        self._case = case
        self._waits = waits
        self._due: dict[Incarnation, tuple[str, float]] = {}
        """What the router has to find: which kind of fault, and since when."""
        self._again: dict[Incarnation, float] = {}
        """Those that stood still, or were taken for lost: when they went on, and could say so (infinite until then).
        Such a one is not known at once: it has to register, and may have taken its own standstill for a slow step."""
        self.routers: dict[Incarnation, float] = {}
        """When each was ready."""
        self.lossy_until = -NEVER
        """Until when messages could get lost."""
        self.unheard: dict[str, set[str]] = {}
        """By receiver: those of whose messages to it some may have been lost."""

    def started(self, record: Started) -> None:
        self._take(record)
        if record.kind == "router":
            self.routers.setdefault(record.process, record.at)
            self._due.clear()

    def stopped(self, record: Stopped) -> None:
        self._take(record)
        self._gone(record.process)

    def killed(self, record: Killed) -> None:
        known = self._is_known(record.process)
        self._waits.hit(record.process, Fault.DECODE_CRASH)
        self._take(record)
        if known:
            self._due[record.process] = ("crash", record.at)
        self._gone(record.process)

    def frozen(self, record: Frozen) -> None:
        known = self._is_known(record.process)
        self._waits.hit(record.process, Fault.HANG)
        self._take(record)
        if known:
            self._due[record.process] = ("hang", record.at)
        if self._case.health.kind(record.process.name) == "router":
            self._due.clear()  # it finds nothing now, and what was silent meanwhile is owed no verdict

    def thawed(self, record: Thawed) -> None:
        self._take(record)
        self._no_longer_due(record.process, "hang")
        self._is_back(record.process)

    def cut(self, record: Cut) -> None:
        health = self._case.health
        source, target = health.now(record.source), health.now(record.target)
        known = source is not None and health.kind(record.target) == "router" and self._is_known(source)
        for process, other in ((source, record.target), (target, record.source)):
            if process is not None and health.kind(process.name) == "worker":
                self._waits.hit(process, Fault.CUT, other)
        self._take(record)
        self.unheard.setdefault(record.target, set()).add(record.source)
        if known and source is not None:
            self._due[source] = ("cut", record.at)

    def healed(self, record: Healed) -> None:
        self._take(record)
        self.lossy_until = max(self.lossy_until, record.at)
        source = self._case.health.now(record.source)
        if source is not None:
            self._no_longer_due(source, "cut")
            self._is_back(source)

    def injected(self, record: Injected) -> None:
        self._take(record)
        self.lossy_until = max(self.lossy_until, record.at if record.until is None else record.until)
        if record.fault == LOSSY:
            self.unheard.setdefault(record.target, set()).add(record.process)

    def draining(self, record: Draining) -> None:
        self._waits.hit(record.process, Fault.DRAIN)
        self._take(record)

    def crashed(self, record: Crashed) -> None:
        self._case.broken(Invariant.NO_CRASH, None, f"{record.process}: {record.detail}")

    def declared_lost(self, record: DeclaredLost) -> None:
        case, health = self._case, self._case.health
        kind, since = self._due.pop(record.process, ("", 0.0))
        self._again[record.process] = NEVER
        if kind:
            case.verdict.times.detect.setdefault(kind, []).append(record.at - since)
            self._judge(record.process, kind, since)
            return
        process = health.get(record.process)
        if process is None or not process.turns or process.draining or health.is_cut(record.process.name, "router"):
            return
        if record.at - health.troubled_at > case.bounds.detect_hang.hard:
            detail = f"{record.process.name} is taken for lost, and nothing is wrong: {record.detail}"
            case.broken(Invariant.DETECTED, None, detail)

    def look(self) -> None:
        """For what should have been found by now."""
        for process, (kind, since) in list(self._due.items()):
            if self._judge(process, kind, since):
                del self._due[process]

    def _judge(self, process: Incarnation, kind: str, since: float) -> bool:
        """Whether it took too long."""
        bounds, seconds = self._case.bounds, self._case.now - since
        late = seconds > (bounds.detect_crash if kind == "crash" else bounds.detect_hang).hard
        if late:
            detail = f"the {kind} of {process.name}@{process.epoch} is not detected after {seconds:.3f} s"
            self._case.broken(Invariant.DETECTED, None, detail)
        return late

    def _take(self, record: Misfortune) -> None:
        self._waits.look()
        self.look()
        self._case.health.take(record)

    def _gone(self, process: Incarnation) -> None:
        """A process has ended. What a router knew, and a gateway's transcripts, are gone with it."""
        kind = self._case.health.kind(process.name)
        if kind == "router":
            self._due.clear()
        if kind == "gateway":
            for request in self._case.live.values():
                if request.gateway in ("", process.name):
                    request.orphan_at = min(request.orphan_at, self._case.now)

    def _is_known(self, process: Incarnation) -> bool:
        """Whether the router knows this worker, and has no reason yet to take it for lost."""
        health, settled = self._case.health, self._case.now - self._case.bounds.settled
        known = health.get(process)
        return (
            known is not None
            and known.started.kind == "worker"
            and known.turns
            and known.started.at <= settled
            and self._again.get(process, -NEVER) <= settled
            and health.router_since <= settled
            and not health.is_cut(process.name, "router")
            and process not in self._due
        )

    def _is_back(self, process: Incarnation) -> None:
        """It may have been taken for lost, and can register again."""
        self._again[process] = self._case.now

    def _no_longer_due(self, process: Incarnation, kind: str) -> None:
        if self._due.get(process, ("", 0.0))[0] == kind:
            del self._due[process]

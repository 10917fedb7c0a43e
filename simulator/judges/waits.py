"""How long clients waited: for a token after a fault, for anything at all, and for an error where there is no hope."""

from simulator.history import Got, Incarnation
from simulator.judges.case import Case, Hit, Request
from simulator.verdict import Fault, Invariant


class Waits:
    def __init__(self, case: Case) -> None:
        self._case = case

    # Signs of life

    def got(self, request: Request, record: Got) -> None:
        """Tokens have come: after which faults are they the first of a newer attempt?"""
        if record.attempt is not None:
            for hit in [hit for hit in request.hits if hit.attempt < record.attempt]:
                request.hits.remove(hit)
                self._resumed(request, hit)
        self.heard(request)

    def heard(self, request: Request) -> None:
        """Its client hears something now."""
        case = self._case
        if not request.live:
            return
        self._look_at(request)
        request.progress = case.now
        if request.attached_at is not None:
            seconds, request.attached_at = case.now - request.attached_at, None
            if seconds > case.bounds.attach and case.health.spare_since <= case.now - seconds:
                case.broken(Invariant.RESUMED, request, f"silence for {seconds:.3f} s at another gateway")

    def attached(self, request: Request) -> None:
        """Its client has found another gateway; until now it was its own doing."""
        request.progress = request.attached_at = self._case.now

    # Silence

    def look(self) -> None:
        """At all who wait, before what they wait for changes."""
        for request in self._case.live.values():
            if self._look_at(request):
                request.progress = self._case.now  # said once

    def _look_at(self, request: Request) -> bool:
        """Whether a live request has waited too long up to now."""
        case, health, bounds = self._case, self._case.health, self._case.bounds
        if request.orphan:
            return False
        heard, calm = request.progress, max(request.progress, health.troubled_at)
        lasting = 1 + health.active  # each fault that lasts may cost an attempt
        # One that was never placed may wait for a worker to come, as it may for a turn: its client has seen no byte.
        error = bounds.error if request.placed else bounds.stall
        owed = (
            (max(calm, health.spare_since), lasting * bounds.silence + bounds.compute, Invariant.RESUMED,
             "with capacity to spare"),
            (max(calm, health.capable_since), bounds.stall, Invariant.RESUMED, "with every role there"),
            (max(heard, health.gone_since, health.turning_since(request.gateway)), error, Invariant.TYPED_ERROR,
             "and nobody to serve it"),
        )  # fmt: skip
        for since, bound, invariant, when in owed:
            if case.now - since > bound:
                case.broken(invariant, request, f"silence for {case.now - since:.3f} s {when}")
                return True
        return False

    # Faults

    def hit(self, process: Incarnation, fault: Fault, other: str = "") -> None:
        """A fault is about to befall a worker, or what lies between it and ``other``: note whom it concerns."""
        case = self._case
        if case.health.active:
            return  # it does not come alone
        for request in case.live.values():
            placed = request.placed.get(request.attempt)
            if placed is None:
                continue
            prefill = None if request.decode_streams else placed.prefill
            if process not in (prefill, placed.decode):
                continue
            pair = {each.name for each in (prefill, placed.decode) if each is not None}
            if case.health.kind(other) == "worker" and other not in pair:
                continue
            kind = Fault.PREFILL_CRASH if fault is Fault.DECODE_CRASH and process == prefill else fault
            request.hits.append(Hit(kind, case.now, request.attempt, case.health.troubles + 1))

    def _resumed(self, request: Request, hit: Hit) -> None:
        case, health = self._case, self._case.health
        if health.troubles != hit.troubles or health.spare_since > hit.at or health.troubled_at > case.now:
            return  # it did not come alone, or it took the last capacity
        seconds = case.now - hit.at
        case.verdict.times.resume.setdefault(hit.fault, []).append(seconds)
        bound = case.bounds.resume[hit.fault].hard + case.bounds.compute
        if seconds > bound:
            detail = f"{seconds:.3f} s from the {hit.fault} to the next token, not {bound:g} s"
            case.broken(Invariant.RESUMED, request, detail)

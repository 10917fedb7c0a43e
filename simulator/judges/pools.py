"""What the pools and the router's ledger held: each block for someone who wants it, read and written by nobody else."""

from messages.ids import Attempt, RequestId
from simulator.history import Asked, Blocks, Idle, Incarnation, Ledger, Owner, Read, Wrote
from simulator.judges.case import Case
from simulator.judges.faults import Faults
from simulator.judges.health import NEVER
from simulator.verdict import Invariant


class Pools:
    """``blocks`` and the others: one for each kind of record."""

    def __init__(self, case: Case, faults: Faults) -> None:
        self._case = case
        self._faults = faults
        self._idle = False
        self._leaked: dict[Incarnation, int] = {}
        self._told: set[tuple[str, RequestId, Attempt]] = set()
        """Whose late freeing was said already."""

    def asked(self, _record: Asked) -> None:
        self._idle = False

    def idle(self, _record: Idle) -> None:
        self._idle = True

    def blocks(self, record: Blocks) -> None:
        name, known = record.worker.name, self._case.health.get(record.worker)
        if record.free + record.held + record.cached != record.total:
            detail = f"{name}: {record.free} free, {record.held} held and {record.cached} cached are not {record.total}"
            self._case.broken(Invariant.ACCOUNTED, None, detail)
        if known is not None and known.started.num_blocks not in (0, record.total):
            detail = f"{name}: its pool has {record.total} blocks, not {known.started.num_blocks}"
            self._case.broken(Invariant.ACCOUNTED, None, detail)
        if self._idle:
            self._look_for_leaks(record)
        elif record.owners is not None:
            owned = sum(owner.num_blocks for owner in record.owners)
            if owned < record.held:
                detail = f"{name}: {record.held - owned} blocks are held by nobody"
                self._case.broken(Invariant.ACCOUNTED, None, detail)
            for owner in record.owners:
                self._look_at_owner(record, owner)

    def _look_for_leaks(self, record: Blocks) -> None:
        more = record.held - self._leaked.get(record.worker, 0)
        if more <= 0:
            return
        self._leaked[record.worker] = record.held
        self._case.verdict.leaked += more
        owners = record.owners or ()
        whose = ", ".join(f"{owner.request} #{owner.attempt}" for owner in owners)
        request = self._case.requests.get(owners[0].request) if owners else None
        detail = f"{record.worker.name}: {record.held} blocks are held when all is over, by {whose or 'nobody'}"
        self._case.broken(Invariant.ACCOUNTED, request, detail)

    def _look_at_owner(self, record: Blocks, owner: Owner) -> None:
        case, health = self._case, self._case.health
        request, who = case.requests.get(owner.request), (record.worker.name, owner.request, owner.attempt)
        if request is None or owner.quarantined or health.active or who in self._told:
            return  # a test of the way, what waits for its writer, what a fault that lasts holds
        unwanted = min(request.superseded.get(owner.attempt, NEVER), request.over_at)
        bound = case.bounds.orphaned if request.orphan else case.bounds.freed
        if len(self._faults.unheard.get(record.worker.name, ())) > 1:
            bound = case.bounds.lease  # one word that is lost is made up for by another's, two are not
        if record.at - max(unwanted, health.troubled_at) > bound:
            self._told.add(who)
            detail = (
                f"{record.worker.name} holds {owner.num_blocks} blocks of attempt {owner.attempt}, "
                f"{record.at - unwanted:.3f} s after nobody wanted it any more"
            )
            case.broken(Invariant.FREED, request, detail)

    def ledger(self, record: Ledger) -> None:
        case, health, rebuilt = self._case, self._case.health, self._case.bounds.rebuilt
        if self._idle:
            for entry in record.entries:
                detail = f"the router still counts attempt {entry.attempt} on {', '.join(entry.workers)}"
                case.broken(Invariant.LEDGER, case.requests.get(entry.request), detail)
            return
        started = self._faults.routers.get(record.router, -NEVER)
        settled = max(started, health.troubled_at)
        if health.active or record.at - settled <= rebuilt:
            return
        counted = {entry.request for entry in record.entries}
        for request in case.live.values():
            placed = request.placed.get(request.attempt)
            if placed is None or record.at - placed.at <= rebuilt or request.asked.at <= self._faults.lossy_until:
                continue  # where a message was lost, the router may guess which request is over, and err
            if placed.at < started and request.orphan_at < started + rebuilt:
                continue  # its gateway died before it could tell this router of it
            if request.asked.request not in counted:
                detail = f"the router does not count attempt {request.attempt} on {placed.decode.name}"
                case.broken(Invariant.LEDGER, request, detail)

    def wrote(self, record: Wrote) -> None:
        own = (record.request, record.attempt)
        foreign = [block for block, owner in zip(record.blocks, record.owners, strict=True) if owner != own]
        if foreign:
            detail = f"attempt {record.attempt} wrote into {foreign} of {record.worker.name}, not promised to it"
            self._case.broken(Invariant.OWN_BLOCKS, self._case.requests.get(record.request), detail)

    def read(self, record: Read) -> None:
        request = self._case.requests.get(record.request)
        if not record.verified:
            detail = f"{record.worker.name} read blocks {record.blocks} that it had not verified"
            self._case.broken(Invariant.OWN_BLOCKS, request, detail)
        if record.wanted != record.found:
            pairs = zip(record.blocks, record.wanted, record.found, strict=True)
            wrong = [block for block, wanted, found in pairs if wanted != found]
            detail = f"{record.worker.name} read blocks {wrong}, which do not hold this sequence's KV"
            self._case.broken(Invariant.OWN_BLOCKS, request, detail)

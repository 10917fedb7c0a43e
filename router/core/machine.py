"""The router's decisions. A request's life here:

1. ``PlacementWanted`` comes from a gateway. Longer than any worker can hold: ``Rejected`` for good.
2. Live workers of every role it needs: the policy picks them, the ledger counts it on them, a ticket is minted, and
   ``Placed`` goes back. Asked again for the same attempt, the router answers the same.
3. None live: it waits in line, first come first served, until a worker registers or its time is up (``Rejected``).
4. ``Prefilled`` takes it off the prefill worker's load, ``Finished`` off the ledger.
5. If one of its workers leaves the membership, its gateway hears ``WorkerLost`` and asks for the next attempt.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

from messages import tickets
from messages.common import Role, WorkerAddress
from messages.gateway_to_router import ClusterStateWanted, Finished, PlacementWanted, Prefilled
from messages.ids import Address, RequestId, WorkerId
from messages.router_to_gateway import ClusterState, Placed, Rejected, WorkerLost
from messages.router_to_worker import PeerLost, RegisterWanted
from messages.worker_to_router import Leaving, Register, Report, WorkerDied
from router.core.ledger import Ledger
from router.core.membership import Members
from router.core.policies.least_load import LeastLoad, outstanding_sequences, outstanding_tokens
from router.core.views import WorkerView
from runtime.core.actions import Send, WakeAt
from runtime.core.fences import Fences


class Tick(NamedTuple):
    """The time that a ``WakeAt`` asked for has come."""


class Forget(NamedTuple):
    """Nobody listens at ``address`` any more."""

    address: Address


Action = Send | WakeAt | Forget

Messages = (
    PlacementWanted, Prefilled, Finished, ClusterStateWanted, Register, Report, WorkerDied, Leaving,
)  # fmt: skip
"""What the router's mailbox takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    cluster_key: bytes
    """Tickets are minted under it."""
    liveness_timeout: float = 5.0
    """Seconds without a report after which a worker is taken for lost."""
    max_waiting: int = 1024
    """Requests that may wait for a worker."""
    wait_timeout: float = 30.0
    """Seconds that one may wait."""
    retry_after: float = 1.0
    """What a request that is turned away is told."""
    forget_after: float = 3600.0
    """Seconds after which a request that nobody finished is taken off the ledger: its gateway must have died."""


@dataclass(slots=True)
class _Waiting:
    wanted: PlacementWanted
    until: float


class Router:
    """``handle(event, now)`` with the messages in ``Messages``, or a ``Tick``; ``now`` never goes back."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._members = Members(
            {
                Role.PREFILL: LeastLoad(outstanding_tokens),
                Role.DECODE: LeastLoad(outstanding_sequences),
                Role.COLOCATED: LeastLoad(outstanding_sequences),
            }
        )
        self._ledger = Ledger(lambda view: self._members.policies[view.role].changed(view))
        self._finished = Fences()
        self._waiting: OrderedDict[RequestId, _Waiting] = OrderedDict()  # in line, which is also by deadline
        self._asked_wake = float("inf")
        self._handlers: dict[type[Any], Any] = {
            PlacementWanted: self._placement_wanted,
            Prefilled: self._prefilled,
            Finished: self._finish,
            ClusterStateWanted: self._state_wanted,
            Register: self._register,
            Report: self._report,
            WorkerDied: self._died,
            Leaving: self._leaving,
            Tick: self._tick,
        }

    def handle(self, event: Any, now: float) -> list[Action]:
        actions: list[Action] = self._handlers[type(event)](event, now)
        wake = self._next_deadline()
        if wake < self._asked_wake:
            self._asked_wake = wake
            actions.append(WakeAt(wake))
        return actions

    def inspect(self) -> dict[str, int]:
        """Figures for tests and logs."""
        return {"workers": len(list(self._members.live())), "placed": len(self._ledger), "waiting": len(self._waiting)}

    def check_integrity(self) -> None:
        """Ledger, membership and queue are each sound and agree; ``AssertionError`` says where not."""
        self._members.check_integrity()
        self._ledger.check_integrity(iter(self._members))
        assert len(self._waiting) <= self._settings.max_waiting, f"{len(self._waiting)} requests wait"
        for request, waiting in self._waiting.items():
            entry = self._ledger.get(request)
            assert entry is None or entry.attempt < waiting.wanted.attempt, f"{request} waits, and is placed"
        deadlines = [waiting.until for waiting in self._waiting.values()]
        assert deadlines == sorted(deadlines), "requests do not wait in order"

    # Requests

    def _placement_wanted(self, wanted: PlacementWanted, now: float) -> list[Action]:
        entry = self._ledger.get(wanted.request)
        if entry is not None and wanted.attempt == entry.attempt:
            again: list[Action] = [Send(wanted.gateway, entry.placed)]
            return again if entry.lost is None else [*again, Send(wanted.gateway, entry.lost)]
        if entry is not None and wanted.attempt < entry.attempt:
            return []
        if not self._finished.admits(wanted.request, wanted.attempt):
            return []
        waiting = self._waiting.get(wanted.request)
        if waiting is not None:
            if wanted.attempt >= waiting.wanted.attempt:
                waiting.wanted = wanted
            return []
        return self._place(wanted, now) or self._wait(wanted, now)

    def _place(self, wanted: PlacementWanted, now: float) -> list[Action]:
        """The answer, or nothing where the request has to wait."""
        length = wanted.num_tokens + wanted.max_new_tokens
        longest = self._longest()
        if longest is not None and length > longest:
            detail = f"{wanted.num_tokens} + {wanted.max_new_tokens} tokens exceed the context of {longest}"
            return [self._reject(wanted, detail, None)]
        prefill = None
        if self._members.has_live(Role.COLOCATED):
            decode = self._choose(Role.COLOCATED, wanted.avoid, length)
        else:
            prefill = self._choose(Role.PREFILL, wanted.avoid, length)
            decode = self._choose(Role.DECODE, wanted.avoid, length) if prefill is not None else None
        if decode is None:
            return []
        ticket = None
        if prefill is not None:
            key = self._settings.cluster_key
            ticket = tickets.mint(key, wanted.request, wanted.attempt, prefill.address, decode.address)
        placed = Placed(
            request=wanted.request,
            attempt=wanted.attempt,
            prefill=prefill.address if prefill is not None else None,
            decode=decode.address,
            ticket=ticket,
        )
        self._ledger.place(wanted, placed, prefill, decode, now)
        return [Send(wanted.gateway, placed)]

    def _choose(self, role: Role, avoid: tuple[WorkerId, ...], length: int) -> WorkerView | None:
        policy = self._members.policies[role]
        chosen = policy.choose(lambda view: view.max_model_len >= length and view.worker not in avoid)
        if chosen is None and avoid:
            chosen = policy.choose(lambda view: view.max_model_len >= length)
        return chosen

    def _longest(self) -> int | None:
        """Tokens of the longest sequence that can be placed; None before workers of all roles needed are known."""
        members = self._members
        if members.knows(Role.COLOCATED):
            return members.longest(Role.COLOCATED)
        if members.knows(Role.PREFILL) and members.knows(Role.DECODE):
            return min(members.longest(Role.PREFILL), members.longest(Role.DECODE))
        return None

    def _wait(self, wanted: PlacementWanted, now: float) -> list[Action]:
        if len(self._waiting) >= self._settings.max_waiting:
            return [self._reject(wanted, "no worker is there, and the queue is full", self._settings.retry_after)]
        self._ledger.close(wanted.request)  # an older attempt is over, whether or not this one gets a place
        self._waiting[wanted.request] = _Waiting(wanted, now + self._settings.wait_timeout)
        return []

    def _reject(self, wanted: PlacementWanted, detail: str, retry_after: float | None) -> Send:
        self._ledger.close(wanted.request)
        rejected = Rejected(request=wanted.request, attempt=wanted.attempt, detail=detail, retry_after=retry_after)
        return Send(wanted.gateway, rejected)

    def _place_waiting(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for request, waiting in list(self._waiting.items()):
            placed = self._place(waiting.wanted, now)
            if placed:
                del self._waiting[request]
                actions += placed
        return actions

    def _prefilled(self, event: Prefilled, _now: float) -> list[Action]:
        self._ledger.prefilled(event.request, event.attempt)
        return []

    def _finish(self, event: Finished, _now: float) -> list[Action]:
        self._finished.raise_to(event.request, event.attempt)
        entry = self._ledger.get(event.request)
        if entry is not None and entry.attempt <= event.attempt:
            self._ledger.close(event.request)
        waiting = self._waiting.get(event.request)
        if waiting is not None and waiting.wanted.attempt <= event.attempt:
            del self._waiting[event.request]
        return []

    def _state_wanted(self, event: ClusterStateWanted, _now: float) -> list[Action]:
        pair = self._members.has_live(Role.PREFILL) and self._members.has_live(Role.DECODE)
        state = ClusterState(
            workers=tuple(view.state() for view in sorted(self._members, key=lambda view: (view.role, view.worker))),
            queued=len(self._waiting),
            ready=pair or self._members.has_live(Role.COLOCATED),
        )
        return [Send(event.gateway, state)]

    # Workers

    def _register(self, event: Register, now: float) -> list[Action]:
        address = event.address
        known = self._members.get(address.worker)
        actions: list[Action] = []
        if self._members.is_former(address.worker, address.epoch):
            return []
        if known is not None and known.epoch == address.epoch:
            if known.dead_for_good:
                return []
            if known.alive:
                known.heard = now
                self._members.heard(known)
                return []
        elif known is not None and known.alive:
            actions += self._lose(known, "another process has taken its name", for_good=True)
        self._members.join(WorkerView.registered(event, now))
        return actions + self._place_waiting(now)

    def _report(self, event: Report, now: float) -> list[Action]:
        view = self._members.get(event.worker, event.epoch)
        if view is None or view.dead_for_good:
            return []  # a report does not say where its sender listens, so only a Register can bring it in
        if not view.alive:
            return [Send(view.address.mailbox, RegisterWanted(worker=view.worker, epoch=view.epoch))]
        view.take(event, now)
        if view.heard == now:
            self._members.heard(view)
        return []

    def _died(self, event: WorkerDied, _now: float) -> list[Action]:
        view = self._members.get(event.worker, event.epoch)
        if view is not None:
            return self._bury(view, event.detail, dead=True)
        former = self._members.former(event.worker, event.epoch)
        return [] if former is None else self._tell_peers(former, event.detail, dead=True)

    def _leaving(self, event: Leaving, _now: float) -> list[Action]:
        view = self._members.get(event.worker, event.epoch)
        return self._bury(view, "it was stopped", dead=False) if view is not None else []

    def _bury(self, view: WorkerView, detail: str, *, dead: bool) -> list[Action]:
        if view.alive:
            return self._lose(view, detail, for_good=True, dead=dead)
        view.dead_for_good = True
        return self._tell_peers(view.address, detail, dead=dead) if dead else []

    def _lose(self, view: WorkerView, detail: str, *, for_good: bool, dead: bool = False) -> list[Action]:
        """Take a worker out of the membership, and tell everyone who deals with it. It may still write unless it is
        ``dead``, which only its supervisor knows."""
        self._members.leave(view)
        view.dead_for_good = for_good
        lost = WorkerLost(worker=view.worker, epoch=view.epoch, detail=detail)
        actions: list[Action] = [Send(gateway, lost) for gateway in self._ledger.lose(view, lost)]
        return [*actions, *self._tell_peers(view.address, detail, dead=dead), Forget(view.address.mailbox)]

    def _tell_peers(self, lost: WorkerAddress, detail: str, *, dead: bool) -> list[Action]:
        message = PeerLost(peer=lost, dead=dead, detail=detail)
        return [Send(peer.address.mailbox, message) for peer in self._members.live()]

    # Time

    def _tick(self, _event: Tick, now: float) -> list[Action]:
        timeout = self._settings.liveness_timeout
        late = now - self._asked_wake
        self._asked_wake = float("inf")
        if late > timeout / 4:  # this process, and perhaps the whole machine, stood still: silence proves nothing
            for member in self._members.live():
                member.heard = now
        actions: list[Action] = []
        while (view := self._members.most_silent()) is not None and view.heard + timeout <= now:
            actions += self._lose(view, f"no report for {now - view.heard:.1f} s", for_good=False)
        while self._waiting and (first := next(iter(self._waiting.values()))).until <= now:
            del self._waiting[first.wanted.request]
            actions.append(self._reject(first.wanted, "no worker came in time", self._settings.retry_after))
        self._ledger.forget_before(now - self._settings.forget_after)
        return actions

    def _next_deadline(self) -> float:
        silent = self._members.most_silent()
        deadline = silent.heard + self._settings.liveness_timeout if silent is not None else float("inf")
        if self._waiting:
            deadline = min(deadline, next(iter(self._waiting.values())).until)
        return deadline

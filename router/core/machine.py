"""The router's decisions. A request's life here:

1. ``PlacementWanted`` comes from a gateway. Longer than any worker can hold: ``Rejected`` for good.
2. Live workers of every role it needs, with room: the policy picks them, the ledger counts it on them, a ticket is
   minted, and ``Placed`` goes back. A further attempt goes to the prefill worker that has its KV, if it can; a prompt
   that is cheaper to compute than to ship goes to the decode worker alone. Asked again for the same attempt, the
   router answers the same.
3. None live, or all full: it waits in line, first come first served, until there is one or its time is up
   (``Rejected``). A further attempt goes to the front, however long the line is: its client may be reading already.
4. ``Prefilled`` takes it off the prefill worker's load, ``Finished`` off the ledger. Where its worker's reports show
   that one of them was lost, the gateway gets ``Placed`` once more, and says it again.
5. A worker that is draining gets nothing more, and what runs there moves elsewhere (``drains.py``). When nothing is
   left it may take another role.
6. If one of its workers leaves the membership, every gateway hears ``WorkerLost``, and its own asks for the next
   attempt. If its gateway falls silent, the workers hear ``GatewayLost``.
7. A router that was restarted knows nothing. Workers register again, gateways say what they hold (``Holding``), and
   until they had time to, it places what the workers themselves say that they have room for.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from msgspec import structs

from messages import tickets
from messages.common import Role, WorkerAddress
from messages.gateway_to_router import (
    AdoptionWanted,
    ClusterStateWanted,
    Finished,
    GatewayDied,
    Held,
    Holding,
    PlacementWanted,
    Prefilled,
)
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.router_to_gateway import AdoptionAsked, ClusterState, Placed, Rejected, WorkerLost
from messages.router_to_worker import Adopt, GatewayBack, GatewayLost, PeerLost, RegisterWanted, RoleWanted
from messages.seals import Sealed, genuine, seal
from messages.worker_to_router import Leaving, Register, Report, WorkerDied
from router.core.admission import expected_tokens, has_room
from router.core.awaited import Awaiting
from router.core.drains import Drain, Flip, Refused, Undrain, Unknown, moves
from router.core.gateways import Gateways
from router.core.ledger import Entry, Ledger
from router.core.line import Line
from router.core.membership import Members
from router.core.placing import Placing
from router.core.policies.least_load import LeastLoad, outstanding_sequences, outstanding_tokens
from router.core.views import WorkerView
from runtime.core.actions import Forget, Send, WakeAt
from runtime.core.disaggregation import ALWAYS, Decisions, Disaggregation
from runtime.core.fences import Fences


class Tick(NamedTuple):
    """The time that a ``WakeAt`` asked for has come."""


NO_EPOCH = Epoch(0)
TICK = 0.1
"""Seconds between two looks at who is silent."""
STOOD_STILL = 0.25
"""Seconds that a tick may be late before it means that this process, and perhaps the whole machine, stood still."""
TELL_EVERY = 1.0
"""Seconds between two tellings that a gateway is lost."""


Action = Send | WakeAt | Forget

Messages = (
    PlacementWanted, Prefilled, Finished, ClusterStateWanted, Holding, AdoptionWanted, Register, Report, Leaving,
)  # fmt: skip
"""What the router's mailbox takes from the network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    cluster_key: bytes = field(repr=False)
    """Tickets are minted, and messages about the membership sealed, under it."""
    liveness_timeout: float = 1.95
    """Seconds without a report after which a worker is taken for lost, unless it has announced a long step; a gateway,
    without a question. Below 2, so that a hang is known within 2."""
    adoption_grace: float = 10.0
    """Seconds for which the requests of a lost gateway are kept."""
    settle: float = 1.0
    """Seconds after its start in which a router believes what workers say of their load: an earlier one may have placed
    it."""
    block_size: int = 16
    """Tokens in a KV block of the workers."""
    disaggregation: Disaggregation = ALWAYS
    max_waiting: int = 1024
    """Requests that may wait for a worker; further attempts of placed ones may always."""
    wait_timeout: float = 30.0
    """Seconds that a first attempt may wait."""
    deserted_timeout: float = 4.5
    """Seconds without a live worker of some role, after which further attempts are given up: their clients read."""
    retry_after: float = 1.0
    """What a request that is turned away is told."""
    forget_after: float = 3600.0
    """Seconds after which a request that nobody finished is taken off the ledger: its gateway must have died."""
    forget_deserted_after: float = 150.0
    """The same for one of which no worker is left; longer than a gateway waits for a first token."""


class Router:
    """``handle(event, now)`` with what ``Messages`` names, a ``WorkerDied``, a ``GatewayDied`` or a ``Tick``; ``now``
    never goes back.

    ``Drain``, ``Undrain`` and ``Flip`` too, which raise ``Refused`` where that cannot be.
    """

    def __init__(self, settings: RouterSettings, epoch: Epoch = NO_EPOCH) -> None:
        """``epoch``: random, of this process."""
        self._settings = settings
        self._epoch = epoch
        self._members = Members(
            {
                Role.PREFILL: LeastLoad(outstanding_tokens),
                Role.DECODE: LeastLoad(outstanding_sequences),
                Role.COLOCATED: LeastLoad(outstanding_sequences),
            }
        )
        self._ledger = Ledger(self._load_changed)
        self.forged = 0
        """Messages without a proof that they come from the cluster; dropped."""
        self.outdated = 0
        """Registrations of processes whose successors had registered; dropped."""
        self.decisions = Decisions()
        self._finished = Fences()
        self._line = Line(settings.wait_timeout, settings.deserted_timeout)
        self._gateways = Gateways(settings.liveness_timeout, settings.adoption_grace, TELL_EVERY)
        self._awaiting = Awaiting()
        self._knows_all_at: float | None = None
        """When everything that an earlier router has placed is over, or known here."""
        self._settled_at: float | None = None
        self._placing = Placing(self._members, settings.disaggregation, settings.block_size)
        self._placing.settling = settings.settle > 0
        self._moved = False  # whether this event may have made room for the head of the line
        self._asked_wake = self._tick_at = float("inf")
        self._handlers: dict[type[Any], Any] = {
            PlacementWanted: self._placement_wanted,
            Prefilled: self._prefilled,
            Finished: self._finish,
            ClusterStateWanted: self._state_wanted,
            Holding: self._hold,
            AdoptionWanted: self._adoption_wanted,
            Register: self._register,
            Report: self._report,
            WorkerDied: self._died,
            GatewayDied: self._gateway_died,
            Leaving: self._leaving,
            Drain: self._drain,
            Undrain: self._undrain,
            Flip: self._flip,
            Tick: self._tick,
        }

    def handle(self, event: Any, now: float) -> list[Action]:
        if isinstance(event, Sealed) and not genuine(self._settings.cluster_key, event):
            self.forged += 1
            return []
        if self._knows_all_at is None:
            self._knows_all_at = now + self._settings.adoption_grace + self._settings.liveness_timeout + TELL_EVERY
        self._settle(now)
        actions: list[Action] = self._handlers[type(event)](event, now)
        if self._moved and len(self._line):
            actions += self._serve(now)
        self._moved = False
        wake = self._next_deadline(now)
        if wake < self._asked_wake:
            self._asked_wake = wake
            actions.append(WakeAt(wake))
        return actions

    def inspect(self) -> dict[str, int]:
        """Figures for tests and logs."""
        workers = len(list(self._members.live()))
        counts = {"workers": workers, "placed": len(self._ledger), "waiting": len(self._line)}
        counts |= {"forged": self.forged, "outdated": self.outdated}
        return counts | structs.asdict(self.decisions.counts())

    def standing(self, worker: WorkerId) -> dict[str, Any]:
        """What is known of ``worker``: the fields of ``WorkerState``; what it is ``becoming``, or why that was
        ``called_off``; and the epoch of the ``router`` that says so. ``Refused`` where nothing is known."""
        view = self._members.get(worker)
        if view is None:
            raise Unknown(f"no worker {worker!r} has ever registered")
        more = {"becoming": view.becoming, "called_off": view.called_off, "router": self._epoch}
        return structs.asdict(view.state()) | more

    def check_integrity(self) -> None:
        """Ledger, membership and queue are each sound and agree; ``AssertionError`` says where not."""
        self._members.check_integrity()
        self._ledger.check_integrity(iter(self._members))
        self._line.check_integrity()
        self._awaiting.check_integrity()
        assert all(self._ledger.get(request) is None for request in self._line), "a request waits, and is placed"
        head = self._line.head()
        assert head is None or self._placing.find(head) is None, "a request waits where there is room"

    # Requests

    def _placement_wanted(self, wanted: PlacementWanted, now: float) -> list[Action]:
        return [*self._heard(wanted.gateway, now), *self._answer(wanted, now)]

    def _answer(self, wanted: PlacementWanted, now: float) -> list[Action]:
        self._awaiting.drop_older(wanted.request, wanted.attempt)
        entry = self._ledger.get(wanted.request)
        if entry is not None and wanted.attempt == entry.attempt:
            again: list[Action] = [Send(wanted.gateway, entry.placed)]
            return again if entry.lost is None else [*again, Send(wanted.gateway, entry.lost)]
        if entry is not None and wanted.attempt < entry.attempt:
            return []
        if not self._finished.admits(wanted.request, wanted.attempt):
            return []
        if wanted.moving:
            return self._move_on(wanted, entry, now)
        waiting = self._line.get(wanted.request)
        if waiting is not None:
            if wanted.attempt >= waiting.attempt and wanted != waiting:
                self._line.push(wanted, now)
                self._moved = True
            return []
        if entry is not None:
            self._ledger.close(wanted.request)  # the older attempt is over, whether or not this one gets a place
        answer = self._too_long(wanted)
        if not answer and not len(self._line):
            answer = self._place(wanted, now)
        return answer or self._wait(wanted, now)

    def _too_long(self, wanted: PlacementWanted) -> list[Action]:
        longest = self._placing.longest()
        if longest is None or wanted.num_tokens + wanted.max_new_tokens <= longest:
            return []
        detail = f"{wanted.num_tokens} + {wanted.max_new_tokens} tokens exceed the context of {longest}"
        return [self._reject(wanted, detail, None)]

    def _placed(self, request: RequestId, attempt: Attempt, prefill: WorkerView | None, decode: WorkerView) -> Placed:
        ticket = None
        if prefill is not None:
            ticket = tickets.mint(self._settings.cluster_key, request, attempt, prefill.address, decode.address)
        return Placed(
            request=request,
            attempt=attempt,
            prefill=prefill.address if prefill is not None else None,
            decode=decode.address,
            ticket=ticket,
        )

    def _place(self, wanted: PlacementWanted, now: float) -> list[Action]:
        """The answer, or nothing where the request has to wait."""
        found = self._placing.find(wanted)
        if found is None:
            return []
        prefill, decode, expected, reason = found
        if reason is not None:
            self.decisions.add(reason)
        return self._assign(wanted, prefill, decode, expected, now)

    def _move_on(self, wanted: PlacementWanted, entry: Entry | None, now: float) -> list[Action]:
        """From a worker that is draining to another one, with its KV. Where none has room it stays for now."""
        origin = None if entry is None else entry.decode
        if origin is None or not origin.draining:
            return []
        expected = expected_tokens(wanted, self._settings.block_size)
        target = self._placing.choose(origin.role, wanted, expected)
        return [] if target is None else self._assign(wanted, origin, target, expected, now)

    def _assign(
        self, wanted: PlacementWanted, prefill: WorkerView | None, decode: WorkerView, expected: int, now: float
    ) -> list[Action]:
        placed = self._placed(wanted.request, wanted.attempt, prefill, decode)
        self._ledger.place(wanted, placed, prefill, decode, expected, now)
        return [Send(wanted.gateway, placed)]

    def _wait(self, wanted: PlacementWanted, now: float) -> list[Action]:
        if wanted.attempt == 1 and len(self._line) >= self._settings.max_waiting:
            detail = f"the queue is full, for {self._shortage()}"
            return [self._reject(wanted, detail, self._settings.retry_after)]
        self._line.push(wanted, now)
        self._moved = self._moved or wanted.attempt > 1  # it may be the head now
        return []

    def _shortage(self) -> str:
        return "every worker is full" if self._placing.ready else "no worker is there"

    def _reject(self, wanted: PlacementWanted, detail: str, retry_after: float | None) -> Send:
        self._ledger.close(wanted.request)
        rejected = Rejected(
            request=wanted.request,
            attempt=wanted.attempt,
            detail=detail,
            retry_after=retry_after,
            unavailable=retry_after is not None and not self._placing.ready,
        )
        return Send(wanted.gateway, rejected)

    def _serve(self, now: float) -> list[Action]:
        """Answer those in line, in order, up to the first that has to wait on."""
        actions: list[Action] = []
        while (head := self._line.head()) is not None and (answer := self._too_long(head) or self._place(head, now)):
            self._line.remove(head.request)
            actions += answer
        self._line.note(ready=self._placing.ready, since=now)
        return actions

    def _load_changed(self, view: WorkerView) -> None:
        self._members.policies[view.role].changed(view)
        self._moved = True

    def _prefilled(self, event: Prefilled, _now: float) -> list[Action]:
        self._ledger.prefilled(event.request, event.attempt)
        self._awaiting.prefilled(event.request, event.attempt)
        return []

    def _finish(self, event: Finished, _now: float) -> list[Action]:
        self._finished.raise_to(event.request, event.attempt)
        self._awaiting.drop_older(event.request, Attempt(event.attempt + 1))
        entry = self._ledger.get(event.request)
        if entry is not None and entry.attempt <= event.attempt:
            self._ledger.close(event.request)
        waiting = self._line.get(event.request)
        if waiting is not None and waiting.attempt <= event.attempt:
            self._line.remove(event.request)
            self._moved = True
        return []

    def _state_wanted(self, event: ClusterStateWanted, now: float) -> list[Action]:
        back = self._heard(event.gateway, now)
        state = ClusterState(
            workers=tuple(view.state() for view in sorted(self._members, key=lambda view: (view.role, view.worker))),
            queued=len(self._line),
            ready=self._placing.ready,
            decisions=self.decisions.counts(),
            router=self._epoch,
            known=self._gateways.has_said(event.gateway),
        )
        return [*back, Send(event.gateway, state)]

    # Gateways

    def _heard(self, gateway: Address, now: float) -> list[Action]:
        return self._tell_workers(GatewayBack(gateway=gateway)) if self._gateways.heard(gateway, now) else []

    def _hold(self, event: Holding, now: float) -> list[Action]:
        """A gateway says what an earlier router has placed for it."""
        actions = self._heard(event.gateway, now)
        if event.last:
            self._gateways.holds(event.gateway)
        lost: dict[WorkerLost, None] = {}
        for held in event.attempts:
            entry, waiting = self._ledger.get(held.request), self._line.get(held.request)
            newest = max(entry.attempt if entry else 0, waiting.attempt if waiting else 0)
            if held.attempt > newest and self._finished.admits(held.request, held.attempt):
                self._awaiting.add(held, event.gateway, now + self._settings.liveness_timeout)
                lost |= self._take_over(held.request, now)
        return [*actions, *(Send(event.gateway, message) for message in lost)]

    def _adoption_wanted(self, event: AdoptionWanted, now: float) -> list[Action]:
        """Where it is not known who has the request, everyone is asked, if an earlier router may have placed it. A
        router that has only begun does not say whom it asked, for more may register: the gateway asks again."""
        assert self._knows_all_at is not None
        where = self._ledger.where(event.request)
        if where is not None:
            known = [self._members.get(worker, epoch) for worker, epoch in where]
            views = [view for view in known if view is not None and view.alive]
        else:
            views = list(self._members.live()) if now < self._knows_all_at else []
        adopt = seal(
            self._settings.cluster_key, Adopt(request=event.request, gateway=event.gateway, number=event.number)
        )
        asked = AdoptionAsked(request=event.request, workers=tuple(view.worker for view in views))
        return [
            *self._heard(event.gateway, now),
            *([] if where is None and self._placing.settling else [Send(event.gateway, asked)]),
            *(Send(view.address.mailbox, adopt) for view in views),
        ]

    def _take_over(self, request: RequestId, now: float) -> dict[WorkerLost, None]:
        """Count an awaited attempt on its workers, if they are here; or say which of them never will be."""
        awaited = self._awaiting.get(request)
        assert awaited is not None
        held, gateway = awaited.held, awaited.gateway
        views: list[WorkerView] = []
        lost: dict[WorkerLost, None] = {}
        for worker, epoch in held.workers:
            view = self._members.get(worker, epoch)
            if view is not None and view.alive:
                views.append(view)
            elif view is not None or self._members.get(worker) is not None:
                lost[WorkerLost(worker=worker, epoch=epoch, detail="it left while the router was away")] = None
        if lost:
            self._awaiting.drop(request)
        elif len(views) == len(held.workers):
            self._awaiting.drop(request)
            self._restore(held, gateway, views, now)
        return lost

    def _restore(self, held: Held, gateway: Address, views: list[WorkerView], now: float) -> None:
        *prefills, decode = views
        wanted = PlacementWanted(
            request=held.request,
            attempt=held.attempt,
            gateway=gateway,
            tenant="",
            num_tokens=held.num_tokens,
            max_new_tokens=held.max_new_tokens,
        )
        prefill = prefills[0] if prefills else None
        expected = expected_tokens(wanted, self._settings.block_size)
        placed = self._placed(held.request, held.attempt, prefill, decode)
        self._ledger.place(wanted, placed, prefill, decode, expected, now)
        if held.prefilled:
            self._ledger.prefilled(held.request, held.attempt)

    def _take_over_all(self, worker: WorkerId, now: float) -> list[Action]:
        """``worker`` has come."""
        actions: dict[Send, None] = {}
        for request in self._awaiting.on(worker):
            awaited = self._awaiting.get(request)
            assert awaited is not None
            actions |= {Send(awaited.gateway, lost): None for lost in self._take_over(request, now)}
        return list(actions)

    def _gateway_died(self, event: GatewayDied, now: float) -> list[Action]:
        return self._lose_gateway(event.gateway, now)

    def _lose_gateway(self, gateway: Address, now: float) -> list[Action]:
        """Its requests go on for a while; those that wait do not."""
        self._gateways.lose(gateway, now)
        self._line.take_from(gateway)
        self._moved = True
        return self._tell_lost(now)

    def _tell_lost(self, now: float) -> list[Action]:
        messages = [GatewayLost(gateway=gateway) for gateway in self._gateways.to_tell(now)]
        return [action for message in messages for action in self._tell_workers(message)]

    def _forget_gateways(self, now: float) -> list[Action]:
        """Whose requests nobody has adopted: the workers drop them too."""
        actions: list[Action] = []
        for gateway in self._gateways.forget(now):
            for request in self._ledger.of(gateway):
                self._ledger.close(request)
            for request in self._awaiting.of(gateway):
                self._awaiting.drop(request)
            actions.append(Forget(gateway))
        return actions

    # Workers

    def _register(self, event: Register, now: float) -> list[Action]:
        address = event.address
        known = self._members.get(address.worker)
        actions: list[Action] = []
        if known is not None and known.epoch != address.epoch and event.incarnation <= known.incarnation:
            self.outdated += 1
            return []
        if known is not None and known.epoch == address.epoch:
            if known.dead_for_good:
                return []
            if known.alive:
                known.heard = now
                self._members.heard(known)
                return self._registered_again(known, event)
        elif known is not None and known.alive:
            actions += self._lose(known, "another process has taken its name", for_good=True)
        view = WorkerView.registered(event, now, self._settings.block_size)
        again = known is not None and known.epoch == view.epoch
        if known is not None and again:  # what was asked of it meanwhile, or called off, it may not have heard
            view.role, view.draining, view.called_off = known.role, known.draining, known.called_off
        self._members.join(view)
        if again and (event.role, event.draining) != (view.role, view.draining):
            actions.append(self._role_wanted(view))
        self._moved = True
        self._line.note(ready=self._placing.ready, since=now)
        return [*actions, *self._take_over_all(address.worker, now)]

    def _registered_again(self, view: WorkerView, event: Register) -> list[Action]:
        if event.role is view.becoming and view.drained:
            self._ledger.release(view)
            self._members.change_role(view, event.role)
            self._moved = True
        if (event.role, event.draining) == (view.role, view.draining):
            return []
        return [self._role_wanted(view)]  # this was lost, or was on its way

    def _report(self, event: Report, now: float) -> list[Action]:
        self._moved = self._moved or self._placing.settling
        for gateway in event.gateways:
            self._gateways.named(gateway, now)
        view = self._members.get(event.worker, event.epoch)
        if view is None or view.dead_for_good:
            return []  # a report does not say where its sender listens, so only a Register can bring it in
        if not view.alive:
            return [Send(view.address.mailbox, RegisterWanted(worker=view.worker, epoch=view.epoch))]
        if view.take(event, now):
            self._members.heard(view)
            back = [GatewayBack(gateway=each) for each in event.lost_gateways if self._gateways.lives(each)]
            actions: list[Action] = [
                Send(view.address.mailbox, seal(self._settings.cluster_key, each)) for each in back
            ]
            actions += self._believe(view, event, now)
            return [*actions, *self._drain_on(view, event, now)] if view.draining else actions
        return []

    def _believe(self, view: WorkerView, report: Report, now: float) -> list[Action]:
        """Take over what a worker knows better: its pool, and that of its requests some are over without a word. Their
        gateways are told again where they are placed, and say what has come of them since."""
        if view.num_blocks != report.blocks.total:
            view.num_blocks = report.blocks.total
            self._load_changed(view)
        present = report.running + report.waiting
        if len(view.requests) <= present and not view.draining:
            return []
        return [Send(entry.gateway, entry.placed) for entry in self._ledger.doubtful(view, present, now)]

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
        ``dead``, which only its supervisor knows. Its capacity is gone since it was heard last."""
        self._members.leave(view)
        self._moved = True
        view.dead_for_good = for_good
        if view.becoming is not None:
            self._members.call_off(view, f"it was lost before that: {detail}")
        self._line.note(ready=self._placing.ready, since=view.heard)
        lost = WorkerLost(worker=view.worker, epoch=view.epoch, detail=detail, dead=dead)
        gateways = dict.fromkeys([*self._ledger.lose(view, lost), *self._gateways])
        actions: list[Action] = [Send(gateway, lost) for gateway in gateways]
        actions += self._call_off_flips()
        return [*actions, *self._tell_peers(view.address, detail, dead=dead), Forget(view.address.mailbox)]

    def _tell_peers(self, lost: WorkerAddress, detail: str, *, dead: bool) -> list[Action]:
        return self._tell_workers(PeerLost(peer=lost, dead=dead, detail=detail))

    def _tell_workers(self, message: Sealed) -> list[Action]:
        sealed = seal(self._settings.cluster_key, message)
        return [Send(worker.address.mailbox, sealed) for worker in self._members.live()]

    # Draining

    def _drain(self, event: Drain, _now: float) -> list[Action]:
        view = self._live(event.worker)
        view.becoming, view.called_off = None, ""
        if not view.draining:
            if not event.force:
                self._check_spare(view)
            self._members.drain(view)
        return [self._role_wanted(view)]

    def _undrain(self, event: Undrain, _now: float) -> list[Action]:
        view = self._live(event.worker)
        view.called_off = ""
        if view.draining:
            self._members.undrain(view)
            self._moved = True
        return [self._role_wanted(view)]

    def _flip(self, event: Flip, now: float) -> list[Action]:
        view = self._live(event.worker)
        if Role.COLOCATED in (view.role, event.role):
            raise Refused(f"{view.worker} is a {view.role} worker, and cannot become a {event.role} one: prefill and "
                          "decode workers can take each other's role")  # fmt: skip
        if view.role is event.role:
            return self._undrain(Undrain(view.worker), now)
        self._check_spare(view)
        if not view.draining:
            self._members.drain(view)
        view.becoming, view.called_off = event.role, ""
        return [self._role_wanted(view)]

    def _call_off_flips(self) -> list[Action]:
        """Of workers whose role has lost its others: without them nothing could be served."""
        needed = [view for view in self._members.live() if view.becoming is not None and self._members.is_last(view)]
        for view in needed:
            self._members.call_off(view, f"it is the last {view.role} worker now")
            self._moved = True
        return [self._role_wanted(view) for view in needed]

    def _live(self, worker: WorkerId) -> WorkerView:
        view = self._members.get(worker)
        if view is None or not view.alive:
            live = ", ".join(sorted(view.worker for view in self._members.live())) or "none"
            raise Unknown(f"there is no live worker {worker!r}; live are {live}")
        return view

    def _check_spare(self, view: WorkerView) -> None:
        if self._members.is_last(view):
            raise Refused(f"{view.worker} is the last {view.role} worker: without it nothing could be served")

    def _role_wanted(self, view: WorkerView) -> Send:
        role = view.becoming if view.becoming is not None and view.drained else view.role
        wanted = RoleWanted(
            worker=view.worker, epoch=view.epoch, role=role, draining=view.draining and role is view.role
        )
        return Send(view.address.mailbox, seal(self._settings.cluster_key, wanted))

    def _drain_on(self, view: WorkerView, report: Report, now: float) -> list[Action]:
        """A draining worker has reported."""
        if view.drained and view.becoming is not None:
            return [self._role_wanted(view)]
        if view.role is Role.PREFILL:
            return []

        def somewhere(tokens: int) -> bool:
            policy = self._members.policies[view.role]
            return policy.choose(lambda _: True, lambda other: has_room(other, tokens)) is not None

        return [*moves(view, report, self._ledger, somewhere, now)]

    # Time

    def _settle(self, now: float) -> None:
        """See whether workers and gateways have had time to say what there is."""
        if self._placing.settling:
            if self._settled_at is None:  # it begins: what nobody serves now may not have been served for long
                self._settled_at = now + self._settings.settle
                self._line.note(ready=self._placing.ready, since=now)
            if now >= self._settled_at:
                self._placing.settling = False
                self._moved = True

    def _tick(self, _event: Tick, now: float) -> list[Action]:
        timeout = self._settings.liveness_timeout
        late = now - self._asked_wake
        self._asked_wake = self._tick_at = float("inf")
        if late > STOOD_STILL:  # silence meanwhile proves nothing
            self._members.stood_still(late, now)
            self._gateways.stood_still(late, now)
            self._awaiting.stood_still(late)
        actions: list[Action] = []
        for view in self._members.silent(timeout, now):
            actions += self._lose(view, f"no report for {now - view.heard:.1f} s", for_good=False)
        for gateway in self._gateways.silent(now):
            actions += self._lose_gateway(gateway, now)
        actions += self._tell_lost(now)
        actions += self._forget_gateways(now)
        actions += self._give_up_awaited(now)
        for wanted in self._line.take_late(now):
            detail = f"waited too long, for {self._shortage()}"
            actions.append(self._reject(wanted, detail, self._settings.retry_after))
            self._moved = True
        self._ledger.forget_before(now - self._settings.forget_after)
        self._ledger.forget_deserted(now - self._settings.forget_deserted_after)
        return actions

    def _give_up_awaited(self, now: float) -> list[Action]:
        """Workers that have not registered in time: they died while no router was there."""
        actions: dict[Send, None] = {}
        for request in self._awaiting.late(now):
            awaited = self._awaiting.get(request)
            assert awaited is not None
            self._awaiting.drop(request)
            missing = [each for each in awaited.held.workers if self._members.get(*each) is None]
            lost = [WorkerLost(worker=w, epoch=e, detail="the router does not know it") for w, e in missing]
            actions |= {Send(awaited.gateway, message): None for message in lost}
        return list(actions)

    def _next_deadline(self, now: float) -> float:
        silent = self._members.most_silent()
        if silent is not None or self._gateways or self._awaiting or self._placing.settling:
            self._tick_at = min(self._tick_at, now + TICK)
        lost_at = silent.heard + self._settings.liveness_timeout if silent is not None else 0.0
        deadline = min(self._tick_at, lost_at) if lost_at > now else self._tick_at
        return min(deadline, self._line.deadline) if len(self._line) else deadline

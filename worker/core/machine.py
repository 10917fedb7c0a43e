"""A whole worker: both halves on one engine, and what is neither's alone.

A step is planned once. Rows of sequences that are to be handed over belong to the prefill half, all others to the
decode half. A message about a hand-over goes to the half that sends, or receives, in it; what is about a request as
such goes to both.
"""

from dataclasses import asdict
from typing import Any

from msgspec import structs

from decode_worker.core import machine as decode_half
from decode_worker.core.machine import DecodeMachine
from decode_worker.core.reservation import Reservations
from engine.core.blocks import BlockPool
from engine.core.outputs import StepOutput
from engine.core.scheduler import Scheduler, StepPlan
from kv_transfer.core.events import TransferKey
from kv_transfer.core.session import Digested
from kv_transfer.core.stats import both
from kv_transfer.core.trace import TransferTrace
from messages.codec import count_tokens
from messages.common import FailReason
from messages.gateway_to_worker import Abort, EndAck, TokensWanted
from messages.ids import Address, RequestId
from messages.router_to_worker import Adopt, GatewayBack, GatewayLost, PeerLost, RegisterWanted, RoleWanted
from messages.seals import genuine
from messages.worker_to_gateway import Adopted, NotHere, Superseded, TokenChunk
from prefill_worker.core import machine as prefill_half
from prefill_worker.core.handoff import Handoffs
from prefill_worker.core.machine import PrefillMachine
from runtime.core.actions import Forget, ForgetPeer, Send
from runtime.core.membership import Membership
from runtime.core.orphans import Orphans
from runtime.core.pace import MEASURED, STEP_SECONDS, StepPace
from runtime.core.shared import Shared, WorkerSettings
from runtime.core.work import block_counts, cache_counts

Messages = (
    *prefill_half.Messages, *decode_half.Messages, Abort, EndAck, TokensWanted, RegisterWanted, RoleWanted, PeerLost,
    GatewayLost, GatewayBack, Adopt,
)  # fmt: skip
"""What a worker's mailbox takes."""


class WorkerMachine:
    """``handle``, ``schedule`` and ``update`` take the time and return actions; the shell performs them."""

    early = PrefillMachine.early

    def __init__(
        self,
        settings: WorkerSettings,
        scheduler: Scheduler,
        pool: BlockPool,
        handoffs: Handoffs,
        reservations: Reservations,
    ) -> None:
        self._shared = shared = Shared(settings, scheduler, pool)
        self.membership: Membership = shared.membership
        self._scheduler = scheduler
        self._pool = pool
        self._deliveries = shared.deliveries
        self._pace = StepPace(STEP_SECONDS, scheduler.max_num_batched_tokens)
        self._orphans = Orphans()
        self._begun = 0.0
        """When the step that runs was planned."""
        self.decode = DecodeMachine(shared, reservations)
        self.prefill = PrefillMachine(shared, handoffs, self.decode.release)
        shared.stops += [self.prefill.stop, self.decode.stop]
        self.membership.transfer_cost = handoffs.transfer_cost
        self._halves: dict[type, PrefillMachine | DecodeMachine] = {
            **dict.fromkeys(PrefillMachine.takes, self.prefill),
            **dict.fromkeys(DecodeMachine.takes, self.decode),
        }

    @property
    def traces(self) -> list[TransferTrace]:
        """Of the hand-overs from here that have ended last."""
        return list(self.prefill.traces)

    @property
    def wake_at(self) -> float:
        """When ``tick`` has something to do at the latest."""
        halves = min(self.prefill.wake_at, self.decode.wake_at)
        return min(self.membership.report_at, self._deliveries.wake_at, self._orphans.wake_at, halves)

    @property
    def listens(self) -> bool:
        """Whether one of ``early`` may come while the step runs that was planned last."""
        return self.prefill.listens

    def handle(self, event: Any, now: float) -> list[Any]:
        """One message, or one answer of the transport."""
        half = self._halves.get(type(event))
        if half is not None:
            return half.handle(event, now)
        match event:
            case Digested(key):
                return self.prefill.handle(event, now) if self.prefill.sends(key) else self.decode.handle(event, now)
            case Abort():
                self._shared.fences.raise_to(event.request, event.attempt)
                if event.keep:
                    self._deliveries.keep(event.request, event.attempt, now)
                return self._shared.stop(event.request, event.attempt, "the gateway wants no more of it", now)
            case EndAck():
                if event.keep:
                    self._deliveries.keep(event.request, event.attempt, now)
                else:
                    self._deliveries.close(event.request, event.attempt)
                return []
            case TokensWanted():
                return self._tokens_wanted(event)
            case RegisterWanted():
                return [*self.membership.wanted(event)]
            case PeerLost() | GatewayLost() | GatewayBack() | RoleWanted():
                return self._told(event, now)
            case Adopt():
                return self._adopt(event, now)
        raise AssertionError(f"nobody here takes {event}")

    def tick(self, now: float) -> list[Any]:
        """What is due by the clock."""
        actions: list[Any] = [*self.prefill.tick(now), *self.decode.tick(now), *self._deliveries.tick(now)]
        for gateway in self._orphans.dropped(now):
            actions += self._drop_orphans(gateway, now)
        actions += [Forget(gateway) for gateway in self._orphans.forgotten(now)]
        self.membership.prefill_rate.forget_old(now)
        actions += self.membership.report(
            block_counts(self._pool),
            cache_counts(self._pool, self._scheduler),
            lambda: both(self.prefill.counts(now), self.decode.counts(now)),
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting + self.decode.num_incoming,
            gateways=lambda: (*self._deliveries.gateways(), *self.prefill.gateways(), *self.decode.gateways()),
            lost_gateways=self._orphans,
            left=self.prefill.num_left + self.decode.num_incoming + len(self._deliveries),
            now=now,
        )
        return actions

    def schedule(self, now: float) -> tuple[StepPlan | None, list[Any]]:
        """The next step, with what to open and push before it runs. Sequences already here come first; what they leave
        is promised to those that knock."""
        plan = self._scheduler.schedule(self._pace.budget)
        self._begun = now
        actions: list[Any] = []
        if plan is not None:
            actions += self.membership.announce(self._pace.expected(int(plan.num_tokens.sum())))
            actions += self.prefill.planned(plan, now)
        return plan, [*actions, *self.decode.admit(plan, now)]

    def update(self, plan: StepPlan, output: StepOutput, now: float) -> list[Any]:
        """The step has run: deliver its tokens, push what is complete."""
        self.membership.steps += 1
        seconds = now - self._begun
        self._pace.took(int(plan.num_tokens.sum()), seconds)
        prompt_tokens = int(plan.num_tokens[plan.num_tokens > 1].sum())
        if prompt_tokens >= MEASURED:  # what the others of the step took is counted in: rather too slow than too fast
            self.membership.prefill_rate.took(prompt_tokens, seconds, now)
        actions: list[Any] = []
        for progress in self._scheduler.update(plan, output):
            if progress.seq.hand_over:
                actions += self.prefill.progressed(progress, now)
            else:
                actions += self.decode.progressed(progress)
        return [*self._deliveries.flush(now), *actions]

    def fail_step(self, plan: StepPlan, detail: str, now: float) -> list[Any]:
        """The step could not run: its sequences' attempts fail, the worker goes on."""
        self._scheduler.failed(plan)
        actions: list[Any] = []
        for seq in plan.sequences:
            half = self.prefill if seq.hand_over else self.decode
            actions += half.fail(RequestId(seq.seq_id), FailReason.ENGINE, detail)
        return actions

    def leave(self, now: float) -> list[Any]:
        """Out of the membership; every attempt goes back to its gateway."""
        detail = "the worker is shutting down"
        return [self.membership.leave(), *self.prefill.leave(detail), *self.decode.leave(detail, now)]

    def has(self, key: TransferKey) -> bool:
        """Whether an attempt is here: it is computed, its KV is on its way out or in, or it runs."""
        return self.prefill.has(key) or self.decode.has(key)

    def check_integrity(self) -> None:
        """Every held block belongs to an attempt of one of the halves."""
        self._pool.check_integrity()
        self._scheduler.check_integrity()
        self.prefill.check_integrity()
        self.decode.check_integrity()
        held = self.prefill.blocks_held + self.decode.blocks_held
        assert held == self._pool.num_references, f"{held} blocks have an owner, of {self._pool.num_references}"

    def inspect(self) -> dict[str, int]:
        """What is here now, and the pool's accounting; for status pages and tests."""
        counts = asdict(self._pool.counts()) | structs.asdict(cache_counts(self._pool, self._scheduler))
        own = {"deliveries": len(self._deliveries), "forged": self._shared.forged}
        halves = self.prefill.inspect() | self.decode.inspect()
        return counts | halves | own | structs.asdict(self.membership.decisions.counts())

    def _tokens_wanted(self, event: TokensWanted) -> list[Any]:
        request, attempt = event.request, event.attempt
        known = request in self._deliveries or self.has(TransferKey(request, attempt))
        if known or self._shared.fences.admits(request, attempt):  # it is here, or may be on its way
            return [*self._deliveries.resend(request, attempt, event.index)]
        again = self._shared.failed_before(request, attempt)
        detail = "nothing is known of it any more"
        return again or [self._shared.failed(request, attempt, event.gateway, FailReason.UNKNOWN, detail)]

    def _told(self, event: PeerLost | GatewayLost | GatewayBack | RoleWanted, now: float) -> list[Any]:
        """The router's word on who is there, and as what."""
        if not genuine(self._shared.settings.cluster_key, event):
            self._shared.forged += 1
            return []
        if isinstance(event, PeerLost):
            return self._peer_lost(event, now)
        if isinstance(event, RoleWanted):
            return [*self.membership.become(event)]
        self._orphans.heard(event, now)
        return []

    def _drop_orphans(self, gateway: Address, now: float) -> list[Any]:
        """Nobody has adopted what ``gateway`` left behind. It hears of that, in case it was only slow."""
        detail = "its gateway was taken for lost"
        actions = [*self.prefill.drop(gateway, detail), *self.decode.drop(gateway, detail, now)]
        self._deliveries.close_all(gateway)
        return actions

    def _peer_lost(self, event: PeerLost, now: float) -> list[Any]:
        lost = (event.peer.worker, event.peer.epoch)
        actions: list[Any] = [
            *self.prefill.peer_lost(*lost, dead=event.dead),
            *self.decode.peer_lost(*lost, dead=event.dead, now=now),
        ]
        if event.dead:
            self._shared.peers.discard(event.peer.mailbox)
            actions.append(ForgetPeer(event.peer))
        return actions

    def _adopt(self, event: Adopt, now: float) -> list[Any]:
        """Another gateway goes on with a request: from now on its tokens go there, and there only."""
        if not genuine(self._shared.settings.cluster_key, event):
            self._shared.forged += 1
            return []
        request, gateway = event.request, event.gateway
        own = structs.replace(self._shared.settings.address, kv=())
        found = self._deliveries.adopt(request, gateway, event.number, now)
        if found is not None:
            self._shared.fences.raise_to(request, found.attempt)
            self.decode.belongs_to(request, found.attempt, gateway)
            attempt, work, made = found.attempt, found.generation, found.tokens
            adopted = Adopted(request=request, attempt=attempt, worker=own, generation=work, tokens=made, running=True)
            return [*found.sends, Send(gateway, adopted)]
        order = self.prefill.order(request) or self.decode.order(request)
        if order is None or not order.generation.description:
            return [Send(gateway, NotHere(request=request, worker=own.worker))]
        work = order.generation
        nothing = TokenChunk(request, order.attempt, count_tokens(work.generated), b"")
        adopted = Adopted(
            request=request, attempt=order.attempt, worker=own, generation=work, tokens=nothing, running=False
        )
        superseded = Superseded(request=request, attempt=order.attempt, worker=own.worker)
        return [Send(order.gateway, superseded)] * (order.gateway != gateway) + [Send(gateway, adopted)]

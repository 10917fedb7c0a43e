"""Hand-overs under way: blocks pinned for a peer until it acks, or until nothing reads them any more."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from engine.core.blocks import BlockPool
from engine.core.sequence import Sequence
from kv_transfer.core.events import Cancelled, Pushed, PushFailed, TransferKey
from kv_transfer.core.lanes import CannotPair, Route
from kv_transfer.core.sending import SendSession, SendState
from kv_transfer.core.session import Action as SessionAction
from kv_transfer.core.session import CancelPushes, Digested, Ended, Outcome, Push, TakeDigests, TransferTimeouts
from kv_transfer.core.stats import TransferStats
from kv_transfer.core.trace import TransferTrace
from kv_transfer.core.ways import choose, route
from messages.common import AbortReason, KVRank, TransferCounts, WorkerAddress
from messages.decode_to_prefill import (
    BlocksWanted,
    CancelTransfer,
    TransferAccepted,
    TransferAcked,
    TransferPending,
    TransferRefused,
)
from messages.gateway_to_worker import Prefill
from messages.ids import Attempt, Epoch, RequestId, WorkerId
from messages.prefill_to_decode import FirstToken, OpenTransfer, TailYielded
from prefill_worker.core.patience import patience
from prefill_worker.core.yields import Yields
from runtime.core.actions import ForgetPeer, Send
from runtime.core.probe import ProbeEnded
from runtime.core.recent import RecentCost

PeerMessage = TransferAccepted | TransferPending | TransferRefused | TransferAcked | BlocksWanted | CancelTransfer
TransportAnswer = Pushed | PushFailed | Cancelled | Digested


class HandoffEnded(NamedTuple):
    """The blocks are free again; the machine tells the gateway where it ended badly."""

    order: Prefill
    outcome: Outcome
    detail: str
    retryable: bool
    trace: TransferTrace
    aborted: AbortReason | None


class HandoffDrags(NamedTuple):
    """It is given up, since another way is quicker; when its blocks are free it ends as failed."""

    order: Prefill
    detail: str


Action = Send | Push | CancelPushes | TakeDigests | ForgetPeer | ProbeEnded
Step = Action | HandoffDrags | HandoffEnded


@dataclass(slots=True)
class _Handoff:
    order: Prefill
    seq: Sequence
    transport: str
    session: SendSession
    opened: float
    """When the first of its prompt was to be computed."""
    probe: bool = False
    aborted: AbortReason | None = None
    """Why it was given up, once it is."""
    peer_dead: bool = False
    """Nobody reads what would be sent to the decode worker."""


class Handoffs:
    """All hand-overs of one prefill worker, by attempt."""

    def __init__(
        self,
        address: WorkerAddress,
        ranks: tuple[KVRank, ...],
        pool: BlockPool,
        timeouts: TransferTimeouts,
    ) -> None:
        """``ranks``: this worker's KV, and the ways out of it."""
        self._address = address
        self._ranks = ranks
        self._pool = pool
        self._timeouts = timeouts
        self._open: dict[TransferKey, _Handoff] = {}
        self._stats = TransferStats()
        self._failed: dict[tuple[WorkerId, Epoch], set[str]] = {}
        """Transports by which a decode worker could not be written to: the next attempt goes another way, if any."""
        self._yields = Yields(timeouts.resend, timeouts.open)
        self._costs: dict[WorkerId, RecentCost] = {}
        """Of hand-overs to each decode worker."""
        self.transfer_cost = RecentCost()
        """Of all hand-overs by their KV bytes, from the computed prompt to the ack."""

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, key: TransferKey) -> bool:
        return key in self._open

    @property
    def blocks_held(self) -> int:
        """Blocks that wait for an ack or for the transport."""
        return sum(len(handoff.seq.block_table) for handoff in self._open.values())

    def check_integrity(self) -> None:
        """Every pin belongs to a hand-over."""
        pins, _ = self._pool.num_claimed()
        assert pins == self.blocks_held, f"{self.blocks_held} blocks are to be read, {pins} are pinned"

    def counts(self, _now: float) -> TransferCounts:
        """For the worker's report."""
        return self._stats.counts(in_flight=len(self._open))

    @property
    def wake_at(self) -> float:
        sessions = min((handoff.session.wake_at for handoff in self._open.values()), default=float("inf"))
        return min(sessions, self._yields.wake_at)

    @property
    def listens(self) -> bool:
        """Whether an accept may come."""
        return any(handoff.session.state is SendState.OPENING for handoff in self._open.values())

    @property
    def num_left(self) -> int:
        """What a peer still has to ack."""
        return len(self._open) + len(self._yields)

    @property
    def num_yielded(self) -> int:
        """Prompts that were left to their decode workers, since the start."""
        return self._stats.aborts[AbortReason.YIELDED]

    def misfit(self, decode: WorkerAddress) -> str:
        """Why KV cannot be handed over to ``decode``; empty where it can."""
        try:
            self._route(decode)
        except CannotPair as error:
            return f"{decode.worker}: {error}"
        return ""

    def _route(self, decode: WorkerAddress) -> Route:
        avoid = self._failed.get((decode.worker, decode.epoch), ())
        return route(choose(self._ranks, decode.kv, avoid), self._ranks, decode.kv)

    def open(
        self, order: Prefill, seq: Sequence, now: float, prefill_rate: float = 0.0, *, probe: bool = False
    ) -> list[Step]:
        """Ask decode for room; from here on the sequence's blocks are freed by the hand-over's end.

        ``prefill_rate``: tokens a second, for decode to judge by whether it had better compute the prompt itself; 0
        while it is not known.
        """
        key = TransferKey(order.request, order.attempt)
        way = self._route(order.decode)
        cost = self._cost_to(order.decode.worker)
        cost.forget_old(now)
        message = OpenTransfer(
            request=order.request,
            attempt=order.attempt,
            prefill=self._address,
            gateway=order.gateway,
            generation=order.generation,
            transport=way.transport,
            ranks=self._ranks,
            ticket=order.ticket,
            probe=probe,
            cached_tokens=seq.num_cached_tokens,
            prefill_rate=prefill_rate,
            transfer_latency=cost.value.latency,
            transfer_rate=cost.value.rate,
        )
        session = SendSession(key, message, way, self._timeouts)
        self._pool.pin(seq.block_table)
        self._open[key] = _Handoff(order, seq, way.transport, session, now, probe)
        return self._steps(key, session.open(now))

    def computing(self, key: TransferKey, coming: int, now: float) -> list[Step]:
        """The step that is to run next makes the sequence's leading ``coming`` blocks final."""
        handoff = self._open[key]
        return self._steps(key, handoff.session.computing(handoff.seq.block_table, coming, now))

    def computed(self, key: TransferKey, ready: int, now: float) -> list[Step]:
        """The KV of the sequence's leading ``ready`` blocks is final."""
        handoff = self._open[key]
        return self._steps(key, handoff.session.computed(handoff.seq.block_table, ready, now))

    def end(
        self, key: TransferKey, first: FirstToken, now: float, num_bytes: int = 0, prefill_rate: float = 0.0
    ) -> list[Step]:
        """The prompt is computed, and its KV has ``num_bytes``. ``prefill_rate``: tokens a second, 0 if not known."""
        handoff = self._open[key]
        wait = float("inf")
        if key.attempt == 1 and not handoff.probe:  # who has gone another way once stays there, slow or not
            seq, decode = handoff.seq, handoff.order.decode.worker
            compute = (now - handoff.opened) * seq.num_tokens / max(1, seq.num_tokens - seq.num_cached_tokens)
            if prefill_rate > 0:  # of a prompt that was mostly cached, what it took says little of the rest
                compute = min(compute, seq.num_tokens / prefill_rate)
            others = [cost.value for worker, cost in self._costs.items() if worker != decode]
            wait = patience(compute, num_bytes, others)
        return self._steps(key, handoff.session.end(first, now, wait))

    def give_up(self, key: TransferKey, detail: str) -> list[Step]:
        return self._steps(key, self._open[key].session.give_up(detail), AbortReason.WITHDRAWN)

    def leave_to_decode(self, key: TransferKey, now: float) -> Send | None:
        """Decode offers to compute the prompt. It may where nothing has been pushed: then the hand-over is over, its
        blocks are free, and this says so to decode. None where it goes on."""
        handoff = self._open[key]
        if handoff.session.state is not SendState.OPENING:
            return None
        handoff.session.give_up("decode computes the prompt")  # which the message below says, and more
        del self._open[key]
        self._pool.unpin(handoff.seq.block_table)
        self._pool.free(handoff.seq.block_table)
        self._stats.sent(handoff.session.trace, AbortReason.YIELDED)
        message = TailYielded(request=key.request, attempt=key.attempt, mailbox=self._address.mailbox)
        return self._yields.tell(handoff.order.decode, message, now)

    def fence(self, request: RequestId, attempt: Attempt) -> None:
        """What was left to decode of attempts up to ``attempt`` is over."""
        self._yields.fence(request, attempt)

    def peer_lost(self, worker: WorkerId, epoch: Epoch, *, dead: bool) -> list[Step]:
        """A decode worker is gone: every hand-over to it fails."""
        steps: list[Step] = []
        if dead:
            self._failed.pop((worker, epoch), None)
        self._yields.peer_lost(worker, epoch)
        self._costs.pop(worker, None)
        for key, handoff in list(self._open.items()):
            if (handoff.order.decode.worker, handoff.order.decode.epoch) == (worker, epoch):
                handoff.peer_dead = dead
                steps += self._steps(
                    key, handoff.session.give_up("the decode worker was lost", Outcome.FAILED), AbortReason.PEER_LOST
                )
        return steps

    def handle(self, event: PeerMessage | TransportAnswer, now: float) -> list[Step]:
        """An answer of the peer or of the transport; one that comes too late is dropped."""
        key = event.key if isinstance(event, TransportAnswer) else TransferKey(event.request, event.attempt)
        handoff = self._open.get(key)
        if handoff is None:
            if isinstance(event, TransferAcked):
                self._yields.acked(key)
            return []
        actions = handoff.session.handle(event, now)
        if isinstance(event, PushFailed) and actions:  # else given up before, as when the step has failed
            self._avoid(handoff)
        steps = self._steps(key, actions, _reason(event))
        if isinstance(event, TransferAcked) and key not in self._open and not handoff.probe:
            trace = handoff.session.trace
            for cost in (self.transfer_cost, self._cost_to(handoff.order.decode.worker)):
                cost.took(trace.num_bytes, trace.acked - trace.computed, now)
        return steps

    def _avoid(self, handoff: _Handoff) -> None:
        """Go another way to the decode worker from now on, if there is one."""
        decode = handoff.order.decode
        self._failed.setdefault((decode.worker, decode.epoch), set()).add(handoff.transport)

    def _cost_to(self, decode: WorkerId) -> RecentCost:
        return self._costs.setdefault(decode, RecentCost())

    def tick(self, now: float) -> list[Step]:
        self.transfer_cost.forget_old(now)
        told: list[Step] = [*self._yields.tick(now)]
        for key, handoff in [item for item in self._open.items() if item[1].session.wake_at <= now]:
            session = handoff.session
            if session.drags(now):
                if session.stands_still:
                    self._avoid(handoff)
                detail = f"KV leaves for {handoff.order.decode.worker} more slowly than another way would take"
                told.append(HandoffDrags(handoff.order, detail))
                told += self._steps(key, session.give_up(detail, Outcome.FAILED), AbortReason.TIMEOUT)
            else:
                told += self._steps(key, session.tick(now), AbortReason.TIMEOUT)
        return told

    def older_than(self, request: RequestId, attempt: Attempt) -> list[TransferKey]:
        """Hand-overs of attempts of ``request`` up to and including ``attempt``."""
        return [key for key in self._open if key.request == request and key.attempt <= attempt]

    def _steps(
        self, key: TransferKey, actions: Iterable[SessionAction], reason: AbortReason = AbortReason.INTEGRITY
    ) -> list[Step]:
        """``reason``: why the hand-over is given up, if it just was."""
        handoff = self._open[key]
        if handoff.aborted is None and handoff.session.state in (SendState.CLOSING, SendState.CLOSED):
            handoff.aborted = reason
        steps: list[Step] = []
        for action in actions:
            match action:
                case Ended():
                    del self._open[key]
                    self._pool.unpin(handoff.seq.block_table)
                    self._pool.free(handoff.seq.block_table)
                    trace = handoff.session.trace
                    aborted = None if action.outcome is Outcome.DONE else handoff.aborted
                    if not handoff.probe:
                        self._stats.sent(trace, aborted)
                    ended = (action.outcome, action.detail, action.retryable, trace, aborted)
                    steps.append(HandoffEnded(handoff.order, *ended))
                case Push() | CancelPushes() | TakeDigests():
                    steps.append(action)
                case message if not handoff.peer_dead:
                    steps.append(Send(handoff.order.decode.mailbox, message))  # type: ignore[arg-type]
        return steps


def _reason(event: PeerMessage | TransportAnswer) -> AbortReason:
    """Why a hand-over is given up with ``event``, if it is."""
    match event:
        case TransferRefused():
            return AbortReason.REFUSED
        case CancelTransfer():
            return AbortReason.PEER
        case PushFailed():
            return AbortReason.TRANSPORT
    return AbortReason.INTEGRITY

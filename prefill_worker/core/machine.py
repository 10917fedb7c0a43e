"""The prefill half of a worker: the first leg of a request.

1. ``Prefill`` arrives. It is checked, and waits until the pool has blocks for the whole prompt; those that are cached
   need not be computed.
2. When its first chunk is scheduled, a transfer to the decode worker is opened.
3. Before each chunk, the blocks that it will complete are pushed live: each layer leaves while the next one computes.
   Decode's accept is handled while a chunk is computed, and the blocks of that chunk are pushed live from then on.
4. The first token goes straight to the gateway; the transfer ends with it.
5. The blocks stay pinned until decode's ack (``handoff.py``); then nothing of the request is left here.

Decode may offer to compute the prompt itself (``TailOffered``). As long as nothing was pushed and no token sampled, it
is left to it: 3 to 5 fall away.

A newer attempt of a request, or ``Abort``, ends an older one wherever it stands; an older one that comes late is
dropped. Where the older one has been decoded here, the newer one moves it: it goes on with its blocks, and computes no
more than the last token again.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from engine.core.scheduler import Progress, StepPlan
from engine.core.sequence import Sequence
from kv_transfer.core.events import Cancelled, Pushed, PushFailed, TransferKey
from kv_transfer.core.session import Digested, Outcome
from kv_transfer.core.trace import TransferTrace
from messages.codec import count_tokens
from messages.common import AbortReason, FailReason, Generation, TransferCounts
from messages.decode_to_prefill import (
    BlocksWanted,
    CancelTransfer,
    TailOffered,
    TransferAccepted,
    TransferAcked,
    TransferPending,
    TransferRefused,
)
from messages.gateway_to_worker import Prefill
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.prefill_to_decode import FirstToken, TransferClosed
from messages.sampling import FinishReason
from messages.tickets import valid_between
from prefill_worker.core.handoff import Action, HandoffDrags, HandoffEnded, Handoffs, Step
from runtime.core.actions import Send
from runtime.core.probe import NO_ROOM, ProbeEnded, ProbeStopped, ProbeWanted, probe_order
from runtime.core.shared import Shared
from runtime.core.work import NOT_NUMBERS, sequence, wire_logprobs

Messages = (
    Prefill, TransferAccepted, TransferPending, TransferRefused, TransferAcked, BlocksWanted, CancelTransfer,
    TailOffered,
)  # fmt: skip
"""What a worker's mailbox takes for this half alone."""

TransferEvent = (
    TransferAccepted | TransferPending | TransferRefused | TransferAcked | BlocksWanted | CancelTransfer
    | Pushed | PushFailed | Cancelled | Digested
)  # fmt: skip
TRACES = 256
TakeOver = Callable[[RequestId, Generation], Sequence | None]
"""Stop decoding a request here, and get its sequence; None where that is of no use."""
Event = Prefill | TransferEvent | TailOffered | ProbeWanted | ProbeStopped


@dataclass(slots=True)
class _Leg:
    """One attempt between its arrival and its first token."""

    order: Prefill
    seq: Sequence
    opened: bool = False
    """Whether the hand-over has been opened, which frees the blocks from then on."""

    @property
    def key(self) -> TransferKey:
        return TransferKey(self.order.request, self.order.attempt)

    @property
    def single_token(self) -> bool:
        """Whether the first token is the last in any case: nothing is handed over."""
        generation = self.order.generation
        return generation.sampling.max_tokens <= count_tokens(generation.generated) + 1


class PrefillMachine:
    """``handle``, ``planned`` and ``progressed`` return actions; the shell performs them."""

    early = (TransferAccepted,)
    """May be handled while a step runs: they only push, or cancel a push. No block is given up with them, and no
    sequence leaves the plan."""
    takes = (*Messages, Pushed, PushFailed, Cancelled, ProbeWanted, ProbeStopped)

    def __init__(self, shared: Shared, handoffs: Handoffs, take_over: TakeOver) -> None:
        self._shared = shared
        self._settings = shared.settings
        self._scheduler = shared.scheduler
        self._pool = shared.pool
        self._deliveries = shared.deliveries
        self._handoffs = handoffs
        self._take_over = take_over
        self._legs: dict[RequestId, _Leg] = {}
        self._probes: set[RequestId] = set()
        """Under way."""
        self.traces: deque[TransferTrace] = deque(maxlen=TRACES)
        """Of the hand-overs that have ended last."""

    @property
    def wake_at(self) -> float:
        """When ``tick`` has something to do at the latest."""
        return self._handoffs.wake_at

    @property
    def listens(self) -> bool:
        """Whether one of ``early`` may come while the step runs that was planned last."""
        return self._handoffs.listens

    @property
    def blocks_held(self) -> int:
        owned = [len(leg.seq.block_table) for leg in self._legs.values() if not leg.opened]
        return sum(owned) + self._handoffs.blocks_held

    @property
    def num_left(self) -> int:
        """Legs, hand-overs and prompts left to decode that are not over."""
        return sum(not leg.opened for leg in self._legs.values()) + self._handoffs.num_left

    def sends(self, key: TransferKey) -> bool:
        """Whether a hand-over from here is under way."""
        return key in self._handoffs

    def counts(self, now: float) -> TransferCounts:
        """For the worker's report."""
        return self._handoffs.counts(now)

    def handle(self, event: Event, now: float) -> list[Action]:
        """One message, or one answer of the transport."""
        match event:
            case Prefill():
                return self._arrived(event, now)
            case ProbeWanted():
                return self._probe(event, now)
            case ProbeStopped():
                return self.stop(event.request, Attempt(1), event.detail, now)
            case CancelTransfer() | TailOffered() if event.mailbox not in self._shared.peers:
                self._shared.forged += 1
                return []
            case CancelTransfer() if TransferKey(event.request, event.attempt) not in self._handoffs:
                reason, epoch = "nothing is being sent", self._settings.address.epoch
                closed = TransferClosed(request=event.request, attempt=event.attempt, reason=reason, epoch=epoch)
                return [Send(event.mailbox, closed)]
            case TailOffered():
                return self._tail_offered(event, now)
            case Pushed(num_bytes=num_bytes):
                self._shared.membership.kv_bytes_sent += num_bytes
                return self._settle(self._handoffs.handle(event, now))
            case _:
                return self._settle(self._handoffs.handle(event, now))

    def tick(self, now: float) -> list[Action]:
        """What is due by the clock."""
        return self._settle(self._handoffs.tick(now))

    def planned(self, plan: StepPlan, now: float) -> list[Action]:
        """This step is to run next: the transfers to open, and what to push, before it does."""
        if not self._legs:
            return []
        steps: list[Step] = []
        ends = (plan.num_computed + plan.num_tokens).tolist()
        for seq, end, last in zip(plan.sequences, ends, plan.samples.tolist(), strict=True):
            if not seq.hand_over:
                continue
            leg = self._legs[RequestId(seq.seq_id)]
            if not leg.opened and not leg.single_token:
                leg.opened = True
                steps += self._handoffs.open(leg.order, seq, now, self._shared.membership.prefill_rate.value)
                # What was cached can go while the rest computes.
                steps += self._handoffs.computed(leg.key, seq.num_final_blocks, now)
            if leg.opened:
                coming = len(seq.block_table) if last else end // self._pool.block_size
                steps += self._handoffs.computing(leg.key, coming, now)
        return self._settle(steps)

    def progressed(self, progress: Progress, now: float) -> list[Action]:
        """What the step did for one leg: push what is complete, deliver its first token."""
        request = RequestId(progress.seq.seq_id)
        leg = self._legs[request]
        if progress.finish_reason is FinishReason.ABORT:
            del self._legs[request]
            return [*self._settle(self._let_go(leg)), self._failed(leg.order, FailReason.ENGINE, NOT_NUMBERS)]
        if progress.handed_over or progress.finish_reason is not None:
            del self._legs[request]
            return self._settle(self._arrive(leg, progress, now))
        if not leg.opened:
            return []
        ready = progress.num_computed_tokens // self._pool.block_size
        return self._settle(self._handoffs.computed(leg.key, ready, now))

    def fail(self, request: RequestId, reason: FailReason, detail: str) -> list[Action]:
        """Give a leg up."""
        leg = self._legs[request]
        return [*self._drop(leg, detail), self._failed(leg.order, reason, detail)]

    def stop(self, request: RequestId, attempt: Attempt, detail: str, _now: float) -> list[Action]:
        """End every attempt of ``request`` up to ``attempt``, without a word to the gateway."""
        self._handoffs.fence(request, attempt)
        actions: list[Action] = []
        leg = self._legs.get(request)
        if leg is not None and leg.order.attempt <= attempt:
            actions += self._drop(leg, detail)
        for key in self._handoffs.older_than(request, attempt):
            actions += self._settle(self._handoffs.give_up(key, detail))
        return actions

    def peer_lost(self, worker: WorkerId, epoch: Epoch, *, dead: bool) -> list[Action]:
        """Another worker has left the membership."""
        return self._settle(self._handoffs.peer_lost(worker, epoch, dead=dead))

    def leave(self, detail: str) -> list[Action]:
        """Every attempt whose prompt is not computed goes back to its gateway."""
        return [action for request in [*self._legs] for action in self.fail(request, FailReason.STOPPING, detail)]

    def gateways(self) -> list[Address]:
        """Whose prompts are here."""
        return [leg.order.gateway for leg in self._legs.values()]

    def drop(self, gateway: Address, detail: str) -> list[Action]:
        """Give up all prompts of a gateway. What is being handed over is decode's to keep or to drop."""
        requests = [request for request, leg in self._legs.items() if leg.order.gateway == gateway]
        return [action for request in requests for action in self.fail(request, FailReason.ORPHANED, detail)]

    def order(self, request: RequestId) -> Prefill | None:
        """Of an attempt whose prompt is to be computed."""
        leg = self._legs.get(request)
        return None if leg is None else leg.order

    def has(self, key: TransferKey) -> bool:
        """Whether an attempt is here: its prompt is to be computed, or its KV handed over."""
        leg = self._legs.get(key.request)
        return key in self._handoffs or (leg is not None and leg.order.attempt == key.attempt)

    def check_integrity(self) -> None:
        """Every pin belongs to a hand-over."""
        self._handoffs.check_integrity()

    def inspect(self) -> dict[str, int]:
        """What is here now."""
        return {
            "legs": len(self._legs),
            "handoffs": len(self._handoffs),
            "tails_yielded": self._handoffs.num_yielded,
        }

    def _tail_offered(self, event: TailOffered, now: float) -> list[Action]:
        leg = self._legs.get(event.request)
        if leg is None or leg.order.attempt != event.attempt or leg.key not in self._handoffs:
            return []  # its first token is there, or the attempt is over
        yielded = self._handoffs.leave_to_decode(leg.key, now)
        if yielded is None:
            return []
        del self._legs[event.request]
        self._scheduler.remove(event.request)
        return [yielded]

    def _arrived(self, order: Prefill, now: float) -> list[Action]:
        own = self._settings.address
        if not valid_between(self._settings.cluster_key, order.ticket, order.request, order.attempt, own, order.decode):
            self._shared.forged += 1
            return []  # nor is anything sent to where it says that it comes from
        self._shared.peers.add(order.decode.mailbox)
        if not self._shared.fences.admits(order.request, order.attempt):
            return self._shared.failed_before(order.request, order.attempt)  # asked again, or late
        detail = "a newer attempt has come"
        reason = self._shared.misfit(order.generation)
        if reason:
            actions = self._shared.stop(order.request, order.attempt, detail, now)
            return [*actions, self._failed(order, FailReason.CAPACITY, reason)]
        reason = self._handoffs.misfit(order.decode)
        if reason:
            actions = self._shared.stop(order.request, order.attempt, detail, now)
            return [*actions, self._failed(order, FailReason.REFUSED, reason)]
        self._shared.fences.raise_to(order.request, order.attempt)
        running = self._take_over(order.request, order.generation)
        actions = self._shared.stop(order.request, order.attempt, detail, now)
        leg = _Leg(order, self._sequence(order, running))
        self._legs[order.request] = leg
        self._scheduler.add(leg.seq, arrival=None if running is None else running.arrival)
        return actions

    def _sequence(self, order: Prefill, running: Sequence | None) -> Sequence:
        """Of a leg. ``running``: has been decoded here so far; the leg goes on with its blocks, and in its place."""
        if running is None:
            return sequence(order.request, order.generation, hand_over=True)
        num_tokens, blocks = order.generation.num_tokens, running.take_blocks()
        needed = -(-num_tokens // self._pool.block_size)
        self._pool.free(blocks[needed:])
        computed = min(running.num_computed_tokens, num_tokens - 1)
        seq = sequence(
            order.request, order.generation, blocks=blocks[:needed], num_computed_tokens=computed, hand_over=True
        )
        seq.num_cached_tokens = computed
        seq.shared_tail = True  # the last token is computed again, and may stand in a block that others read
        return seq

    def _probe(self, wanted: ProbeWanted, now: float) -> list[Action]:
        """Hand over blocks that nobody owns, if no prompt waits for them."""
        problem = self._handoffs.misfit(wanted.decode)
        if problem:
            return [ProbeEnded(wanted.request, problem)]
        blocks = None if self._scheduler.num_waiting else self._pool.allocate(wanted.num_blocks)
        if blocks is None:
            return [ProbeEnded(wanted.request, f"{self._settings.address.worker}: {NO_ROOM}")]
        order = probe_order(wanted, self._settings.address, self._pool.block_size, self._settings.cluster_key)
        self._shared.peers.add(order.decode.mailbox)
        self._probes.add(wanted.request)
        return self._settle([
            *self._handoffs.open(order, sequence(wanted.request, order.generation, blocks=blocks), now, probe=True),
            *self._handoffs.computed(wanted.key, wanted.num_blocks, now),
            *self._handoffs.end(wanted.key, FirstToken(0), now),
        ])  # fmt: skip

    def _probed(self, ended: HandoffEnded) -> ProbeEnded:
        self._probes.remove(ended.order.request)
        trace = ended.trace
        problem = "" if ended.outcome is Outcome.DONE else ended.detail or "it was given up"
        if ended.outcome is Outcome.REFUSED:
            problem = f"{ended.order.decode.worker}: {problem}"
        return ProbeEnded(
            ended.order.request,
            problem,
            trace.num_bytes,
            answer_seconds=trace.accepted - trace.opened,
            push_seconds=trace.last_byte - trace.first_push,
            whole_seconds=trace.acked - trace.opened,
        )

    def _arrive(self, leg: _Leg, progress: Progress, now: float) -> list[Step]:
        """The leg's sequence is through: deliver the first token, end the hand-over or drop it."""
        order = leg.order
        logprobs = None if progress.logprobs is None else wire_logprobs([progress.logprobs])
        prompt_logprobs = wire_logprobs(progress.prompt_logprobs)
        start = count_tokens(order.generation.generated)
        cached = min(leg.seq.num_cached_tokens, leg.seq.num_prompt_tokens)
        self._deliveries.open(
            order.request, order.attempt, order.gateway, start, cached_tokens=cached, generation=order.generation
        )
        if prompt_logprobs is not None:
            self._deliveries.add_prompt_logprobs(order.request, prompt_logprobs)
        if progress.token is not None:
            self._deliveries.add(order.request, progress.token, logprobs)
        if progress.finish_reason is not None:
            self._deliveries.finish(order.request, progress.finish_reason)
            return self._let_go(leg)
        assert progress.token is not None
        self._deliveries.hand_over(order.request)  # decode has the first token too, and answers for it from here
        blocks = len(progress.seq.block_table)
        return [
            *self._handoffs.computed(leg.key, blocks, now),
            *self._handoffs.end(
                leg.key,
                FirstToken(progress.token, logprobs, prompt_logprobs),
                now,
                blocks * self._settings.block_bytes,
                self._shared.membership.prefill_rate.value,
            ),
        ]

    def _let_go(self, leg: _Leg) -> list[Step]:
        """Free the blocks of a leg whose sequence is over: now, or when nothing reads them any more."""
        if leg.opened:
            return self._handoffs.give_up(leg.key, "the first token was the last")
        self._pool.free(leg.seq.block_table)
        return []

    def _drop(self, leg: _Leg, detail: str) -> list[Action]:
        """Take a leg out of the queue, the engine and its hand-over."""
        del self._legs[leg.order.request]
        self._scheduler.remove(leg.seq.seq_id)
        if leg.key in self._handoffs:
            return self._settle(self._handoffs.give_up(leg.key, detail))
        if not leg.opened:
            self._pool.free(leg.seq.block_table)
        return []

    def _failed(self, order: Prefill, reason: FailReason, detail: str) -> Send:
        return self._shared.failed(order.request, order.attempt, order.gateway, reason, detail)

    def _settle(self, steps: list[Step]) -> list[Action]:
        """Pass actions on; where a hand-over ended badly, its attempt ends with it."""
        actions: list[Action] = []
        for step in steps:
            if isinstance(step, HandoffDrags):
                actions.append(self._failed(step.order, FailReason.SLOW, step.detail))
                continue
            if not isinstance(step, HandoffEnded):
                actions.append(step)
                continue
            if step.order.request in self._probes:
                actions.append(self._probed(step))
                continue
            self.traces.append(step.trace)
            self._shared.membership.transfers += step.outcome is Outcome.DONE
            leg = self._legs.get(step.order.request)
            if leg is not None and leg.order.attempt == step.order.attempt:
                del self._legs[step.order.request]
                self._scheduler.remove(step.order.request)
            if step.outcome in (Outcome.REFUSED, Outcome.FAILED):
                actions.append(self._failed(step.order, _reason(step), step.detail))
        return actions


def _reason(ended: HandoffEnded) -> FailReason:
    if not ended.retryable:
        return FailReason.CAPACITY
    if ended.aborted is AbortReason.PEER_LOST:
        return FailReason.PEER_LOST
    return FailReason.REFUSED if ended.outcome is Outcome.REFUSED else FailReason.TRANSFER

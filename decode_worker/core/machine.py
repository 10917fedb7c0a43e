"""The decode half of a worker: the rest of the relay, and the whole of it in a colocated pool.

1. ``OpenTransfer`` arrives from a prefill worker. Its ticket and layout are checked, and blocks are promised to it
   (``reservation.py``), now or when some become free.
2. The KV lands and is verified; the sequence joins the running batch with everything but its last token computed.
3. Each step's tokens go straight to the gateways, one batch each.
4. At the end the gateway acks; until then its tokens are kept here.

``Generate`` (a colocated pool, or a prompt that is cheaper to compute than to ship) starts at 3, with nothing computed.
So does an order of 1 of which nearly everything is cached, if the prefill worker agrees (``TailYielded``).

A newer attempt of a request, or ``Abort``, ends an older one wherever it stands; an older one that comes late is
dropped.
"""

from dataclasses import dataclass

import numpy as np

from decode_worker.core.reservation import Action, KVLanded, Reservations, Step, TailTaken
from engine.core.scheduler import Progress, StepPlan
from engine.core.sequence import Sequence
from kv_transfer.core.events import Landed, TransferKey
from kv_transfer.core.lanes import CannotPair
from kv_transfer.core.session import Digested, LandingOpened, WritersGone
from messages.codec import count_tokens, unpack_tokens
from messages.common import FailReason, Generation, TransferCounts
from messages.gateway_to_worker import Generate
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.prefill_to_decode import EndTransfer, OpenTransfer, TailYielded, TransferClosed, TransferProgress
from messages.sampling import FinishReason
from messages.tickets import valid_between
from runtime.core.disaggregation import Case, Reason, decide
from runtime.core.recent import Cost
from runtime.core.shared import Shared
from runtime.core.work import NOT_NUMBERS, sequence, wire_logprobs

Messages = (
    Generate, OpenTransfer, TransferProgress, EndTransfer, TransferClosed, TailYielded,
)  # fmt: skip
"""What a worker's mailbox takes for this half alone."""

TransferEvent = TransferProgress | EndTransfer | TransferClosed | LandingOpened | Landed | Digested | WritersGone
Event = Generate | OpenTransfer | TransferEvent | TailYielded


@dataclass(slots=True)
class _Run:
    """One attempt in the running batch."""

    attempt: Attempt
    gateway: Address
    seq: Sequence


class DecodeMachine:
    """``handle``, ``admit`` and ``progressed`` return actions; the shell performs them."""

    takes = (*Messages, LandingOpened, Landed, WritersGone)

    def __init__(self, shared: Shared, reservations: Reservations) -> None:
        self._shared = shared
        self._settings = shared.settings
        self._scheduler = shared.scheduler
        self._pool = shared.pool
        self._deliveries = shared.deliveries
        self._reservations = reservations
        self._runs: dict[RequestId, _Run] = {}

    @property
    def wake_at(self) -> float:
        """When ``tick`` has something to do at the latest."""
        return self._reservations.wake_at

    @property
    def num_incoming(self) -> int:
        """Attempts whose KV is on its way, or is to come."""
        return self._reservations.num_waiting + len(self._reservations)

    @property
    def blocks_held(self) -> int:
        return sum(len(run.seq.block_table) for run in self._runs.values()) + self._reservations.blocks_held

    def counts(self, now: float) -> TransferCounts:
        """For the worker's report."""
        return self._reservations.counts(now)

    def handle(self, event: Event, now: float) -> list[Action]:
        """One message, or one answer of the transport."""
        match event:
            case OpenTransfer():
                return self._opened(event, now)
            case Generate():
                return self._generate(event, now)
            case EndTransfer() | TailYielded() if event.mailbox not in self._shared.peers:
                self._shared.forged += 1
                return []
            case TailYielded():
                return self._settle(self._reservations.yielded(event, now))
            case _:
                return self._settle(self._reservations.handle(event, now))

    def tick(self, now: float) -> list[Action]:
        """What is due by the clock."""
        return self._settle(self._reservations.tick(now))

    def admit(self, plan: StepPlan | None, now: float) -> list[Action]:
        """``plan`` is to run next: promise what it leaves to those that knock."""
        if not self._reservations.num_waiting:
            return []
        # What the plan is to copy away may stand in blocks that are free by now: a landing must not write there before.
        leaving = plan is not None and self._pool.num_unheld(plan.moves.swap_out[:, 0])
        room = 0
        if not self._scheduler.num_waiting and not leaving:
            room = self._settings.max_num_seqs - self._scheduler.num_running - len(self._reservations)
        return self._settle(self._reservations.admit(room, self._scheduler.has_room, now, self._offers))

    def progressed(self, progress: Progress) -> list[Action]:
        """What the step did for one run: deliver its token."""
        if progress.finish_reason is FinishReason.ABORT:
            request = RequestId(progress.seq.seq_id)
            run = self._runs.pop(request)
            self._deliveries.close(request)
            return [self._shared.failed(request, run.attempt, run.gateway, FailReason.ENGINE, NOT_NUMBERS)]
        if progress.token is not None or progress.finish_reason is not None:
            self._deliver(progress)
        return []

    def fail(self, request: RequestId, reason: FailReason, detail: str) -> list[Action]:
        """Give a run up."""
        run = self._drop(request)
        self._deliveries.close(request)
        return [self._shared.failed(request, run.attempt, run.gateway, reason, detail)]

    def release(self, request: RequestId, generation: Generation) -> Sequence | None:
        """Stop running ``request`` and give its sequence away, blocks and all, for the prefill half to go on with: if
        there is one, and ``generation`` begins as it does."""
        run = self._runs.get(request)
        if run is None or run.seq.salt != generation.cache_salt:
            return None
        tokens = np.concatenate([unpack_tokens(generation.prompt), unpack_tokens(generation.generated)])
        if not np.array_equal(run.seq.token_ids[: len(tokens)], tokens):
            return None
        del self._runs[request]
        self._scheduler.remove(request)
        return run.seq

    def stop(self, request: RequestId, attempt: Attempt, detail: str, now: float) -> list[Action]:
        """End every attempt of ``request`` up to ``attempt``, without a word to the gateway."""
        run = self._runs.get(request)
        if run is not None and run.attempt <= attempt:
            self._drop(request)
        return self._settle(self._reservations.give_up(request, attempt, detail, now))

    def peer_lost(self, worker: WorkerId, epoch: Epoch, *, dead: bool, now: float) -> list[Action]:
        """Another worker has left the membership."""
        return self._settle(self._reservations.peer_lost(worker, epoch, dead=dead, now=now))

    def leave(self, detail: str, now: float) -> list[Action]:
        """Every attempt goes back to its gateway."""
        failed = [action for request in [*self._runs] for action in self.fail(request, FailReason.STOPPING, detail)]
        return [*failed, *self._settle(self._reservations.give_up_all(detail, now))]

    def gateways(self) -> list[Address]:
        """Whose attempts are on their way here."""
        return self._reservations.gateways()

    def drop(self, gateway: Address, detail: str, now: float) -> list[Action]:
        """Give up all attempts of a gateway."""
        actions: list[Action] = []
        for request in [request for request, run in self._runs.items() if run.gateway == gateway]:
            actions += self.fail(request, FailReason.ORPHANED, detail)
        for request, attempt in self._reservations.of(gateway):
            actions += self._settle(self._reservations.give_up(request, attempt, detail, now))
            actions.append(self._shared.failed(request, attempt, gateway, FailReason.ORPHANED, detail))
        return actions

    def order(self, request: RequestId) -> OpenTransfer | None:
        """Of an attempt whose KV is on its way, or is to come."""
        return self._reservations.order(request)

    def belongs_to(self, request: RequestId, attempt: Attempt, gateway: Address) -> None:
        """Another gateway goes on with the request, as ``attempt``; harmless where it does not run."""
        run = self._runs.get(request)
        if run is not None:
            run.attempt, run.gateway = attempt, gateway

    def has(self, key: TransferKey) -> bool:
        """Whether an attempt is here: its KV is on its way, or it runs."""
        run = self._runs.get(key.request)
        return key in self._reservations or (run is not None and run.attempt == key.attempt)

    def check_integrity(self) -> None:
        """Every block into which KV is on its way belongs to a reservation."""
        self._reservations.check_integrity()

    def inspect(self) -> dict[str, int]:
        """What is here now."""
        return {"runs": len(self._runs), "reservations": len(self._reservations)}

    def _opened(self, order: OpenTransfer, now: float) -> list[Action]:
        if not self._genuine(order):
            self._shared.forged += 1
            return []  # nor is anything sent to where it says that it comes from
        self._shared.peers.add(order.prefill.mailbox)
        if not self._shared.fences.admits(order.request, order.attempt):
            return self._settle(self._reservations.repeated(order, now))
        refusal, retryable = self._refusal(order)
        if refusal:
            return [self._reservations.refuse(order, refusal, retryable=retryable)]
        actions = self._succeed(order, now)
        return [*actions, *self._settle(self._reservations.opened(order, now))]

    def _genuine(self, order: OpenTransfer) -> bool:
        """Whether the router has minted a ticket for just this transfer."""
        key, own = self._settings.cluster_key, self._settings.address
        return valid_between(key, order.ticket, order.request, order.attempt, order.prefill, own)

    def _refusal(self, order: OpenTransfer) -> tuple[str, bool]:
        """Why there will be no room for ``order``, and whether another pair may have some."""
        try:
            self._reservations.route(order)
        except CannotPair as error:
            return str(error), True
        return self._shared.misfit(order.generation), False

    def _generate(self, order: Generate, now: float) -> list[Action]:
        if not self._shared.fences.admits(order.request, order.attempt):
            return self._shared.failed_before(order.request, order.attempt)  # asked again, or late
        actions = self._succeed(order, now)
        reason = self._shared.misfit(order.generation)
        if reason:
            failed = self._shared.failed(order.request, order.attempt, order.gateway, FailReason.CAPACITY, reason)
            return [*actions, failed]
        self._run_whole(order)
        return actions

    def _succeed(self, order: Generate | OpenTransfer, now: float) -> list[Action]:
        """End the older attempts of an order that is admitted."""
        self._shared.fences.raise_to(order.request, order.attempt)
        return self._shared.stop(order.request, order.attempt, "a newer attempt has come", now)

    def _run_whole(self, order: Generate | OpenTransfer) -> None:
        """Prompt and answer, but for what is cached."""
        start = count_tokens(order.generation.generated)
        self._deliveries.open(order.request, order.attempt, order.gateway, start, generation=order.generation)
        self._start(order.attempt, order.gateway, sequence(order.request, order.generation))

    def _offers(self, order: OpenTransfer, num_cached: int) -> Reason | None:
        """Why this worker had better compute what it lacks of the prompt itself; None where it had not. An offer is
        counted when it is known what came of it."""
        settings, generation, block_size = self._settings, order.generation, self._pool.block_size
        # A prompt that is scored is computed from its first token on.
        cached = 0 if generation.sampling.prompt_logprobs is not None else num_cached * block_size
        case = Case(
            num_tokens=generation.num_tokens,
            decode_cached=min(cached, generation.num_tokens - 1),
            prefill_cached=order.cached_tokens,
            decode_rate=self._shared.membership.prefill_rate.value,
            prefill_rate=order.prefill_rate,
            transfer_cost=Cost(order.transfer_latency, order.transfer_rate),
            token_bytes=settings.block_bytes / block_size,
            decode_running=self._scheduler.num_running,
            decode_queued=self._scheduler.waiting_tokens,
        )
        reason = decide(settings.disaggregation, case)
        if reason.local:
            return reason
        self._shared.membership.decisions.add(reason)
        return None

    def _start(self, attempt: Attempt, gateway: Address, seq: Sequence) -> None:
        self._runs[RequestId(seq.seq_id)] = _Run(attempt, gateway, seq)
        self._scheduler.add(seq)

    def _landed(self, landed: KVLanded) -> list[Action]:
        """Go on from the first token, which the gateway has from the prefill worker."""
        order, first = landed.order, landed.first
        if first.token >= self._settings.vocab_size:  # in the engine it would fail everyone's step
            self._pool.free(landed.blocks)
            detail = f"the first token is {first.token}, the vocabulary has {self._settings.vocab_size}"
            return [self._shared.failed(order.request, order.attempt, order.gateway, FailReason.TRANSFER, detail)]
        if landed.offered is not None:
            self._shared.membership.decisions.add(Reason.TOO_LATE)
        kv_bytes = (len(landed.blocks) - landed.num_cached) * self._settings.block_bytes
        self._shared.membership.kv_bytes_received += kv_bytes
        if order.probe:
            self._pool.free(landed.blocks)
            return []
        self._shared.membership.transfers += 1
        start = count_tokens(order.generation.generated)
        work = order.generation
        self._deliveries.open(order.request, order.attempt, order.gateway, start, kv_bytes=kv_bytes, generation=work)
        if first.prompt_logprobs is not None:
            self._deliveries.add_prompt_logprobs(order.request, first.prompt_logprobs, deliver=False)
        self._deliveries.add(order.request, first.token, first.logprobs, deliver=False)
        seq = sequence(
            order.request,
            order.generation.extended_by(first.token),
            blocks=landed.blocks,
            num_computed_tokens=order.generation.num_tokens,
            hashes=landed.hashes,
        )
        self._start(order.attempt, order.gateway, seq)
        return []

    def _deliver(self, progress: Progress) -> None:
        request = RequestId(progress.seq.seq_id)
        prompt_logprobs = wire_logprobs(progress.prompt_logprobs)
        if prompt_logprobs is not None:
            self._deliveries.add_prompt_logprobs(request, prompt_logprobs)
        if progress.seq.num_output_tokens == 1:
            self._deliveries.note_cached(request, progress.seq.num_cached_tokens)
        if progress.token is not None:
            logprobs = None if progress.logprobs is None else wire_logprobs([progress.logprobs])
            self._deliveries.add(request, progress.token, logprobs)
        if progress.finish_reason is not None:
            self._deliveries.finish(request, progress.finish_reason)
            del self._runs[request]

    def _drop(self, request: RequestId) -> _Run:
        run = self._runs.pop(request)
        self._scheduler.remove(request)
        self._pool.free(run.seq.block_table)
        return run

    def _settle(self, steps: list[Step]) -> list[Action]:
        """Pass actions on; start what has landed."""
        actions: list[Action] = []
        for step in steps:
            if isinstance(step, KVLanded):
                actions += self._landed(step)
            elif isinstance(step, TailTaken):
                self._shared.membership.decisions.add(step.reason)
                self._run_whole(step.order)
            else:
                actions.append(step)
        return actions

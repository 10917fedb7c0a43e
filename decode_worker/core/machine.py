"""The decode worker: the rest of the relay, and the whole of it in a colocated pool.

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

from dataclasses import asdict, dataclass, field

from msgspec import structs

from decode_worker.core.reservation import Action, KVLanded, Reservations, Step, TailTaken
from engine.core.blocks import BlockPool
from engine.core.outputs import StepOutput
from engine.core.scheduler import Progress, Scheduler, StepPlan
from engine.core.sequence import Sequence
from kv_transfer.core.events import Landed, TransferKey
from kv_transfer.core.lanes import CannotPair
from kv_transfer.core.session import Digested, LandingOpened, WritersGone
from messages.codec import count_tokens
from messages.common import FailReason, Generation, Role, WorkerAddress
from messages.gateway_to_worker import Abort, EndAck, Generate, TokensWanted
from messages.ids import Address, Attempt, RequestId
from messages.prefill_to_decode import EndTransfer, OpenTransfer, TailYielded, TransferClosed, TransferProgress
from messages.router_to_worker import PeerLost, RegisterWanted
from messages.sampling import FinishReason
from messages.seals import genuine
from messages.tickets import valid_between
from messages.worker_to_gateway import AttemptFailed
from runtime.core.actions import ForgetPeer, Send
from runtime.core.deliveries import Deliveries
from runtime.core.disaggregation import ALWAYS, Case, Disaggregation, Reason, decide
from runtime.core.fences import Fences
from runtime.core.membership import Membership
from runtime.core.pace import MEASURED, STEP_SECONDS, StepPace
from runtime.core.recent import Cost
from runtime.core.work import NOT_NUMBERS, block_counts, cache_counts, misfit, sequence, wire_logprobs

Messages = (
    Generate, Abort, EndAck, TokensWanted,
    OpenTransfer, TransferProgress, EndTransfer, TransferClosed, TailYielded,
    RegisterWanted, PeerLost,
)  # fmt: skip
"""What a decode worker's mailbox takes."""

TransferEvent = TransferProgress | EndTransfer | TransferClosed | LandingOpened | Landed | Digested | WritersGone
Event = (
    Generate | Abort | EndAck | TokensWanted | OpenTransfer | TransferEvent | TailYielded | RegisterWanted | PeerLost
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings:
    """What the machine needs to know of its worker."""

    address: WorkerAddress
    role: Role
    router: Address
    cluster_key: bytes = field(repr=False)
    block_bytes: int
    """Of a block on all ranks together."""
    max_num_seqs: int
    max_model_len: int
    vocab_size: int
    disaggregation: Disaggregation = ALWAYS


@dataclass(slots=True)
class _Run:
    """One attempt in the running batch."""

    attempt: Attempt
    gateway: Address
    seq: Sequence


class DecodeMachine:
    """``handle``, ``schedule`` and ``update`` take the time and return actions; the shell performs them."""

    early: tuple[type, ...] = ()
    listens = False
    """Nothing is handled while a step runs."""

    def __init__(
        self, settings: DecodeSettings, scheduler: Scheduler, pool: BlockPool, reservations: Reservations
    ) -> None:
        self._settings = settings
        self._scheduler = scheduler
        self._pool = pool
        self._reservations = reservations
        self._runs: dict[RequestId, _Run] = {}
        self._peers: set[Address] = set()
        """Mailboxes of prefill workers that came with a ticket; no other is answered."""
        self.forged = 0
        """Messages without a proof that they are who they say; dropped."""
        self._pace = StepPace(STEP_SECONDS, scheduler.max_num_batched_tokens)
        self._begun = 0.0
        """When the step that runs was planned."""
        self._fences = Fences()
        self._deliveries = Deliveries(settings.address.worker)
        self.membership = Membership(
            settings.address, settings.role, settings.router, settings.cluster_key,
            max_num_seqs=settings.max_num_seqs, max_model_len=settings.max_model_len,
        )  # fmt: skip

    @property
    def wake_at(self) -> float:
        """When ``tick`` has something to do at the latest."""
        return min(self.membership.report_at, self._deliveries.wake_at, self._reservations.wake_at)

    def handle(self, event: Event, now: float) -> list[Action]:
        """One message, or one answer of the transport."""
        match event:
            case OpenTransfer():
                return self._opened(event, now)
            case Generate():
                return self._generate(event, now)
            case EndTransfer() | TailYielded() if event.mailbox not in self._peers:
                self.forged += 1
                return []
            case TailYielded():
                return self._settle(self._reservations.yielded(event, now))
            case Abort():
                return self._stop(event.request, event.attempt, "the gateway wants no more of it", now)
            case EndAck():
                self._deliveries.close(event.request, event.attempt)
                return []
            case TokensWanted():
                return [*self._deliveries.resend(event.request, event.attempt, event.index)]
            case RegisterWanted():
                return [*self.membership.wanted(event)]
            case PeerLost():
                return self._peer_lost(event, now)
            case _:
                return self._settle(self._reservations.handle(event, now))

    def tick(self, now: float) -> list[Action]:
        """What is due by the clock."""
        actions = self._settle(self._reservations.tick(now))
        actions += self._deliveries.tick(now)
        self.membership.prefill_rate.forget_old(now)
        waiting = self._reservations.num_waiting + len(self._reservations) + self._scheduler.num_waiting
        actions += self.membership.report(
            block_counts(self._pool),
            cache_counts(self._pool, self._scheduler),
            lambda: self._reservations.counts(now),
            running=self._scheduler.num_running,
            waiting=waiting,
            now=now,
        )
        return actions

    def schedule(self, now: float) -> tuple[StepPlan | None, list[Action]]:
        """The next step. Sequences already here come first; what they leave is promised to those that knock."""
        plan = self._scheduler.schedule(self._pace.budget)
        self._begun = now
        # What the plan is to copy away may stand in blocks that are free by now: a landing must not write there before.
        leaving = plan is not None and self._pool.num_unheld(plan.moves.swap_out[:, 0])
        room = 0
        if not self._scheduler.num_waiting and not leaving:
            room = self._settings.max_num_seqs - self._scheduler.num_running - len(self._reservations)
        return plan, self._settle(self._reservations.admit(room, self._scheduler.has_room, now, self._offers))

    def update(self, plan: StepPlan, output: StepOutput, now: float) -> list[Action]:
        """The step has run: deliver its tokens."""
        self.membership.steps += 1
        seconds = now - self._begun
        self._pace.took(int(plan.num_tokens.sum()), seconds)
        prompt_tokens = int(plan.num_tokens[plan.num_tokens > 1].sum())
        if prompt_tokens >= MEASURED:  # what the others of the step took is counted in: rather too slow than too fast
            self.membership.prefill_rate.took(prompt_tokens, seconds, now)
        failed: list[Action] = []
        for progress in self._scheduler.update(plan, output):
            if progress.finish_reason is FinishReason.ABORT:
                request = RequestId(progress.seq.seq_id)
                run = self._runs.pop(request)
                self._deliveries.close(request)
                failed.append(self._failed(request, run.attempt, run.gateway, FailReason.ENGINE, NOT_NUMBERS))
            elif progress.token is not None or progress.finish_reason is not None:
                self._deliver(progress)
        return [*self._deliveries.flush(now), *failed]

    def fail_step(self, plan: StepPlan, detail: str, now: float) -> list[Action]:
        """The step could not run: its sequences' attempts fail, the worker goes on."""
        self._scheduler.failed(plan)
        return [self._fail(RequestId(seq.seq_id), FailReason.ENGINE, detail) for seq in plan.sequences]

    def leave(self, now: float) -> list[Action]:
        """Out of the membership; every attempt goes back to its gateway."""
        detail = "the worker is shutting down"
        failed = [self._fail(request, FailReason.STOPPING, detail) for request in [*self._runs]]
        return [self.membership.leave(), *failed, *self._settle(self._reservations.give_up_all(detail, now))]

    def has(self, key: TransferKey) -> bool:
        """Whether an attempt is here: its KV is on its way, or it runs."""
        run = self._runs.get(key.request)
        return key in self._reservations or (run is not None and run.attempt == key.attempt)

    def check_integrity(self) -> None:
        """Every held block belongs to a run or to a reservation."""
        self._pool.check_integrity()
        self._scheduler.check_integrity()
        self._reservations.check_integrity()
        held = sum(len(run.seq.block_table) for run in self._runs.values()) + self._reservations.blocks_held
        assert held == self._pool.num_references, f"{held} blocks have an owner, of {self._pool.num_references}"

    def inspect(self) -> dict[str, int]:
        """What is here now, and the pool's accounting; for status pages and tests."""
        counts = asdict(self._pool.counts()) | structs.asdict(cache_counts(self._pool, self._scheduler))
        return (
            counts
            | {
                "runs": len(self._runs),
                "reservations": len(self._reservations),
                "deliveries": len(self._deliveries),
                "forged": self.forged,
            }
            | structs.asdict(self.membership.decisions.counts())
        )

    def _peer_lost(self, event: PeerLost, now: float) -> list[Action]:
        if not genuine(self._settings.cluster_key, event):
            self.forged += 1
            return []
        lost = (event.peer.worker, event.peer.epoch)
        actions = self._settle(self._reservations.peer_lost(*lost, dead=event.dead, now=now))
        if event.dead:
            self._peers.discard(event.peer.mailbox)
            actions.append(ForgetPeer(event.peer))
        return actions

    def _opened(self, order: OpenTransfer, now: float) -> list[Action]:
        if not self._genuine(order):
            self.forged += 1
            return []  # nor is anything sent to where it says that it comes from
        self._peers.add(order.prefill.mailbox)
        if not self._fences.admits(order.request, order.attempt):
            return self._settle(self._reservations.repeated(order, now))
        refusal, retryable = self._refusal(order)
        if refusal:
            return [self._reservations.refuse(order, refusal, retryable=retryable)]
        actions = self._stop(order.request, order.attempt, "a newer attempt has come", now)
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
        return self._misfit(order.generation), False

    def _generate(self, order: Generate, now: float) -> list[Action]:
        if not self._fences.admits(order.request, order.attempt):
            return []
        actions = self._stop(order.request, order.attempt, "a newer attempt has come", now)
        reason = self._misfit(order.generation)
        if reason:
            return [*actions, self._failed(order.request, order.attempt, order.gateway, FailReason.CAPACITY, reason)]
        self._run_whole(order)
        return actions

    def _run_whole(self, order: Generate | OpenTransfer) -> None:
        """Prompt and answer, but for what is cached."""
        start = count_tokens(order.generation.generated)
        self._deliveries.open(order.request, order.attempt, order.gateway, start)
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
            decode_rate=self.membership.prefill_rate.value,
            prefill_rate=order.prefill_rate,
            transfer_cost=Cost(order.transfer_latency, order.transfer_rate),
            token_bytes=settings.block_bytes / block_size,
            decode_running=self._scheduler.num_running,
            decode_queued=self._scheduler.waiting_tokens,
        )
        reason = decide(settings.disaggregation, case)
        if reason.local:
            return reason
        self.membership.decisions.add(reason)
        return None

    def _misfit(self, generation: Generation) -> str:
        return misfit(generation, self._pool, self._settings.vocab_size, self._settings.max_model_len)

    def _start(self, attempt: Attempt, gateway: Address, seq: Sequence) -> None:
        self._runs[RequestId(seq.seq_id)] = _Run(attempt, gateway, seq)
        self._scheduler.add(seq)

    def _landed(self, landed: KVLanded) -> list[Action]:
        """Go on from the first token, which the gateway has from the prefill worker."""
        order, first = landed.order, landed.first
        if first.token >= self._settings.vocab_size:  # in the engine it would fail everyone's step
            self._pool.free(landed.blocks)
            detail = f"the first token is {first.token}, the vocabulary has {self._settings.vocab_size}"
            return [self._failed(order.request, order.attempt, order.gateway, FailReason.TRANSFER, detail)]
        if landed.offered is not None:
            self.membership.decisions.add(Reason.TOO_LATE)
        kv_bytes = (len(landed.blocks) - landed.num_cached) * self._settings.block_bytes
        self.membership.kv_bytes_received += kv_bytes
        if order.probe:
            self._pool.free(landed.blocks)
            return []
        self.membership.transfers += 1
        start = count_tokens(order.generation.generated)
        self._deliveries.open(order.request, order.attempt, order.gateway, start, kv_bytes=kv_bytes)
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

    def _stop(self, request: RequestId, attempt: Attempt, detail: str, now: float) -> list[Action]:
        """End every attempt of ``request`` up to ``attempt``, without a word to the gateway."""
        self._fences.raise_to(request, attempt)
        self._deliveries.fence(request, attempt)
        run = self._runs.get(request)
        if run is not None and run.attempt <= attempt:
            self._drop(request)
        return self._settle(self._reservations.give_up(request, attempt, detail, now))

    def _drop(self, request: RequestId) -> _Run:
        run = self._runs.pop(request)
        self._scheduler.remove(request)
        self._pool.free(run.seq.block_table)
        return run

    def _fail(self, request: RequestId, reason: FailReason, detail: str) -> Send:
        run = self._drop(request)
        self._deliveries.close(request)
        return self._failed(request, run.attempt, run.gateway, reason, detail)

    def _failed(self, request: RequestId, attempt: Attempt, gateway: Address, reason: FailReason, detail: str) -> Send:
        failed = AttemptFailed(
            request=request, attempt=attempt, worker=self._settings.address.worker, reason=reason, detail=detail[:2000]
        )
        return Send(gateway, failed)

    def _settle(self, steps: list[Step]) -> list[Action]:
        """Pass actions on; start what has landed."""
        actions: list[Action] = []
        for step in steps:
            if isinstance(step, KVLanded):
                actions += self._landed(step)
            elif isinstance(step, TailTaken):
                self.membership.decisions.add(step.reason)
                self._run_whole(step.order)
            else:
                actions.append(step)
        return actions

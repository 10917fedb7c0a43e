"""One worker of the world: a real machine and its ranks' memories, without sockets, threads and model."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import numpy as np

from decode_worker.core.reservation import Reservations
from engine.core.blocks import BlockPool
from engine.core.outputs import StepOutput, TokenLogprobs
from engine.core.ownership import BlockState
from engine.core.scheduler import Scheduler, SchedulerLimits, StepPlan
from engine.core.sequence import Sequence
from engine.layer_gate import StepLayers
from kv_transfer.core.events import Blocks, TransferKey
from kv_transfer.core.fanout import Fanout
from kv_transfer.core.lanes import Layers
from kv_transfer.core.sending import SendState
from kv_transfer.core.session import (
    CancelPushes,
    CloseLanding,
    LandingOpened,
    LookForWriters,
    OpenLanding,
    Push,
    TakeDigests,
    TransferTimeouts,
    WritersGone,
)
from messages.common import KVRank, KVWay, Role, WorkerAddress
from messages.decode_to_prefill import TransferAcked
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from prefill_worker.core.handoff import Handoffs
from runtime.core.actions import Forget, ForgetPeer, Send
from runtime.core.disaggregation import ALWAYS, Disaggregation
from runtime.core.during_step import DuringStep
from runtime.core.shared import WorkerSettings
from simulator.history import Incarnation, Read, Wrote
from simulator.model import BLOCK, LAYERS, VOCABULARY, Truth, shards
from simulator.rank import Rank, Surroundings
from worker.core.machine import WorkerMachine

KEY = b"k" * 32
WRITABLE = {BlockState.LANDING, BlockState.QUARANTINED}
MAY_LAND = WRITABLE | {BlockState.PROMISED}
"""What a two-sided sender may send once more, for a repair."""
OWN = {BlockState.HELD, BlockState.PINNED}
MAX_NUM_SEQS, MAX_MODEL_LEN = 4, 64
NOBODY = Incarnation("", Epoch(0))
WARM_STEP = 0.01
"""Seconds that its last step took before it registered: a worker expects its very first one to take long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerShape:
    """What a worker is, whoever its process is."""

    role: Role
    num_blocks: int
    router: Address
    ranks: int = 1
    rule: Disaggregation = ALWAYS
    eos: frozenset[int] = frozenset()


class Worker:
    """A machine and its ranks. Its loop takes what has come, plans a step, and runs it later."""

    def __init__(
        self, world: Surroundings, name: WorkerId, shape: WorkerShape, *, epoch: Epoch, mailbox: Address,
        incarnation: int = 0,
    ) -> None:  # fmt: skip
        self.world, self.name, self.shape = world, name, shape
        self.incarnation = Incarnation(name, epoch)
        self.sends = shape.role is Role.PREFILL
        self.blocks = BlockPool(shape.num_blocks, BLOCK)
        limits = SchedulerLimits(
            max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=16, max_model_len=MAX_MODEL_LEN, prefill_chunk=8
        )
        scheduler = Scheduler(self.blocks, limits, shape.eos)
        self.ranks = [Rank(world, self, number, shard) for number, shard in enumerate(shards(shape.ranks))]
        transport = "shm" if world.one_sided else "zmq"
        own = tuple(
            KVRank(rank.shard, shape.num_blocks, "host", (KVWay(transport, f"{name}/{epoch}/{rank.number}"),))
            for rank in self.ranks
        )
        self.address = WorkerAddress(name, epoch, mailbox, own)
        self.fanout = Fanout(shape.ranks)
        self.inbox: deque[tuple[int, Any]] = deque()
        """What the ranks report."""
        self.plan: StepPlan | None = None
        self.writes: set[int] = set()
        """Blocks that the step which runs writes."""
        self.layer = 0
        """Of the step that runs: the next one."""
        timeouts = TransferTimeouts()
        settings = WorkerSettings(
            address=self.address, role=shape.role, router=shape.router, cluster_key=KEY, block_bytes=1,
            max_num_seqs=MAX_NUM_SEQS, max_model_len=MAX_MODEL_LEN, vocab_size=VOCABULARY, disaggregation=shape.rule,
            incarnation=incarnation,
        )  # fmt: skip
        self.handoffs = Handoffs(self.address, own, self.blocks, timeouts)
        self.reservations = Reservations(mailbox, own, self.blocks, timeouts=timeouts)
        self.machine = WorkerMachine(settings, scheduler, self.blocks, self.handoffs, self.reservations)
        self.machine._pace.took(1, WARM_STEP)
        self.during = DuringStep(self.machine.early, limit=8)

    # Its loop

    @property
    def takes(self) -> bool:
        """Whether it looks into its mailbox: between two steps, or between two layers."""
        return self.plan is None or (self.machine.listens and not self.during.full)

    def take(self, message: Any) -> None:
        if self.plan is None or self.during.admits(message):
            self.perform(self.machine.handle(message, self.world.now))

    def hear(self) -> None:
        """The oldest answer of a rank."""
        rank, event = self.inbox.popleft()
        for answer in self.fanout.gather(rank, event):
            self.perform(self.machine.handle(answer, self.world.now))

    def turn(self) -> None:
        """Begin a step, or compute a layer of the one that was begun."""
        if self.plan is not None:
            self.run(self.plan)
            return
        while self.inbox:
            self.hear()
        self.perform(self.machine.tick(self.world.now))
        plan, actions = self.machine.schedule(self.world.now)
        self.perform(actions)
        if plan is not None:
            self.begin(plan)

    def begin(self, plan: StepPlan) -> None:
        self.plan, self.layer = plan, 0
        ends = (plan.num_computed + plan.num_tokens).tolist()
        for seq, computed, end in zip(plan.sequences, plan.num_computed.tolist(), ends, strict=True):
            self.writes.update(seq.block_table[computed // BLOCK : -(-end // BLOCK)].tolist())
        for rank in self.ranks:
            while rank.commands:  # ranks do what they are told before the steps that they are told of later
                rank.perform(rank.commands.popleft())
            rank.running, rank.upcoming = rank.upcoming, StepLayers(LAYERS)
            for source, target in plan.moves.copies.tolist():
                rank.pool[target] = rank.pool[source]

    def run(self, plan: StepPlan) -> None:
        """Compute the next layer; after the last one the step is over."""
        world = self.world
        if world.step_fails():
            for rank in self.ranks:
                rank.running.fail()
            self.over(self.machine.fail_step(plan, "it is so in the schedule", world.now))
            return
        last = self.layer == LAYERS - 1
        output = StepOutput(np.empty(0, np.int32))
        tokens: list[int] = []
        rows = zip(plan.sequences, plan.num_computed.tolist(), plan.num_tokens.tolist(), plan.samples, strict=True)
        for row, (seq, computed, count, samples) in enumerate(rows):
            known = tuple(seq.token_ids[: computed + count].tolist())
            self.read(seq, known[:computed])
            self.write(seq, computed, known)
            if not last:
                continue
            params = seq.params
            if params.prompt_logprobs is not None:
                scored = _scored_prompt(world.truth, seq, computed, known)
                output.prompt_logprobs[row] = scored
            if samples:
                tokens.append(world.truth.next(known, params.seed))
                if params.logprobs is not None:
                    output.logprobs[row] = world.truth.scores(known, tokens[-1], params.logprobs)
        self.layer += 1
        for rank in self.ranks:
            rank.running.advance(self.layer)
        if last:
            output = replace(output, tokens=np.array(tokens, np.int32))
            self.over(self.machine.update(plan, output, world.now))

    def over(self, actions: list[Any]) -> None:
        """The step is: what came during it is heard now."""
        self.plan = None
        self.writes.clear()
        self.perform(actions)
        for message in self.during.take():
            self.take(message)

    def write(self, seq: Sequence, begin: int, known: tuple[int, ...]) -> None:
        places = np.arange(begin, len(known))
        blocks = seq.block_table[places // BLOCK]
        states = {*self.blocks.states(seq.block_table[begin // BLOCK : -(-len(known) // BLOCK)]).tolist()}
        assert states <= OWN, f"{seq} writes into {states}"
        true = self.world.truth.kv(known)[begin:]
        for rank in self.ranks:
            first, num = rank.shard.first_head, rank.shard.num_heads
            rank.kv[blocks, self.layer, :, :, places % BLOCK] = true[:, self.layer, :, first : first + num]

    def read(self, seq: Sequence, known: tuple[int, ...]) -> None:
        """The KV of its first tokens is read, on every rank. Of a block that does not hold what it has to, a number is
        found that stands for what is there."""
        if not known:
            return
        places = np.arange(len(known))
        blocks = seq.block_table[places // BLOCK]
        true = self.world.truth.kv(known)
        right = np.ones(len(known), bool)
        for rank in self.ranks:
            first, num = rank.shard.first_head, rank.shard.num_heads
            equal = rank.kv[blocks, :, :, :, places % BLOCK] == true[:, :, :, first : first + num]
            right &= equal.reshape(len(known), -1).all(axis=1)
        read = blocks[::BLOCK]
        states = {*self.blocks.states(read).tolist()}
        found = wanted = self.world.truth.fingerprints(known)
        if not right.all():
            good = np.logical_and.reduceat(right, np.arange(0, len(known), BLOCK)).tolist()
            there = [crc32(b"".join(rank.pool[block].tobytes() for rank in self.ranks)) for block in read.tolist()]
            found = tuple(want if ok else other for want, ok, other in zip(wanted, good, there, strict=True))
        elif self.layer and states <= OWN:
            return  # as it was said with the first layer
        request = RequestId(seq.seq_id)
        self.world.judge(
            Read(
                0.0,
                self.incarnation,
                request,
                self._attempt(request),
                tuple(read.tolist()),
                wanted,
                found,
                states <= OWN,
            )
        )

    def _attempt(self, request: RequestId) -> Attempt:
        run, leg = self.machine.decode._runs.get(request), self.machine.prefill._legs.get(request)
        if run is not None:
            return run.attempt
        if leg is not None:
            return leg.order.attempt
        return max((key.attempt for key in self.handoffs._open if key.request == request), default=Attempt(0))

    def perform(self, actions: Iterable[Any]) -> None:
        world = self.world
        for action in actions:
            match action:
                case Send(to, message):
                    if isinstance(message, TransferAcked):
                        self.check_acked(message)
                    world.send(to, message)
                case OpenLanding(key) if world.one_sided:
                    self.perform(self.machine.handle(LandingOpened(key), world.now))
                case Push() | CancelPushes() | OpenLanding() | CloseLanding() | TakeDigests():
                    for number, part in self.fanout.fan(action):
                        if number:
                            self.ranks[number].commands.append(part)
                        else:
                            self.ranks[0].perform(part)
                case LookForWriters(key, writers):
                    if all(world.gone(writer) for writer in writers):
                        self.perform(self.machine.handle(WritersGone(key), world.now))
                case Forget() | ForgetPeer():
                    pass

    # What is looked at

    def check_final(self, blocks: Blocks, layers: Layers) -> None:
        """These leave now: the step that runs has written them already, if it does at all."""
        if self.plan is not None and layers.end > self.layer:
            assert self.writes.isdisjoint(blocks.tolist()), f"layers {layers} leave before they are computed"

    def check_acked(self, acked: TransferAcked) -> None:
        """Prefill may free its blocks on this word: all of it stands here, true, and can be written no more."""
        run = self.machine.decode._runs.get(acked.request)
        if run is None or run.attempt != acked.attempt:
            return  # a repetition
        self.read(run.seq, tuple(run.seq.token_ids[: run.seq.num_computed_tokens].tolist()))

    def wrote(self, key: TransferKey, blocks: Blocks, *, again: bool) -> None:
        """KV of a transfer was written into these; ``again``: it may be a repetition of what has landed before."""
        own = self.reservations._open.get(key)
        promised = set() if own is None else {*own.session.blocks.tolist()}
        allowed = MAY_LAND if again else WRITABLE
        written = tuple(blocks.tolist())
        owners = tuple(
            (key.request, key.attempt) if state in allowed and block in promised else None
            for block, state in zip(written, self.blocks.states(blocks).tolist(), strict=True)
        )
        source = NOBODY if own is None else Incarnation(own.order.prefill.worker, own.order.prefill.epoch)
        self.world.judge(Wrote(0.0, self.incarnation, source, key.request, key.attempt, written, owners))

    def check_writable(self, key: TransferKey, blocks: Blocks, *, again: bool) -> None:
        states = {*self.blocks.states(blocks).tolist()}
        allowed = MAY_LAND if again else WRITABLE
        assert states <= allowed, f"{key} could write into {[BlockState(state).name for state in states]}"
        own = self.reservations._open.get(key)
        assert own is not None and {*blocks.tolist()} <= {*own.session.blocks.tolist()}, f"{key} has lost these blocks"

    def check(self) -> None:
        """Who can write into what."""
        if self.world.one_sided:
            self.check_writes()
        for rank in self.ranks:
            for key, landing in rank.landings._open.items():
                if not rank.closes(key):
                    self.check_writable(key, landing.blocks, again=True)

    def check_writes(self) -> None:
        """Of what was told to write into others' blocks, or may be told so yet."""
        for handoff in self.handoffs._open.values():
            session = handoff.session
            to = self.world.named(handoff.order.decode)
            if session.state is SendState.PUSHING and to is not None:
                to.check_writable(session.key, session._target, again=False)
        for rank in self.ranks:
            for job in rank.jobs:
                there = self.world.rank_at(job.to)
                if there is not None:
                    there.written(job.key, job.target)


def _scored_prompt(truth: Truth, seq: Sequence, computed: int, known: tuple[int, ...]) -> list[TokenLogprobs]:
    """Of the prompt's tokens whose predecessors have just been computed."""
    ends = range(computed + 1, min(len(known), seq.num_prompt_tokens - 1) + 1)
    prompt, num_top = tuple(seq.token_ids[: seq.num_prompt_tokens].tolist()), seq.params.prompt_logprobs or 0
    return [truth.scores(known[:end], prompt[end], num_top) for end in ends]

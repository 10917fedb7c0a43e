"""One worker of the world: a real machine and its ranks' memories, without sockets, threads and model."""

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from decode_worker.core.machine import DecodeMachine, DecodeSettings
from decode_worker.core.reservation import Reservations
from engine.core.blocks import BlockPool
from engine.core.outputs import StepOutput
from engine.core.ownership import BlockState
from engine.core.scheduler import Scheduler, SchedulerLimits, StepPlan
from engine.core.sequence import Sequence
from engine.layer_gate import StepLayers
from kv_transfer.core.events import Blocks, Cancelled, Landed, Live, Pool, PushFailed, TransferKey
from kv_transfer.core.fanout import DigestLane, Fanout, LaneDigested, OpenLanes, PushLane
from kv_transfer.core.lanes import Heads, Layers, layout_of
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
from kv_transfer.transports.copying import Job, Landings
from kv_transfer.transports.records import LaneCopy, records
from messages.common import KVEndpoint, KVRank, KVShard, KVWay, Role, WorkerAddress
from messages.decode_to_prefill import TransferAcked
from messages.ids import Address, Epoch, WorkerId
from prefill_worker.core.handoff import Handoffs
from prefill_worker.core.machine import PrefillMachine, PrefillSettings
from runtime.core.actions import ForgetPeer, Send
from runtime.core.disaggregation import Disaggregation, Policy
from runtime.core.during_step import DuringStep
from runtime.kv_port import LaneHasher

if TYPE_CHECKING:
    from tests.ownership.world import World

KEY = b"k" * 32
ROUTER, GATEWAY = Address("tcp://router"), Address("tcp://gateway")
BLOCK, LAYERS, HEADS, VOCABULARY = 4, 2, 2, 50
NUM_BLOCKS = {"prefill": 24, "decode": 14}
WRITABLE = {BlockState.LANDING, BlockState.QUARANTINED}
OWN = {BlockState.HELD, BlockState.PINNED}
NEVER = float("inf")


def shards(ranks: int) -> list[KVShard]:
    own = HEADS // ranks
    return [KVShard(LAYERS, 1, BLOCK, "float32", HEADS, rank * own, own) for rank in range(ranks)]


class Truth:
    """What KV has to be, and which token follows."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], np.ndarray[Any, Any]] = {}

    def kv(self, tokens: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """uint32 ``[token, layer, k|v, head]``."""
        if tokens not in self._known:
            names, name = [], 1
            for token in tokens:
                name = (name * 1000003 + token + 1) & 0xFFFFFFFF
                names.append(name)
            kinds = np.array([3, 5, 7, 11, 13, 17, 19, 23], np.uint32).reshape(LAYERS, 2, HEADS)
            self._known[tokens] = np.array(names, np.uint32)[:, None, None, None] * kinds
        return self._known[tokens]

    def next(self, tokens: tuple[int, ...]) -> int:
        return int(self.kv(tokens)[-1, 0, 0, 0]) % VOCABULARY

    def answer(self, prompt: tuple[int, ...], count: int) -> list[int]:
        tokens = prompt
        for _ in range(count):
            tokens += (self.next(tokens),)
        return list(tokens[len(prompt) :])


class Landing(NamedTuple):
    """Blocks of one lane, some layers of them, on their way to a two-sided receiver."""

    key: TransferKey
    to: KVEndpoint
    heads: Heads
    layers: Layers
    first: int
    rows: Pool


class Rank:
    """One process of a worker: its memory, its transport's thread, its digest thread."""

    def __init__(self, world: "World", worker: "Worker", number: int, shard: KVShard) -> None:
        self.world, self.worker, self.number, self.shard = world, worker, number, shard
        block_bytes = layout_of(shard).block_bytes
        self.pool = np.full((worker.blocks.num_blocks, block_bytes), 0xAA, np.uint8)
        self.kv = self.pool.view(np.uint32).reshape(worker.blocks.num_blocks, LAYERS, 2, -1, BLOCK)
        """``[block, layer, k|v, head, token]``."""
        self.running = self.upcoming = StepLayers(LAYERS)
        self.hasher = LaneHasher(self.pool, shard)
        self.landings = Landings(self.pool, LAYERS)
        self.commands: deque[Any] = deque()
        """From rank 0, in order."""
        self.jobs: list[Job] = []
        self.cancels: deque[TransferKey] = deque()
        """That its thread has not read yet."""
        self.hashing: deque[DigestLane] = deque()
        self.copies: dict[Any, LaneCopy] = {}
        self.alive = True

    def perform(self, action: Any) -> None:
        match action:
            case PushLane(key, to, heads, first, source, target, live):
                step = {Live.NO: None, Live.NEXT: self.upcoming, Live.RUNNING: self.running}[live]
                self.jobs.append(Job(key, to, heads, first, source, target, step))
            case CancelPushes(key, _):
                self.cancels.append(key)
            case OpenLanes(key, _, first, blocks, lanes):
                self.landings.open(key, first, blocks, lanes)
                self.report(LandingOpened(key))
            case CloseLanding(key):
                self.landings.close(key)
            case DigestLane():
                self.hashing.append(action)

    def report(self, event: Any) -> None:
        self.worker.inbox.append((self.number, event))

    def hash(self) -> None:
        wanted = self.hashing.popleft()
        self.report(LaneDigested(wanted.key, wanted.number, wanted.first, self.hasher.digests(wanted)))

    def cancel(self) -> None:
        key = self.cancels.popleft()
        self.jobs = [job for job in self.jobs if job.key != key]
        self.report(Cancelled(key))

    def obey(self) -> None:
        """What rank 0 wants first."""
        self.perform(self.commands.popleft())

    @property
    def ways(self) -> list[Any]:
        """What may happen here next, beside a step."""
        every = (
            (self.commands, self.obey), (self.cancels, self.cancel), (self.jobs and self.next_job(), self.push),
            (self.hashing, self.hash),
        )  # fmt: skip
        return [way for there, way in every if there]

    def next_job(self) -> Job | None:
        """The first that can go on; those of one key stay in order."""
        waiting = set()
        for job in self.jobs:
            if not job.waits and job.key not in waiting:
                return job
            waiting.add(job.key)
        return None

    def push(self) -> None:
        """Some blocks of the next job leave."""
        job, world = self.next_job(), self.world
        assert job is not None
        to = world.rank_at(job.to)
        if to is None or job.failed:
            self.jobs.remove(job)
            self.report(PushFailed(job.key, "nobody is there, or the step has failed"))
            return
        way = (job.to.shard, job.heads)
        copy = self.copies.get(way) or self.copies.setdefault(way, LaneCopy(self.pool, self.shard, *way))
        layers = job.next_layers(LAYERS)
        end = min(len(job.source), job.begun + world.rng.randint(1, 3))
        source, target = job.source[job.begun : end], job.target[job.begun : end]
        self.worker.check_final(source, layers)
        if world.one_sided:
            to.written(job.key, target)
            copy.write(to.pool, target, source, layers)
            world.spoil(to.pool, target)
        else:
            rows = np.empty((len(source), copy.layer_bytes * (layers.end - layers.first)), np.uint8)
            copy.pack(rows, source, layers)
            world.spoil(rows, np.arange(len(source)))
            world.send_data(Landing(job.key, job.to, job.heads, layers, job.first + job.begun, rows))
        job.went(end, 0)
        if job.done == LAYERS:
            self.jobs.remove(job)
            self.report(job.pushed)

    def land(self, key: TransferKey, heads: Heads, layers: Layers, first: int, rows: Pool) -> None:
        def copy(target: Blocks) -> None:
            self.written(key, target)
            there = records(self.pool, self.shard, heads)[:, 2 * layers.first : 2 * layers.end]
            there[target] = rows.reshape(len(rows), *there.shape[1:])

        landed = self.landings.land(key, heads, layers, first, len(rows), copy)
        if landed is not None and len(landed):
            self.report(Landed(key, landed))

    def written(self, key: TransferKey, blocks: Blocks) -> None:
        """Somebody writes into these now."""
        if not self.closes(key):
            self.worker.check_writable(key, blocks, again=not self.world.one_sided)

    def closes(self, key: TransferKey) -> bool:
        """Whether it will close this landing before it does anything else with the blocks."""
        return CloseLanding(key) in self.commands


class Worker:
    """A machine and its ranks. Its loop takes what has come, plans a step, and runs it later."""

    def __init__(self, world: "World", name: str, ranks: int, epoch: int) -> None:
        self.world, self.name = world, name
        role = name.partition("-")[0]
        self.sends = role == "prefill"
        self.blocks = BlockPool(NUM_BLOCKS[role], BLOCK)
        limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, prefill_chunk=8)
        scheduler = Scheduler(self.blocks, limits, frozenset())
        self.ranks = [Rank(world, self, number, shard) for number, shard in enumerate(shards(ranks))]
        transport = "shm" if world.one_sided else "zmq"
        own = tuple(
            KVRank(rank.shard, self.blocks.num_blocks, "host", (KVWay(transport, f"{name}/{epoch}/{rank.number}"),))
            for rank in self.ranks
        )
        mailbox = Address(f"tcp://{name}")
        self.address = WorkerAddress(WorkerId(name), Epoch(epoch), mailbox, () if self.sends else own)
        self.fanout = Fanout(ranks, sends=self.sends)
        self.inbox: deque[tuple[int, Any]] = deque()
        self.plan: StepPlan | None = None
        self.writes: set[int] = set()
        """Blocks that the step which runs writes."""
        self.layer = 0
        """Of the step that runs: the next one."""
        self.machine: Any
        rule = Disaggregation(policy=Policy.NEVER if world.faults.offers else Policy.ALWAYS)
        timeouts, size = TransferTimeouts(), {"max_num_seqs": 4, "max_model_len": 64, "vocab_size": VOCABULARY}
        if self.sends:
            settings = PrefillSettings(address=self.address, router=ROUTER, cluster_key=KEY, **size)
            self.handoffs = Handoffs(self.address, own, self.blocks, timeouts)
            self.machine = PrefillMachine(settings, scheduler, self.blocks, self.handoffs)
        else:
            self.reservations = Reservations(mailbox, own, self.blocks, timeouts=timeouts)
            self.machine = DecodeMachine(
                DecodeSettings(
                    address=self.address, role=Role.DECODE, router=ROUTER, cluster_key=KEY, block_bytes=1,
                    disaggregation=rule, **size,
                ),
                scheduler, self.blocks, self.reservations,
            )  # fmt: skip

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
        world, tokens = self.world, []
        if world.faults.step and world.rng.random() < 0.05:
            for rank in self.ranks:
                rank.running.fail()
            self.over(self.machine.fail_step(plan, "it is so in the schedule", world.now))
            return
        rows = zip(plan.sequences, plan.num_computed.tolist(), plan.num_tokens.tolist(), plan.samples, strict=True)
        for seq, computed, count, samples in rows:
            known = tuple(seq.token_ids[: computed + count].tolist())
            self.check_read(seq, known[:computed])
            self.write(seq, computed, known)
            if samples:
                tokens.append(world.truth.next(known))
        self.layer += 1
        for rank in self.ranks:
            rank.running.advance(self.layer)
        if self.layer == LAYERS:
            self.over(self.machine.update(plan, StepOutput(np.array(tokens, np.int32)), world.now))

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
        states = {*self.blocks.states(blocks).tolist()}
        assert states <= OWN, f"{seq} writes into {states}"
        true = self.world.truth.kv(known)[begin:]
        for rank in self.ranks:
            first, num = rank.shard.first_head, rank.shard.num_heads
            rank.kv[blocks, self.layer, :, :, places % BLOCK] = true[:, self.layer, :, first : first + num]

    def check_read(self, seq: Sequence, known: tuple[int, ...]) -> None:
        """The KV of its first tokens is what it has to be, on every rank."""
        if not known:
            return
        places = np.arange(len(known))
        blocks = seq.block_table[places // BLOCK]
        true = self.world.truth.kv(known)
        for rank in self.ranks:
            first, num = rank.shard.first_head, rank.shard.num_heads
            right = rank.kv[blocks, :, :, :, places % BLOCK] == true[:, :, :, first : first + num]
            assert right.all(), f"{seq} reads wrong KV on {self.name}"

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
                case ForgetPeer():
                    pass

    # What is looked at

    def check_final(self, blocks: Blocks, layers: Layers) -> None:
        """These leave now: the step that runs has written them already, if it does at all."""
        if self.plan is not None and layers.end > self.layer:
            assert self.writes.isdisjoint(blocks.tolist()), f"layers {layers} leave before they are computed"

    def check_acked(self, acked: TransferAcked) -> None:
        """Prefill may free its blocks on this word: all of it stands here, true, and can be written no more."""
        run = self.machine._runs.get(acked.request)
        if run is None or run.attempt != acked.attempt:
            return  # a repetition
        self.check_read(run.seq, tuple(run.seq.token_ids[: run.seq.num_computed_tokens].tolist()))

    def check_writable(self, key: TransferKey, blocks: Blocks, *, again: bool) -> None:
        states = {*self.blocks.states(blocks).tolist()}
        allowed = WRITABLE | {BlockState.PROMISED} if again else WRITABLE
        assert states <= allowed, f"{key} could write into {[BlockState(state).name for state in states]}"
        own = self.reservations._open.get(key)
        assert own is not None and {*blocks.tolist()} <= {*own.session.blocks.tolist()}, f"{key} has lost these blocks"

    def check(self) -> None:
        """Who can write into what."""
        if self.sends:
            if self.world.one_sided:
                self.check_writes()
            return
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

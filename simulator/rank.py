"""One process of a simulated worker: its memory, its transport's thread and its digest thread, without the threads."""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from engine.layer_gate import StepLayers
from kv_transfer.core.events import Blocks, Cancelled, Landed, Live, Pool, PushFailed, TransferKey
from kv_transfer.core.fanout import DigestLane, LaneDigested, OpenLanes, PushLane
from kv_transfer.core.lanes import Heads, Layers, layout_of
from kv_transfer.core.session import CancelPushes, CloseLanding, LandingOpened
from kv_transfer.transports.copying import Job, Landings, next_job
from kv_transfer.transports.records import LaneCopy, records
from messages.common import KVEndpoint, KVShard, WorkerAddress
from messages.ids import Address
from runtime.kv_port import LaneHasher
from simulator.history import Read, Wrote
from simulator.model import BLOCK, LAYERS, Truth

if TYPE_CHECKING:
    from simulator.worker import Worker


class Landing(NamedTuple):
    """Blocks of one lane, some layers of them, on their way to a two-sided receiver."""

    key: TransferKey
    to: KVEndpoint
    heads: Heads
    layers: Layers
    first: int
    rows: Pool


class Surroundings(Protocol):
    """What a worker sees of the world."""

    truth: Truth
    one_sided: bool
    """Whether KV is written straight into the receiver's memory."""

    @property
    def now(self) -> float: ...
    def send(self, to: Address, message: Any) -> None: ...
    def send_data(self, landing: Landing) -> None: ...
    def rank_at(self, endpoint: KVEndpoint) -> "Rank | None":
        """Whose memory an address leads to, while its process is there."""

    def named(self, address: WorkerAddress) -> "Worker | None":
        """That very incarnation, while it is there."""

    def gone(self, endpoint: KVEndpoint) -> bool:
        """Whether the process that wrote from there has ended."""

    def spoil(self, to: KVEndpoint, pool: Pool, rows: Any) -> None:
        """These rows of ``pool`` have just been written, for ``to``: they may have changed on the way."""

    def step_fails(self) -> bool:
        """Whether the engine fails in the step that runs."""

    def judge(self, record: Read | Wrote) -> None:
        """This was read or written just now (who takes it fills in when)."""

    def blocks_at_once(self) -> int:
        """That a push copies before it looks at its commands again."""


class Rank:
    """One process of a worker: its memory, its transport's thread, its digest thread."""

    def __init__(self, world: Surroundings, worker: "Worker", number: int, shard: KVShard) -> None:
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

    def _clock(self) -> float:
        return self.world.now

    def perform(self, action: Any) -> None:
        match action:
            case PushLane(key, to, heads, first, source, target, live):
                step = {Live.NO: None, Live.NEXT: self.upcoming, Live.RUNNING: self.running}[live]
                self.jobs.append(Job(key, to, heads, first, source, target, step, self._clock))
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
    def ways(self) -> list[Callable[[], None]]:
        """What may happen here next, beside a step."""
        every = (
            (self.commands, self.obey), (self.cancels, self.cancel), (self.jobs and next_job(self.jobs), self.push),
            (self.hashing, self.hash),
        )  # fmt: skip
        return [way for there, way in every if there]

    def push(self) -> None:
        """Some blocks of the next job leave."""
        job, world = next_job(self.jobs), self.world
        assert job is not None
        to = world.rank_at(job.to)
        if to is None or job.failed:
            self.jobs.remove(job)
            self.report(PushFailed(job.key, "nobody is there, or the step has failed"))
            return
        way = (job.to.shard, job.heads)
        copy = self.copies.get(way) or self.copies.setdefault(way, LaneCopy(self.pool, self.shard, *way))
        layers = job.next_layers(LAYERS)
        end = min(len(job.source), job.begun + world.blocks_at_once())
        source, target = job.source[job.begun : end], job.target[job.begun : end]
        self.worker.check_final(source, layers)
        if world.one_sided:
            to.written(job.key, target)
            copy.write(to.pool, target, source, layers)
            world.spoil(job.to, to.pool, target)
        else:
            rows = np.empty((len(source), copy.layer_bytes * (layers.end - layers.first)), np.uint8)
            copy.pack(rows, source, layers)
            world.spoil(job.to, rows, np.arange(len(source)))
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
            self.worker.wrote(key, blocks, again=not self.world.one_sided)

    def closes(self, key: TransferKey) -> bool:
        """Whether it will close this landing before it does anything else with the blocks."""
        return CloseLanding(key) in self.commands

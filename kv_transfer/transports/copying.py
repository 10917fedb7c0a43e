"""What the transports share: a sender's thread, a two-sided receiver's open landings, and the copy itself."""

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from engine.cpu import pieces
from kv_transfer.core.lanes import Heads, Layers
from kv_transfer.transports.base import (
    Blocks,
    Cancelled,
    OnEvent,
    Pool,
    Pushed,
    PushFailed,
    StepLayers,
    TransferKey,
    TransportError,
)
from kv_transfer.transports.records import LaneCopy
from messages.common import KVEndpoint, KVShard

STEP_BYTES = 8 << 20
"""Copied at once: a cancel, or a close, waits for no more than this."""
STOP_WITHIN = 10.0
"""Seconds that a thread of a transport may take to end."""


def blocks_in(num_bytes: int, block_bytes: int) -> int:
    """Whole blocks in ``num_bytes``, and one at least."""
    return max(1, num_bytes // block_bytes)


def check_blocks(blocks: Blocks, num_blocks: int, whose: str) -> None:
    """Raise ``TransportError`` unless all are blocks of a pool of ``num_blocks``."""
    if len(blocks) and not 0 <= int(blocks.min()) <= int(blocks.max()) < num_blocks:
        raise TransportError(f"blocks {blocks.min()} to {blocks.max()} are not all in {whose} pool of {num_blocks}")


STEP_FAILED = "the step that was to compute them failed"


@dataclass(slots=True, eq=False)
class Job:
    """One push. Its blocks go one after the other: with all layers, or, of a live one, with those that are there."""

    key: TransferKey
    to: KVEndpoint
    heads: Heads
    first: int
    source: Blocks
    target: Blocks
    live: StepLayers | None
    """Tells how many layers are there; else all are."""
    clock: Callable[[], float]
    """That the sender's session has too."""
    layers: Layers | None = None
    """That the blocks go with now."""
    begun: int = 0
    """Leading blocks of which these layers need no more looking at."""
    done: int = 0
    """Leading layers of which no block needs any more looking at."""
    num_bytes: int = 0
    """That have gone to the peer."""
    early_bytes: int = 0
    """Of them, before the last layer was there."""
    pieces: list[tuple[int, float, float]] = field(default_factory=list)
    """See ``Pushed.layers``."""
    piece_begun: float = 0.0

    def check(self, num_blocks: int) -> None:
        """Raise ``TransportError`` unless the blocks can be what the caller and the peer say."""
        if len(self.source) != len(self.target):
            raise TransportError(f"{len(self.source)} source blocks for {len(self.target)} target blocks")
        check_blocks(self.source, num_blocks, "the sender's")
        check_blocks(self.target, self.to.num_blocks, "the receiver's")

    @property
    def failed(self) -> bool:
        return self.live is not None and self.live.failed

    @property
    def waits(self) -> bool:
        """Whether the next layer is not there yet."""
        if self.live is None or self.layers is not None:
            return False
        return self.live.num_ready <= self.done and not self.live.failed

    def next_layers(self, num_layers: int) -> Layers:
        """Of the model's ``num_layers`` those that the next blocks go with; not while it ``waits``."""
        if self.layers is None:
            self.piece_begun = self.clock()
            self.layers = Layers(self.done, num_layers if self.live is None else self.live.num_ready)
        return self.layers

    def went(self, end: int, num_bytes: int) -> None:
        """The blocks up to ``end`` have gone with these layers."""
        assert self.layers is not None
        self.num_bytes += num_bytes
        self.begun = end
        if end == len(self.source):
            if self.live is not None:
                self.pieces.append((self.layers.end, self.piece_begun, self.clock()))
            self.done, self.layers, self.begun = self.layers.end, None, 0

    def taken(self, num_bytes: int) -> None:
        """So many more bytes stand at the peer's."""
        if self.live is not None and not self.live.complete:
            self.early_bytes += num_bytes

    @property
    def pushed(self) -> Pushed:
        at = self.clock()
        return Pushed(self.key, self.first, len(self.source), self.num_bytes, self.early_bytes, at, tuple(self.pieces))


def next_job(jobs: Iterable[Job]) -> Job | None:
    """The first that need not wait; those of one key stay in order."""
    waiting: set[TransferKey] = set()
    for job in jobs:
        if not job.waits and job.key not in waiting:
            return job
        waiting.add(job.key)
    return None


class Cancel(NamedTuple):
    key: TransferKey


class Forget(NamedTuple):
    address: str


class Stop(NamedTuple):
    pass


class Look(NamedTuple):
    """More layers are there."""


class Call(NamedTuple):
    """Something else for the thread to do."""

    call: Callable[[], None]


Command = Job | Cancel | Forget | Stop | Look | Call


class LaneSize(Protocol):
    """What is to be known of a lane's blocks as they travel."""

    num_layers: int
    layer_bytes: int


LaneT = TypeVar("LaneT", bound=LaneSize)
LaneArgument = TypeVar("LaneArgument", bound=LaneSize, contravariant=True)
MakeLane = Callable[[KVShard, Heads], LaneT]
"""How to copy such heads into blocks of such a shard; raises ``ValueError`` where that cannot be."""


def lanes_out_of(pool: Pool, shard: KVShard) -> MakeLane[LaneCopy]:
    """Out of a pool in host memory, whose blocks are those of ``shard``."""
    pieces.prepare()
    return partial(LaneCopy, pool, shard)


class BackgroundSender(ABC, Generic[LaneT]):
    """Hands what it is asked over to a thread of its own, which alone touches peers and reports events."""

    def __init__(self, make_lane: MakeLane[LaneT], on_event: OnEvent, name: str) -> None:
        self._make_lane = make_lane
        self._lanes: dict[tuple[KVShard, Heads], LaneT] = {}
        self._on_event = on_event
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def push(
        self,
        key: TransferKey,
        to: KVEndpoint,
        heads: Heads,
        first: int,
        source: Blocks,
        target: Blocks,
        layers: StepLayers | None = None,
    ) -> None:
        if layers is not None:
            layers.listen(self._look)
        self._post(Job(key, to, heads, first, source, target, layers, time.monotonic))

    def cancel(self, key: TransferKey) -> None:
        self._post(Cancel(key))

    def forget(self, to: KVEndpoint) -> None:
        self._post(Forget(to.address))

    def shutdown(self) -> None:
        """Returns when nothing is read from the pool, or written to a peer, any more; harmless twice."""
        self._post(Stop())
        self._thread.join(STOP_WITHIN)
        if self._thread.is_alive():
            raise TimeoutError(f"{self._thread.name} did not stop within {STOP_WITHIN:.0f} s")

    def _look(self) -> None:
        self._post(Look())

    def _post(self, command: Command) -> None:
        self._commands.put(command)

    def _lane(self, job: Job) -> LaneT:
        """How the blocks of ``job`` are copied; raises ``TransportError`` if they cannot be."""
        way = (job.to.shard, job.heads)
        if way not in self._lanes:
            try:
                self._lanes[way] = self._make_lane(*way)
            except ValueError as error:
                raise TransportError(str(error)) from error
        return self._lanes[way]

    @abstractmethod
    def _run(self) -> None:
        """The thread: carry out commands until ``Stop``."""


class Target(Protocol[LaneArgument]):
    """A peer's pool as ``CopyingSender`` sees it."""

    @property
    def gone(self) -> bool:
        """Whether the peer's process has ended."""

    def write(
        self, key: TransferKey, first: int, target: Blocks, lane: LaneArgument, source: Blocks, layers: Layers
    ) -> None:
        """Copy the lane of blocks ``source`` into the peer's, some ``layers`` of them; raises ``TransportError`` when
        the peer is gone."""

    def release(self) -> None: ...


class CopyingSender(BackgroundSender[LaneT]):
    """Pushes by copying in its own thread, in the order of the pushes, but for those that wait for a layer."""

    def __init__(
        self,
        num_blocks: int,
        make_lane: MakeLane[LaneT],
        on_event: OnEvent,
        name: str,
        attach: Callable[[KVEndpoint], Target[LaneT]],
        step_bytes: int = STEP_BYTES,
    ) -> None:
        """``num_blocks``: of the sender's pool."""
        super().__init__(make_lane, on_event, name)
        self._num_blocks = num_blocks
        self._attach = attach
        self._step_bytes = step_bytes
        self._targets: dict[KVEndpoint, Target[LaneT]] = {}
        self._jobs: deque[Job] = deque()
        self._thread.start()

    def _run(self) -> None:
        while self._obey():
            job = self._next()
            if job is not None:
                self._step(job)
        for target in self._targets.values():
            target.release()
        self._targets.clear()

    def _obey(self) -> bool:
        """Carry out the commands that wait, and wait for one if there is nothing to copy; False at ``Stop``."""
        while True:
            try:
                command = self._commands.get(block=self._next() is None)
            except queue.Empty:
                return True
            match command:
                case Job():
                    self._jobs.append(command)
                case Cancel(key):  # nothing is being copied: this thread is here
                    self._jobs = deque(job for job in self._jobs if job.key != key)
                    self._on_event(Cancelled(key))
                case Forget(address):
                    self._forget(address)
                case Look():
                    pass
                case Call(call):
                    call()
                case Stop():
                    return False

    def _next(self) -> Job | None:
        return next_job(self._jobs)

    def _forget(self, address: str) -> None:
        failed = [job for job in self._jobs if job.to.address == address]
        self._jobs = deque(job for job in self._jobs if job.to.address != address)
        for to in [to for to in self._targets if to.address == address]:
            self._let_go(to)
        for job in failed:
            self._on_event(PushFailed(job.key, "the peer is gone"))

    def _let_go(self, to: KVEndpoint) -> None:
        target = self._targets.pop(to, None)
        if target is not None:
            target.release()

    def _step(self, job: Job) -> None:
        """Copy the next blocks of ``job``."""
        if job.failed:
            self._jobs.remove(job)
            self._on_event(PushFailed(job.key, STEP_FAILED))
            return
        try:
            if not job.begun and not job.done:
                job.check(self._num_blocks)
            lane, target = self._lane(job), self._target(job.to)
            layers = job.next_layers(lane.num_layers)
            row_bytes = (layers.end - layers.first) * lane.layer_bytes
            end = min(job.begun + blocks_in(self._step_bytes, row_bytes), len(job.source))
            part = slice(job.begun, end)
            target.write(job.key, job.first + job.begun, job.target[part], lane, job.source[part], layers)
        except TransportError as error:
            self._jobs.remove(job)
            self._let_go(job.to)
            self._on_event(PushFailed(job.key, str(error)))
            return
        num_bytes = (end - part.start) * row_bytes
        job.went(end, num_bytes)
        job.taken(num_bytes)
        if job.done == lane.num_layers:
            self._jobs.remove(job)
            self._on_event(job.pushed)

    def _target(self, to: KVEndpoint) -> Target[LaneT]:
        if to not in self._targets:
            # Who was cut off, or stood still, when a peer died is not told of it; what takes its place comes to here.
            for known in [known for known, target in self._targets.items() if target.gone]:
                self._let_go(known)
            self._targets[to] = self._attach(to)
        return self._targets[to]


class _Landing:
    def __init__(self, first: int, blocks: Blocks, lanes: tuple[Heads, ...], num_layers: int) -> None:
        self.first = first
        self.blocks = blocks
        self.lanes = {heads: place for place, heads in enumerate(lanes)}
        self._arrived = np.zeros((len(blocks), len(lanes), num_layers), np.bool_)

    def arrived(self, heads: Heads, first: int, count: int, layers: Layers) -> Blocks:
        """Note that these have come; those of them of which every layer of every lane has, since they were last
        told."""
        here = self._arrived[first - self.first : first - self.first + count]
        here[:, self.lanes[heads], layers.first : layers.end] = True
        complete = np.flatnonzero(here.all(axis=(1, 2))).astype(np.int32)
        here[complete] = False
        return complete + np.int32(first)


class Landings:
    """Which rows of a two-sided receiver's pool are open to whom. ``close`` waits for a copy that has begun."""

    def __init__(self, pool: Pool, num_layers: int) -> None:
        self._pool = pool
        self._num_layers = num_layers
        self._lock = threading.Lock()
        self._open: dict[TransferKey, _Landing] = {}

    def open(self, key: TransferKey, first: int, blocks: Blocks, lanes: tuple[Heads, ...]) -> None:
        """The sequence's block ``first + i`` may land in row ``blocks[i]``, each of ``lanes`` of it by itself."""
        if len(blocks) and not 0 <= int(blocks.min()) <= int(blocks.max()) < len(self._pool):
            raise ValueError(f"blocks of {key} are not all in the pool")
        with self._lock:
            self._open[key] = _Landing(first, blocks, lanes, self._num_layers)

    def close(self, key: TransferKey) -> None:
        with self._lock:
            self._open.pop(key, None)

    def land(
        self, key: TransferKey, heads: Heads, layers: Layers, first: int, count: int, copy: Callable[[Blocks], None]
    ) -> Blocks | None:
        """Call ``copy`` with the rows of the sequence's blocks ``first .. first + count`` if all of them are open to
        ``heads``, else return None. Returns the blocks that are complete with it."""
        with self._lock:
            landing = self._open.get(key)
            if landing is None or heads not in landing.lanes:
                return None
            if not 0 <= layers.first < layers.end <= self._num_layers:
                return None
            begin, blocks = landing.first, landing.blocks
            if not begin <= first <= first + count <= begin + len(blocks):
                return None
            copy(blocks[first - begin : first - begin + count])
            return landing.arrived(heads, first, count, layers)

"""A rank's KV pool and its ways in and out of the process, and what rank 0 makes of those of all ranks."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from engine.layer_gate import LayerGate
from kv_transfer.core.digest import digests
from kv_transfer.core.events import Blocks, TransferKey
from kv_transfer.core.fanout import (
    DigestLane,
    Fanout,
    LaneDigested,
    OpenLanes,
    PushLane,
    RankAction,
    RankEvent,
    WorkerAction,
    WorkerEvent,
)
from kv_transfer.core.lanes import Heads
from kv_transfer.core.session import CancelPushes, CloseLanding, LandingOpened, OpenLanding
from kv_transfer.transports.base import Pool, Receiver, Sender
from kv_transfer.transports.records import LaneCopy
from messages.common import KVEndpoint, KVShard, WorkerAddress

DIGEST_BYTES_AT_ONCE = 1 << 20
"""Of a lane that has to be packed to be hashed."""


class FromRank(NamedTuple):
    """What a rank reports."""

    rank: int
    event: RankEvent


class PortFailed(NamedTuple):
    """A thread of the port could not do its work; nothing that waits for it would ever go on."""

    error: BaseException


Post = Callable[[FromRank | PortFailed], None]


class Rank(Protocol):
    """One rank's port, in this process or behind a channel that keeps the order."""

    @property
    def shard(self) -> KVShard: ...
    @property
    def endpoint(self) -> KVEndpoint | None: ...
    @property
    def source(self) -> KVEndpoint | None: ...
    def perform(self, action: RankAction) -> RankEvent | None: ...
    def forget(self, peer: WorkerAddress) -> None: ...


class RankPort:
    """Performs in its own process what rank 0 wants of a rank; ``post`` gets the answers, from any thread."""

    def __init__(
        self,
        rank: int,
        pool: Pool,
        shard: KVShard,
        post: Post,
        *,
        sender: Sender | None = None,
        receiver: Receiver | None = None,
        source: KVEndpoint | None = None,
        layers: LayerGate | None = None,
    ) -> None:
        """``source``: where receivers that look find ``pool``. ``layers``: of the steps that write it, for live
        pushes."""
        self.shard = shard
        self.source = source
        self.sender = sender
        self.receiver = receiver
        self._rank = rank
        self._layers = layers
        self._post = post
        self._hasher = LaneHasher(pool, shard)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-digest")

    @property
    def endpoint(self) -> KVEndpoint | None:
        """Where peers reach this rank's KV, if it receives any."""
        return None if self.receiver is None else self.receiver.endpoint

    def perform(self, action: RankAction) -> RankEvent | None:
        """Returns at once, with the answer if there is one already; later ones come through ``post``."""
        match action:
            case PushLane(key, to, heads, first, source, target, live):
                assert self.sender is not None
                layers = self._layers.upcoming if live and self._layers is not None else None
                assert layers is not None or not live, "nobody tells of this pool's layers"
                self.sender.push(key, to, heads, first, source, target, layers)
            case CancelPushes(key):
                assert self.sender is not None
                self.sender.cancel(key)
            case OpenLanes(key):
                assert self.receiver is not None
                self.receiver.open(*action)
                return LandingOpened(key)
            case CloseLanding(key):
                assert self.receiver is not None
                self.receiver.close(key)
            case DigestLane():
                self._thread.submit(self._digest, action).add_done_callback(self._done)
        return None

    def forget(self, peer: WorkerAddress) -> None:
        """Let go of what leads into a peer that is gone."""
        if self.sender is not None:
            for endpoint in peer.kv:
                self.sender.forget(endpoint)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self.sender is not None:
            self.sender.shutdown()
        if self.receiver is not None:
            self.receiver.shutdown()

    def _digest(self, wanted: DigestLane) -> None:
        taken = self._hasher.digests(wanted)
        self._post(FromRank(self._rank, LaneDigested(wanted.key, wanted.number, wanted.first, taken)))

    def _done(self, future: Future[None]) -> None:
        """A digest that was not taken would leave its transfer waiting for ever: the loop must hear of it."""
        error = None if future.cancelled() else future.exception()
        if error is not None:
            self._post(PortFailed(error))


class LaneHasher:
    """Takes digests of lanes as they travel, for one thread."""

    def __init__(self, pool: Pool, shard: KVShard) -> None:
        self._pool = pool
        self._shard = shard
        self._lanes: dict[tuple[KVShard, Heads], LaneCopy] = {}
        self._packed = np.empty(0, np.uint8)

    def digests(self, wanted: DigestLane) -> bytes:
        way = (wanted.target, wanted.heads)
        if way not in self._lanes:
            self._lanes[way] = LaneCopy(self._pool, self._shard, *way)
        lane = self._lanes[way]
        if lane.whole:
            return digests(self._pool, wanted.blocks, wanted.key, wanted.first)
        at_once = max(1, DIGEST_BYTES_AT_ONCE // lane.row_bytes)
        return b"".join(
            self._some(lane, wanted.blocks[begin : begin + at_once], wanted.key, wanted.first + begin)
            for begin in range(0, len(wanted.blocks), at_once)
        )

    def _some(self, lane: LaneCopy, blocks: Blocks, key: TransferKey, first: int) -> bytes:
        size = len(blocks) * lane.row_bytes
        if self._packed.size < size:
            self._packed = np.empty(size, np.uint8)
        rows = self._packed[:size].reshape(len(blocks), -1)
        lane.pack(rows, blocks)
        return digests(rows, np.arange(len(blocks), dtype=np.int32), key, first)


class KVPort:
    """A worker's ways for KV, as its rank 0 uses them: ``own`` is its own rank, ``others`` are ranks 1, 2, ..."""

    def __init__(self, own: RankPort, others: Sequence[Rank] = ()) -> None:
        self._own = own
        self._ranks: list[Rank] = [own, *others]
        self._one_sided = own.receiver is not None and own.receiver.one_sided
        self._fanout = Fanout(len(self._ranks), sends=own.sender is not None)

    @property
    def endpoints(self) -> tuple[KVEndpoint, ...]:
        """Where peers reach this worker's KV, rank by rank; empty where it receives none."""
        return tuple(rank.endpoint for rank in self._ranks if rank.endpoint is not None)

    @property
    def sources(self) -> tuple[KVEndpoint, ...]:
        """Where peers find the pools that this worker sends from, where their transport looks."""
        return tuple(rank.source for rank in self._ranks if rank.source is not None)

    @property
    def shards(self) -> tuple[KVShard, ...]:
        """What each rank holds of a block."""
        return tuple(rank.shard for rank in self._ranks)

    def perform(self, action: WorkerAction) -> list[WorkerEvent]:
        """Have the ranks do it; what they have answered at once."""
        if isinstance(action, OpenLanding) and self._one_sided:
            return [LandingOpened(action.key)]  # senders were told the blocks: there is nothing to wait for
        answers = [(rank, self._ranks[rank].perform(part)) for rank, part in self._fanout.fan(action)]
        return [event for rank, answer in answers if answer is not None for event in self._fanout.gather(rank, answer)]

    def gather(self, answer: FromRank) -> list[WorkerEvent]:
        """What the worker can say now that one of its ranks says this."""
        return self._fanout.gather(*answer)

    def all_gone(self, writers: Iterable[KVEndpoint]) -> bool:
        """Whether no process can write for any of ``writers`` any more."""
        receiver = self._own.receiver
        assert receiver is not None
        return all(receiver.writer_gone(writer) for writer in writers)

    def forget(self, peer: WorkerAddress) -> None:
        """Let go of what leads into a peer that is gone."""
        for rank in self._ranks:
            rank.forget(peer)

    def close(self) -> None:
        self._own.close()

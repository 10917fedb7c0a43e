"""A rank's KV pool and its ways in and out of the process, and what rank 0 makes of those of all ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from engine.layer_gate import LayerGate, StepLayers
from kv_transfer.core.digest import digests
from kv_transfer.core.events import Blocks, Live, TransferKey
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
from kv_transfer.core.ways import KINDS
from kv_transfer.transports.base import Pool, Receiver, Sender
from kv_transfer.transports.records import LaneCopy
from messages.common import KVEndpoint, KVRank, KVShard, WorkerAddress
from runtime.threads import thread_pool

DIGEST_BYTES_AT_ONCE = 1 << 20
"""Of a lane that has to be packed to be hashed."""
_NONE: Mapping[str, Any] = MappingProxyType({})


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
    def kv(self) -> KVRank: ...
    def perform(self, action: RankAction) -> RankEvent | None: ...
    def forget(self, peer: WorkerAddress) -> None: ...


class RankPort:
    """Performs in its own process what rank 0 wants of a rank; ``post`` gets the answers, from any thread."""

    def __init__(
        self,
        rank: int,
        pool: Pool,
        kv: KVRank,
        post: Post,
        senders: Mapping[str, Sender] = _NONE,
        receivers: Mapping[str, Receiver] = _NONE,
        layers: LayerGate | None = None,
    ) -> None:
        """``senders`` and ``receivers`` by transport; ``kv`` offers what they do. ``layers``: of the steps that write
        ``pool``, for live pushes."""
        self.kv = kv
        self.senders = senders
        self.receivers = receivers
        self._rank = rank
        self._layers = layers
        self._post = post
        self._hasher = LaneHasher(pool, kv.shard)
        self._thread = thread_pool(1, "kv-digest")

    def perform(self, action: RankAction) -> RankEvent | None:
        """Returns at once, with the answer if there is one already; later ones come through ``post``."""
        match action:
            case PushLane(key, to, heads, first, source, target, live):
                self.senders[to.transport].push(key, to, heads, first, source, target, self._step_of(live))
            case CancelPushes(key, transport):
                self.senders[transport].cancel(key)
            case OpenLanes(key, transport, first, blocks, lanes):
                self.receivers[transport].open(key, first, blocks, lanes)
                return LandingOpened(key)
            case CloseLanding(key):
                for receiver in self.receivers.values():
                    receiver.close(key)
            case DigestLane():
                self._thread.submit(self._digest, action).add_done_callback(self._done)
        return None

    def forget(self, peer: WorkerAddress) -> None:
        """Let go of what leads into a peer that is gone."""
        for name, sender in self.senders.items():
            for rank in peer.kv:
                for way in rank.ways:
                    if way.transport == name:
                        sender.forget(KVEndpoint(name, way.address, rank.shard, rank.num_blocks))

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        for sender in self.senders.values():
            sender.shutdown()
        for receiver in self.receivers.values():
            receiver.shutdown()

    def _step_of(self, live: Live) -> StepLayers | None:
        """The step that a live push belongs to. One that is over by now tells so: all of its layers are there, or it
        has failed."""
        if live is Live.NO:
            return None
        assert self._layers is not None, "nobody tells of this pool's layers"
        step = self._layers.upcoming if live is Live.NEXT else self._layers.current
        assert step is not None, "no step runs, nor has one"
        return step

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
            return digests(self._pool, wanted.blocks, wanted.key, wanted.first, lane.layers, lane.heads)
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
        return digests(rows, np.arange(len(blocks), dtype=np.int32), key, first, lane.layers, lane.heads)


class KVPort:
    """A worker's ways for KV, as its rank 0 uses them: ``own`` is its own rank, ``others`` are ranks 1, 2, ..."""

    def __init__(self, own: RankPort, others: Sequence[Rank] = ()) -> None:
        self._own = own
        self._ranks: list[Rank] = [own, *others]
        self._fanout = Fanout(len(self._ranks))

    @property
    def ranks(self) -> tuple[KVRank, ...]:
        """This worker's KV, and the ways into it and out of it."""
        return tuple(rank.kv for rank in self._ranks)

    def perform(self, action: WorkerAction) -> list[WorkerEvent]:
        """Have the ranks do it; what they have answered at once."""
        if isinstance(action, OpenLanding) and KINDS[action.route.transport].one_sided:
            return [LandingOpened(action.key)]  # senders were told the blocks: there is nothing to wait for
        answers = [(rank, self._ranks[rank].perform(part)) for rank, part in self._fanout.fan(action)]
        return [event for rank, answer in answers if answer is not None for event in self._fanout.gather(rank, answer)]

    def gather(self, answer: FromRank) -> list[WorkerEvent]:
        """What the worker can say now that one of its ranks says this."""
        return self._fanout.gather(*answer)

    def all_gone(self, writers: Iterable[KVEndpoint]) -> bool:
        """Whether no process can write for any of ``writers`` any more."""
        return all(self._own.receivers[writer.transport].writer_gone(writer) for writer in writers)

    def forget(self, peer: WorkerAddress) -> None:
        """Let go of what leads into a peer that is gone."""
        for rank in self._ranks:
            rank.forget(peer)

    def close(self) -> None:
        self._own.close()

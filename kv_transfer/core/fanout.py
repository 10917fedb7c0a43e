"""What a session wants of its worker, as what each rank has to do; and the ranks' answers as one.

Rank 0 decides for its group and has the only session. Block numbers are the same on all ranks of a worker, so an action
goes to each rank that has a lane of it. What a rank is told it does in the order in which it is told, and before any
model step that it is told of later: a landing is closed before its blocks have another owner.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kv_transfer.core.digest import combined
from kv_transfer.core.events import Blocks, Cancelled, Landed, Live, Pushed, PushFailed, TransferKey
from kv_transfer.core.lanes import Heads
from kv_transfer.core.session import CancelPushes, CloseLanding, Digested, LandingOpened, OpenLanding, Push, TakeDigests
from messages.common import KVEndpoint, KVShard


class PushLane(NamedTuple):
    """Push ``heads`` of these to one rank of the peer; answered as ``transports.base`` says."""

    key: TransferKey
    to: KVEndpoint
    heads: Heads
    first: int
    source: Blocks
    target: Blocks
    live: Live
    """Of the steps that this rank is told of: ``NEXT`` is the one after this, ``RUNNING`` the last one before it."""


class OpenLanes(NamedTuple):
    """Let the sequence's blocks ``first``, ... land in ``blocks``; answered by ``LandingOpened``."""

    key: TransferKey
    transport: str
    first: int
    blocks: Blocks
    lanes: tuple[Heads, ...]


class DigestLane(NamedTuple):
    """Hash ``heads`` of own blocks, as ``target`` stores them; answered by ``LaneDigested``."""

    key: TransferKey
    number: int
    """Of the lane in its route."""
    target: KVShard
    heads: Heads
    first: int
    blocks: Blocks


class LaneDigested(NamedTuple):
    """Event: the digests that ``DigestLane`` asked for."""

    key: TransferKey
    number: int
    first: int
    digests: bytes


WorkerAction = Push | CancelPushes | TakeDigests | OpenLanding | CloseLanding
RankAction = PushLane | CancelPushes | DigestLane | OpenLanes | CloseLanding
RankEvent = Pushed | PushFailed | Cancelled | LandingOpened | Landed | LaneDigested
WorkerEvent = Pushed | PushFailed | Cancelled | LandingOpened | Landed | Digested


@dataclass(slots=True)
class _Pushing:
    lanes: int
    left: int
    """Lanes not yet reported."""
    num_bytes: int = 0
    early_bytes: int = 0
    at: float = 0.0
    layers: tuple[tuple[int, float, float], ...] = ()


class Fanout:
    """Of one worker with ``num_ranks`` ranks."""

    def __init__(self, num_ranks: int) -> None:
        self._ranks = range(num_ranks)
        self._pushing: dict[Pushed, _Pushing] = {}
        self._cancelling: dict[TransferKey, set[int]] = {}
        """Ranks that have not answered."""
        self._digesting: dict[tuple[TransferKey, int], tuple[int, dict[int, bytes]]] = {}
        """By first block: the number of lanes, and the digests of those that have come."""
        self._opening: dict[TransferKey, set[int]] = {}
        self._landing: dict[TransferKey, tuple[int, np.ndarray[tuple[int, int], np.dtype[np.bool_]]]] = {}
        """The first block, and [rank, block]: arrived since it was last complete."""

    @property
    def idle(self) -> bool:
        """Whether no answer is waited for."""
        return not (self._pushing or self._cancelling or self._digesting or self._opening or self._landing)

    def fan(self, action: WorkerAction) -> list[tuple[int, RankAction]]:
        """Who has to do what for ``action``."""
        match action:
            case Push(key, route, first, source, target, live):
                pushing = self._pushing.setdefault(Pushed(key, first, len(source)), _Pushing(len(route.lanes), 0))
                pushing.left += len(route.lanes)
                return [
                    (lane.sender, PushLane(key, route.to[lane.receiver], lane.heads, first, source, target, live))
                    for lane in route.lanes
                ]
            case CancelPushes(key):
                self._cancelling[key] = set(self._ranks)
                return [(rank, action) for rank in self._ranks]
            case TakeDigests(key, route, first, blocks, sent):
                self._digesting[key, first] = (len(route.lanes), {})
                return [
                    (
                        lane.sender if sent else lane.receiver,
                        DigestLane(key, number, route.to[lane.receiver].shard, lane.heads, first, blocks),
                    )
                    for number, lane in enumerate(route.lanes)
                ]
            case OpenLanding(key, route, first, blocks):
                self._opening[key] = set(self._ranks)
                self._landing[key] = (first, np.zeros((len(self._ranks), len(blocks)), np.bool_))
                return [
                    (rank, OpenLanes(key, route.transport, first, blocks, route.heads_to(rank))) for rank in self._ranks
                ]
            case CloseLanding(key):
                self._opening.pop(key, None)
                self._landing.pop(key, None)
                self._drop_digests(key)
                return [(rank, action) for rank in self._ranks]

    def gather(self, rank: int, event: RankEvent) -> list[WorkerEvent]:
        """What the worker as a whole can say, now that ``rank`` says this; late answers are dropped."""
        match event:
            case Pushed():
                return self._pushed(event)
            case PushFailed():
                return [event]
            case Cancelled(key):
                return self._cancelled(rank, key)
            case LandingOpened(key):
                return [event] if _last(self._opening, key, rank) else []
            case Landed():
                return self._landed(rank, event)
            case LaneDigested():
                return self._digested(event)

    def _pushed(self, event: Pushed) -> list[WorkerEvent]:
        pushing = self._pushing.get(event)
        if pushing is None:
            return []
        pushing.left -= 1
        pushing.num_bytes += event.num_bytes
        pushing.early_bytes += event.early_bytes
        pushing.at = max(pushing.at, event.at)
        pushing.layers += event.layers
        if pushing.left % pushing.lanes:
            return []
        pushed = Pushed(
            event.key, event.first, event.count, pushing.num_bytes, pushing.early_bytes, pushing.at, pushing.layers
        )
        pushing.num_bytes, pushing.early_bytes, pushing.layers = 0, 0, ()
        if not pushing.left:
            del self._pushing[event]
        return [pushed]

    def _cancelled(self, rank: int, key: TransferKey) -> list[WorkerEvent]:
        if not _last(self._cancelling, key, rank):
            return []
        for pushed in [pushed for pushed in self._pushing if pushed.key == key]:
            del self._pushing[pushed]
        self._drop_digests(key)
        return [Cancelled(key)]

    def _landed(self, rank: int, event: Landed) -> list[WorkerEvent]:
        if event.key not in self._landing:
            return []
        first, arrived = self._landing[event.key]
        places = event.indices - first
        arrived[rank, places] = True
        complete = arrived[:, places].all(axis=0)
        arrived[:, places[complete]] = False
        return [Landed(event.key, event.indices[complete])] if complete.any() else []

    def _digested(self, event: LaneDigested) -> list[WorkerEvent]:
        wanted, lanes = self._digesting.get((event.key, event.first), (0, {}))
        lanes[event.number] = event.digests
        if len(lanes) != wanted:
            return []
        del self._digesting[event.key, event.first]
        return [Digested(event.key, event.first, combined([lanes[number] for number in range(wanted)]))]

    def _drop_digests(self, key: TransferKey) -> None:
        for of, first in [each for each in self._digesting if each[0] == key]:
            del self._digesting[of, first]


def _last(waiting: dict[TransferKey, set[int]], key: TransferKey, rank: int) -> bool:
    """Whether ``rank`` is the last that ``key`` has waited for, which it does no longer then."""
    ranks = waiting.get(key)
    if ranks is None:
        return False
    ranks.discard(rank)
    if ranks:
        return False
    del waiting[key]
    return True

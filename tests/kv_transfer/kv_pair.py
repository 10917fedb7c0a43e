"""Two pools with a transport between them, and what it has reported."""

import queue
from random import Random
from typing import Any

import numpy as np

from kv_transfer.core.events import Landed, TransferKey
from kv_transfer.core.lanes import Heads, heads_of, layout_of
from kv_transfer.transports.base import OnEvent, Pool, Receiver, Sender, StepLayers
from kv_transfer.transports.build import allocate_pool, make_receiver, make_sender
from kv_transfer.transports.faulty import FaultyReceiver, FaultySender
from messages.common import KVEndpoint, KVShard
from messages.ids import Attempt, RequestId

WAIT = 10.0


def shard_of_bytes(block_bytes: int) -> KVShard:
    """Of a block of so many bytes, of one layer and one head."""
    values = block_bytes // 4
    head_dim = next(side for side in range(min(values, 4096), 0, -1) if values % side == 0)
    return KVShard(1, head_dim, values // head_dim, "float16", 1, 0, 1)


ALL = Heads(0, 1)
"""The heads of a shard of bytes."""


class Events:
    """What a transport has reported, waited for."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.put = self._queue.put

    def next(self) -> Any:
        return self._queue.get(timeout=WAIT)

    def until(self, last: Any) -> list[Any]:
        """Everything up to ``last``, an event or a type of event."""
        got: list[Any] = []
        while not got or not (got[-1] == last or (isinstance(last, type) and isinstance(got[-1], last))):
            got.append(self.next())
        return got

    def landed(self, count: int) -> list[Landed]:
        """Arrivals until ``count`` blocks have come."""
        got: list[Landed] = []
        while sum(len(event.indices) for event in got) < count:
            got += self.until(Landed)
        return got

    @property
    def empty(self) -> bool:
        return self._queue.empty()


class Pair:
    """A sender over ``here`` and a receiver over ``there``."""

    def __init__(
        self,
        transport: str,
        wrapped: bool,
        num_blocks: int = 64,
        block_bytes: int = 4096,
        shards: tuple[KVShard, KVShard] | None = None,
    ) -> None:
        """``shards``: the sender's and the receiver's; else blocks of ``block_bytes``, of one layer and one head."""
        shard, into = shards or (shard_of_bytes(block_bytes),) * 2
        self._memories = [allocate_pool(transport, num_blocks, layout_of(each).block_bytes) for each in (shard, into)]
        self.here, self.there = (memory.pool for memory in self._memories)
        self.here[:] = np.random.default_rng(0).integers(0, 256, self.here.shape, np.uint8)
        self.sent, self.received = Events(), Events()
        self._heads = heads_of(into)

        def sender(pool: Pool, on_event: OnEvent) -> Sender:
            return make_sender(transport, pool, shard, on_event)

        def receiver(on_event: OnEvent) -> Receiver:
            return make_receiver(transport, "127.0.0.1", self._memories[1], into, on_event)

        rng = Random(0)
        self.receiver: Receiver
        self.sender: Sender
        if wrapped:
            self.receiver = FaultyReceiver(self.there, receiver, self.received.put, [], rng)
            self.sender = FaultySender(self.here, sender, self.sent.put, [], rng)
        else:
            self.receiver, self.sender = receiver(self.received.put), sender(self.here, self.sent.put)
        self.to = self.receiver.endpoint

    def open(self, key: TransferKey, first: int, blocks: Any) -> None:
        self.receiver.open(key, first, blocks, (self._heads,))

    def push(
        self,
        key: TransferKey,
        first: int,
        source: Any,
        target: Any,
        to: KVEndpoint | None = None,
        layers: StepLayers | None = None,
    ) -> None:
        self.sender.push(key, to or self.to, self._heads, first, source, target, layers)

    def close(self) -> None:
        self.sender.shutdown()
        self.receiver.shutdown()
        self.here = self.there = np.empty((0, 0), np.uint8)
        for memory in self._memories:
            memory.release()


def key(number: int = 1, attempt: int = 1) -> TransferKey:
    return TransferKey(RequestId(f"{number:032x}"), Attempt(attempt))


def scattered(seed: int, count: int, num_blocks: int = 64) -> Any:
    """``count`` different blocks in any order."""
    return np.random.default_rng(seed).permutation(num_blocks)[:count].astype(np.int32)

"""Both workers on one host: the sender copies straight into the receiver's pool, which is a memfd that it has mapped.

One copy, and the receiver's process does nothing. It cannot refuse a write either: see ``one_sided`` in ``base``.
"""

import select

from engine.shared_memory import owner_gone
from kv_transfer.core.lanes import Layers, layout_of
from kv_transfer.transports.base import Blocks, Heads, OnEvent, Pool, TransferKey, TransportError
from kv_transfer.transports.copying import CopyingSender, check_blocks, lanes_out_of
from kv_transfer.transports.memory import PeerMemory, SharedMemory
from kv_transfer.transports.records import LaneCopy
from messages.common import KVEndpoint, KVShard


class ShmReceiver:
    """Only says where the pool is."""

    one_sided = True

    def __init__(self, memory: SharedMemory, shard: KVShard) -> None:
        self.endpoint = KVEndpoint("shm", memory.address, shard, len(memory.pool))

    def open(self, key: TransferKey, first: int, blocks: Blocks, lanes: tuple[Heads, ...]) -> None:
        """Nothing to do: the sender was told the blocks."""

    def close(self, key: TransferKey) -> None:
        """Nothing can be done: the caller keeps the blocks in quarantine."""

    def writer_gone(self, writer: KVEndpoint) -> bool:
        return writer.transport == "shm" and owner_gone(writer.address)

    def shutdown(self) -> None:
        """Nothing runs; the memory is its owner's to release."""


class _Peer:
    def __init__(self, to: KVEndpoint) -> None:
        self._memory = PeerMemory(to.address, to.num_blocks, layout_of(to.shard).block_bytes)
        self._process = select.poll()
        self._process.register(self._memory.process, select.POLLIN)

    @property
    def gone(self) -> bool:
        return bool(self._process.poll(0))

    def write(
        self, key: TransferKey, first: int, target: Blocks, lane: LaneCopy, source: Blocks, layers: Layers
    ) -> None:
        if self.gone:
            raise TransportError("the process of the KV pool has died")
        check_blocks(target, len(self._memory.pool), "the receiver's")
        lane.write(self._memory.pool, target, source, layers)

    def release(self) -> None:
        self._memory.release()


class ShmSender(CopyingSender[LaneCopy]):
    """Reports ``Pushed`` when the blocks stand in the peer's pool."""

    def __init__(self, pool: Pool, shard: KVShard, on_event: OnEvent) -> None:
        super().__init__(len(pool), lanes_out_of(pool, shard), on_event, "kv-shm", _Peer)

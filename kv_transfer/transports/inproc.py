"""Both workers in one process: a sender finds the receiver in a registry, which copies into its own pool."""

import itertools
import os
import threading

from kv_transfer.core.lanes import Layers
from kv_transfer.transports.base import Blocks, Heads, Landed, OnEvent, Pool, TransferKey, TransportError
from kv_transfer.transports.copying import CopyingSender, Landings, lanes_out_of
from kv_transfer.transports.records import LaneCopy
from messages.common import KVEndpoint, KVShard

_numbers = itertools.count(1)
_receivers: dict[str, "InprocReceiver"] = {}
_lock = threading.Lock()


class InprocReceiver:
    """Two-sided: what comes for a key that is not open is dropped and counted."""

    one_sided = False

    def __init__(self, pool: Pool, shard: KVShard, on_event: OnEvent) -> None:
        self._pool = pool
        self._on_event = on_event
        self._landings = Landings(pool, shard.num_layers)
        self.dropped = 0
        """Pieces of pushes that were not taken."""
        self.endpoint = KVEndpoint("inproc", f"inproc://{os.getpid()}/{next(_numbers)}", shard, len(pool))
        with _lock:
            _receivers[self.endpoint.address] = self

    def open(self, key: TransferKey, first: int, blocks: Blocks, lanes: tuple[Heads, ...]) -> None:
        self._landings.open(key, first, blocks, lanes)

    def close(self, key: TransferKey) -> None:
        self._landings.close(key)

    def writer_gone(self, writer: KVEndpoint) -> bool:
        """Nobody has to know: this process writes itself."""
        return False

    def shutdown(self) -> None:
        with _lock:
            _receivers.pop(self.endpoint.address, None)

    def take(self, key: TransferKey, first: int, lane: LaneCopy, source: Blocks, layers: Layers) -> None:
        """Copy the lane of blocks ``source``, or some ``layers`` of it, into what is open for the sequence's blocks
        ``first``, ...; any thread."""
        if lane.target != self.endpoint.shard:
            raise TransportError(f"blocks of {lane.target} do not fit a pool of {self.endpoint.shard}")
        landed = self._landings.land(
            key, lane.heads, layers, first, len(source), lambda rows: lane.write(self._pool, rows, source, layers)
        )
        if landed is None:
            self.dropped += 1
        elif len(landed):
            self._on_event(Landed(key, landed))


class _Peer:
    gone = False
    """Its process is this one."""

    def __init__(self, address: str) -> None:
        self._address = address

    def write(
        self, key: TransferKey, first: int, target: Blocks, lane: LaneCopy, source: Blocks, layers: Layers
    ) -> None:
        del target  # the receiver knows them itself
        with _lock:
            receiver = _receivers.get(self._address)
        if receiver is None:
            raise TransportError(f"there is no KV pool at {self._address} in this process")
        receiver.take(key, first, lane, source, layers)

    def release(self) -> None:
        pass


class InprocSender(CopyingSender[LaneCopy]):
    """Reports ``Pushed`` when the receiver has taken, or dropped, the blocks."""

    def __init__(self, pool: Pool, shard: KVShard, on_event: OnEvent) -> None:
        super().__init__(len(pool), lanes_out_of(pool, shard), on_event, "kv-inproc", lambda to: _Peer(to.address))

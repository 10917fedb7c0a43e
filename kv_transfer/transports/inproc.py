"""Both workers in one process: a sender finds the receiver in a registry, which copies into its own pool."""

import itertools
import os
import threading

import numpy as np

from kv_transfer.transports.base import Blocks, Landed, OnEvent, Pool, TransferKey, TransportError
from kv_transfer.transports.copying import CopyingSender, Landings, copy_blocks
from messages.common import KVEndpoint

_numbers = itertools.count(1)
_receivers: dict[str, "InprocReceiver"] = {}
_lock = threading.Lock()


class InprocReceiver:
    """Two-sided: what comes for a key that is not open is dropped and counted."""

    one_sided = False

    def __init__(self, pool: Pool, layout: str, on_event: OnEvent) -> None:
        self._pool = pool
        self._on_event = on_event
        self._landings = Landings(pool)
        self.dropped = 0
        """Pieces of pushes that were not taken."""
        self.endpoint = KVEndpoint("inproc", f"inproc://{os.getpid()}/{next(_numbers)}", layout, len(pool))
        with _lock:
            _receivers[self.endpoint.address] = self

    def open(self, key: TransferKey, first: int, blocks: Blocks) -> None:
        self._landings.open(key, first, blocks)

    def close(self, key: TransferKey) -> None:
        self._landings.close(key)

    def writer_gone(self, writer: KVEndpoint) -> bool:
        """Nobody has to know: this process writes itself."""
        return False

    def shutdown(self) -> None:
        with _lock:
            _receivers.pop(self.endpoint.address, None)

    def take(self, key: TransferKey, first: int, pool: Pool, source: Blocks) -> None:
        """Copy rows ``source`` of ``pool`` into the rows open for the sequence's blocks ``first``, ...; any thread."""
        if pool.shape[1] != self._pool.shape[1]:
            raise TransportError(f"blocks of {pool.shape[1]} bytes do not fit a pool of {self._pool.shape[1]}")
        count = len(source)
        if self._landings.land(key, first, count, lambda rows: copy_blocks(self._pool, rows, pool, source)):
            self._on_event(Landed(key, np.arange(first, first + count, dtype=np.int32)))
        else:
            self.dropped += 1


class _Peer:
    def __init__(self, address: str) -> None:
        self._address = address

    def write(self, key: TransferKey, first: int, target: Blocks, pool: Pool, source: Blocks) -> None:
        del target  # the receiver knows them itself
        with _lock:
            receiver = _receivers.get(self._address)
        if receiver is None:
            raise TransportError(f"there is no KV pool at {self._address} in this process")
        receiver.take(key, first, pool, source)

    def release(self) -> None:
        pass


class InprocSender(CopyingSender):
    """Reports ``Pushed`` when the receiver has taken, or dropped, the blocks."""

    def __init__(self, pool: Pool, on_event: OnEvent) -> None:
        super().__init__(pool, on_event, "kv-inproc", lambda to: _Peer(to.address))

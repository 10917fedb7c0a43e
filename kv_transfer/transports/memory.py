"""The bytes behind a KV pool.

Pools are mapped once and used for every sequence: in a virtual machine the first touch of a page costs more than the
copy into it. So a thread touches them all while the model is being loaded; nobody waits for it. A pool that other
processes write into is shared memory that goes with its processes (``engine.shared_memory``).
"""

import contextlib
import ctypes
import mmap
import os
import threading

import numpy as np

from engine.shared_memory import Shared, SharedMemoryError, attach
from kv_transfer.transports.base import Pool, TransportError

_MADV_POPULATE_WRITE = 23  # Linux 5.14; earlier ones answer EINVAL, and pages come at the first touch
_PREFAULT_BYTES = 32 << 20  # at once, so that release need not wait long

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Mapped:
    """A mapping as ``[num_blocks, block_bytes]``: page-aligned, in huge pages where the system gives them.

    Its pages are touched in the background.
    """

    def __init__(self, mapping: mmap.mmap, num_blocks: int, block_bytes: int) -> None:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
        flat: Pool = np.frombuffer(mapping, np.uint8, num_blocks * block_bytes)
        self.pool: Pool = flat.reshape(num_blocks, block_bytes)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._prefault, name="kv-prefault", daemon=True)
        self._thread.start()

    def _prefault(self) -> None:
        start, size = self.pool.ctypes.data, self.pool.nbytes
        for offset in range(0, size, _PREFAULT_BYTES):
            length = min(_PREFAULT_BYTES, size - offset)
            # ctypes lets go of the GIL, mmap.madvise does not.
            if self._stop.is_set() or _libc.madvise(start + offset, length, _MADV_POPULATE_WRITE):
                return

    def wait_until_touched(self) -> None:
        """Return when every page is there: for benchmarks."""
        self._thread.join()

    def release(self) -> None:
        """Let go of ``pool``. It is unmapped when the last array or tensor over it has gone."""
        self._stop.set()
        self._thread.join()
        self.pool = np.empty((0, self.pool.shape[1]), np.uint8)


class PrivateMemory(Mapped):
    """A pool that only its own process can reach."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        mapping = mmap.mmap(-1, _checked(num_blocks, block_bytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        super().__init__(mapping, num_blocks, block_bytes)


class SharedMemory(Mapped):
    """A pool that other processes of the same user on this host can map: they open ``address``."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self._shared = Shared(_checked(num_blocks, block_bytes))
        self.address = self._shared.address
        super().__init__(self._shared.map(), num_blocks, block_bytes)

    def release(self) -> None:
        """As above; peers that have mapped it keep their mapping, and no other can be made."""
        self._shared.close()
        super().release()


class PeerMemory(Mapped):
    """Another process's ``SharedMemory``, mapped."""

    def __init__(self, address: str, num_blocks: int, block_bytes: int) -> None:
        """Raises ``TransportError`` if what stands at ``address`` is not the pool that it names."""
        try:
            mapping, self._process = attach(address, num_blocks * block_bytes)
        except SharedMemoryError as error:
            raise TransportError(f"the KV pool: {error}") from error
        super().__init__(mapping, num_blocks, block_bytes)

    @property
    def process(self) -> int:
        """A pidfd; readable when the owner has died."""
        return self._process

    def release(self) -> None:
        super().release()
        if self._process >= 0:
            os.close(self._process)
            self._process = -1


def _checked(num_blocks: int, block_bytes: int) -> int:
    if num_blocks < 1 or block_bytes < 1:
        raise ValueError(f"a KV pool needs blocks: {num_blocks} of {block_bytes} bytes")
    return num_blocks * block_bytes

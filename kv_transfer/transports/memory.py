"""The bytes behind a KV pool.

Pools are mapped once and used for every sequence: in a virtual machine the first touch of a page costs more than the
copy into it. So a thread touches them all while the model is being loaded; nobody waits for it.

A pool that other processes write into is a memfd. The kernel frees it with the last process that maps it, so nothing
is left behind whatever dies. It is sealed against shrinking: a truncated file would kill, with SIGBUS, whoever copies
into it.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import re
import secrets
import select
import threading
from typing import NamedTuple

import numpy as np

from kv_transfer.transports.base import Pool, TransportError

_MADV_POPULATE_WRITE = 23  # Linux 5.14; earlier ones answer EINVAL, and pages come at the first touch
_PREFAULT_BYTES = 32 << 20  # at once, so that release need not wait long
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_ADDRESS = re.compile(r"/proc/([1-9]\d{0,6})/fd/(\d{1,9})#([0-9a-f]{32}):(\d{1,18})")

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
        size, nonce = _checked(num_blocks, block_bytes), secrets.token_hex(16)
        self._fd = os.memfd_create(_name(nonce), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, size)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            mapping = mmap.mmap(self._fd, size)
        except OSError:
            os.close(self._fd)
            raise
        self.address = f"/proc/{os.getpid()}/fd/{self._fd}#{nonce}:{size}"
        super().__init__(mapping, num_blocks, block_bytes)

    def release(self) -> None:
        """As above; peers that have mapped it keep their mapping, and no other can be made."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        super().release()


class _Address(NamedTuple):
    pid: int
    path: str
    nonce: str
    size: int


class PeerMemory(Mapped):
    """Another process's ``SharedMemory``, mapped."""

    def __init__(self, address: str, num_blocks: int, block_bytes: int) -> None:
        """Raises ``TransportError`` if what stands at ``address`` is not the pool that it names."""
        wanted = _parsed(address)
        if num_blocks < 1 or wanted.size != num_blocks * block_bytes:
            raise TransportError(f"a pool of {num_blocks} blocks of {block_bytes} bytes is not {wanted.size} bytes")
        try:
            self._process = os.pidfd_open(wanted.pid)  # before the memory, so that it is not a later process's
        except OSError as error:
            raise TransportError(f"process {wanted.pid} of the KV pool is gone: {error}") from error
        try:
            mapping = _map(wanted)
        except OSError as error:
            os.close(self._process)
            raise TransportError(f"cannot map the KV pool at {wanted.path}: {error}") from error
        except TransportError:
            os.close(self._process)
            raise
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


def owner_gone(address: str) -> bool:
    """Whether the process that made the pool at ``address`` has released it, or has died with all its threads.

    False where that cannot be told, and for what is no address.
    """
    try:
        wanted = _parsed(address)
        process = os.pidfd_open(wanted.pid)
    except ProcessLookupError:
        return True
    except (OSError, TransportError):
        return False
    try:
        exit_seen = select.poll()
        exit_seen.register(process, select.POLLIN)
        return bool(exit_seen.poll(0)) or _stands_elsewhere(wanted)
    finally:
        os.close(process)


def _stands_elsewhere(wanted: _Address) -> bool:
    """Whether the process of that number lives and has something else, or nothing, where the pool was."""
    try:
        return os.readlink(wanted.path) != _link(wanted.nonce)
    except FileNotFoundError:
        # A process whose main thread has ended shows no file at all, while another thread may be writing still.
        with contextlib.suppress(OSError):
            return bool(os.listdir(os.path.dirname(wanted.path)))
    except OSError:
        pass
    return False


def _map(wanted: _Address) -> mmap.mmap:
    if os.readlink(wanted.path) != _link(wanted.nonce):  # before it is opened: opening a device can do things
        raise TransportError(f"{wanted.path} is not the KV pool that it was")
    fd = os.open(wanted.path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        # Again, now that it cannot change any more.
        if os.readlink(f"/proc/self/fd/{fd}") != _link(wanted.nonce) or os.fstat(fd).st_size != wanted.size:
            raise TransportError(f"{wanted.path} is not the KV pool that it was")
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise TransportError(f"{wanted.path} could shrink while it is written to")
        return mmap.mmap(fd, wanted.size)
    finally:
        os.close(fd)


def _parsed(address: str) -> _Address:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise TransportError(f"{address!r} is no address of a shared KV pool")
    pid, fd, nonce, size = match.groups()
    return _Address(int(pid), f"/proc/{pid}/fd/{fd}", nonce, int(size))


def _name(nonce: str) -> str:
    return f"baton-kv-{nonce}"


def _link(nonce: str) -> str:
    return f"/memfd:{_name(nonce)} (deleted)"


def _checked(num_blocks: int, block_bytes: int) -> int:
    if num_blocks < 1 or block_bytes < 1:
        raise ValueError(f"a KV pool needs blocks: {num_blocks} of {block_bytes} bytes")
    return num_blocks * block_bytes

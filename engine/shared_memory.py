"""Memory that processes of one user on one host share, without a name that anyone could squat on or forget to remove.

It is a memfd. The kernel frees it with the last process that maps it, so nothing is left behind whatever dies. It is
sealed against shrinking: a truncated file would kill, with SIGBUS, whoever copies into it. Peers open it through
``/proc`` by an address that holds a random nonce, and check what they have opened.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import re
import secrets
import select
from pathlib import Path
from typing import NamedTuple

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MACHINE_ID = Path("/etc/machine-id")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ADDRESS = re.compile(r"/proc/([1-9]\d{0,6})/fd/(\d{1,9})#([0-9a-f]{32}):(\d{1,18})")


class SharedMemoryError(Exception):
    """What stands at an address cannot be mapped, or is not what the address names."""


class Shared:
    """``size`` bytes, zeroed; others map them by ``address`` until ``close``."""

    def __init__(self, size: int) -> None:
        self._size = size
        nonce = secrets.token_hex(16)
        self._fd = os.memfd_create(_name(nonce), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, size)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            os.close(self._fd)
            raise
        self.address = f"/proc/{os.getpid()}/fd/{self._fd}#{nonce}:{size}"

    def map(self) -> mmap.mmap:
        """A mapping of this process's own; it outlives ``close``."""
        return mmap.mmap(self._fd, self._size)

    def close(self) -> None:
        """No other process can map it from now on; those that did keep their mapping."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def mapping_host() -> str:
    """The same in two processes where each can ``attach`` what the other shares, as far as the system says it.

    That is the same boot of the same machine, and the same pid namespace and user: what ``/proc`` and its permissions
    go by. Raises ``SharedMemoryError`` where this process's memory cannot be mapped at all.
    """
    try:
        probe = Shared(mmap.PAGESIZE)
    except OSError as error:
        raise SharedMemoryError(f"cannot make memory to share: {error}") from error
    try:
        mapping, process = attach(probe.address, mmap.PAGESIZE)
        mapping.close()
        os.close(process)
    finally:
        probe.close()
    try:
        facts = [_MACHINE_ID.read_text() if _MACHINE_ID.exists() else "", _BOOT_ID.read_text()]
        facts += [os.readlink(f"/proc/self/ns/{space}") for space in ("pid", "user")]
        owner = os.stat("/proc/self").st_uid  # not the user's where others of the user may not look into it
    except OSError as error:
        raise SharedMemoryError(f"cannot tell which processes share this host: {error}") from error
    if owner != os.geteuid():
        raise SharedMemoryError("the system keeps this process's files from others of the same user (not dumpable)")
    return hashlib.blake2b("\n".join([*facts, str(owner)]).encode(), digest_size=16).hexdigest()


def attach(address: str, size: int) -> tuple[mmap.mmap, int]:
    """Another process's ``Shared`` of that size -> its mapping, and a pidfd of its owner, which the caller closes.

    Raises ``SharedMemoryError``.
    """
    wanted = _parsed(address)
    if wanted.size != size:
        raise SharedMemoryError(f"{address} is not {size} bytes")
    try:
        process = os.pidfd_open(wanted.pid)  # before the memory, so that it is not a later process's
    except OSError as error:
        raise SharedMemoryError(f"process {wanted.pid} of the shared memory is gone: {error}") from error
    try:
        return _map(wanted), process
    except OSError as error:
        os.close(process)
        raise SharedMemoryError(f"cannot map the shared memory at {wanted.path}: {error}") from error
    except SharedMemoryError:
        os.close(process)
        raise


def owner_gone(address: str) -> bool:
    """Whether the process that made the memory at ``address`` has closed it, or has died with all its threads.

    False where that cannot be told, and for what is no address.
    """
    try:
        wanted = _parsed(address)
        process = os.pidfd_open(wanted.pid)
    except ProcessLookupError:
        return True
    except (OSError, SharedMemoryError):
        return False
    try:
        return has_exited(process) or _stands_elsewhere(wanted)
    finally:
        os.close(process)


def has_exited(process: int) -> bool:
    """Whether the process of a pidfd has ended; never waits."""
    exit_seen = select.poll()
    exit_seen.register(process, select.POLLIN)
    return bool(exit_seen.poll(0))


class _Address(NamedTuple):
    pid: int
    path: str
    nonce: str
    size: int


def _stands_elsewhere(wanted: _Address) -> bool:
    """Whether the process of that number lives and has something else, or nothing, where the memory was."""
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
        raise SharedMemoryError(f"{wanted.path} is not the shared memory that it was")
    fd = os.open(wanted.path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        # Again, now that it cannot change any more.
        if os.readlink(f"/proc/self/fd/{fd}") != _link(wanted.nonce) or os.fstat(fd).st_size != wanted.size:
            raise SharedMemoryError(f"{wanted.path} is not the shared memory that it was")
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise SharedMemoryError(f"{wanted.path} could shrink while it is written to")
        return mmap.mmap(fd, wanted.size)
    finally:
        os.close(fd)


def _parsed(address: str) -> _Address:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise SharedMemoryError(f"{address!r} is no address of shared memory")
    pid, fd, nonce, size = match.groups()
    return _Address(int(pid), f"/proc/{pid}/fd/{fd}", nonce, int(size))


def _name(nonce: str) -> str:
    return f"baton-{nonce}"


def _link(nonce: str) -> str:
    return f"/memfd:{_name(nonce)} (deleted)"

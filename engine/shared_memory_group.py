"""Ranks of one host that meet in shared memory: an all-reduce of a few KiB in tens of microseconds.

Each rank has a counter and two slots. In a round it writes its slot, raises its counter, and waits until every other
counter stands as high; then all slots of the round may be read. The next round uses the other slots, and by the time
that a slot is written again all have passed the round after the one that read it. A step begins with a round without
data, so a step that failed on some ranks leaves nothing behind.

Relies on stores becoming visible in order (x86; see ``supported``).
"""

import ctypes
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.core.errors import GroupLost, StepLost
from engine.core.shards import part
from engine.parallel import ParallelGroup
from engine.shared_memory import Shared, SharedMemoryError, attach, has_exited

SLOT_BYTES = 512 << 10
"""What a rank contributes to one round; larger tensors take several. Two ranks' slots stay in a core's cache."""
SILENT_AFTER = 30.0
"""Seconds that a rank may take to the next round before it is given up."""
JOIN_WITHIN = 120.0
"""Seconds from the first rank that joins to the last."""
_LINE = 64  # bytes between two ranks' words, so that they share no cache line
_COUNTER, _FAILED, _PID = 0, 1, 2  # a rank's words, of 8 bytes
_LEFT = (1 << 63) - 1  # in place of a step
_ROUNDS = 1 << 32  # a counter is step * _ROUNDS + round
_SPINS = 200  # turns before other processes are let in between
_YIELDS = 1000  # turns that let them in, about a millisecond, before this process sleeps between looks
_NAP = 50e-6  # seconds
_TURNS_A_LOOK = 500  # between two looks at whether the rank lives
_libc = ctypes.CDLL(None)  # its calls let go of the GIL, which os.sched_yield does not before Python 3.12


def supported() -> bool:
    """Whether this processor shows other processes our stores in the order in which they were made."""
    return platform.machine() in ("x86_64", "AMD64")


class SharedMemoryGroup(ParallelGroup):
    """Joined by every rank with what ``create`` gave to rank 0; waits until all are there. Raises ``GroupLost``."""

    def __init__(
        self,
        rank: int,
        size: int,
        shared: Shared | str,
        *,
        timeout: float = SILENT_AFTER,
        join_within: float = JOIN_WITHIN,
    ) -> None:
        self.rank, self.size = rank, size
        self._timeout = timeout
        self._owned = shared if isinstance(shared, Shared) else None
        self._processes: dict[int, int] = {}  # rank -> pidfd
        try:
            if isinstance(shared, Shared):
                mapping = shared.map()
            else:
                mapping, owner = attach(shared, _bytes(size))
                self._processes[0] = owner
        except SharedMemoryError as error:
            raise GroupLost(f"rank {rank} cannot join its group: {error}") from error
        self._memory = memoryview(mapping)
        self._words = self._memory[: size * _LINE].cast("q")
        self._others = [(peer, peer * _LINE // 8) for peer in range(size) if peer != rank]
        self._mine = rank * _LINE // 8
        self._step, self._now = 1, _ROUNDS
        self._parity = 0
        self._slots: dict[torch.dtype, list[list[torch.Tensor]]] = {}
        try:
            self._meet(join_within)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, size: int) -> Shared:
        """The memory of a group; rank 0 takes it, the others its ``address``."""
        return Shared(_bytes(size))

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """See ``ParallelGroup``. 16-bit values of more than two ranks are added in fp32 and rounded once."""
        flat = tensor.view(-1)
        limit = SLOT_BYTES // tensor.itemsize
        for start in range(0, len(flat), limit):
            piece = flat[start : start + limit]
            slots = [slot[: len(piece)] for slot in self._next_slots(tensor.dtype)]
            slots[self.rank].copy_(piece)
            self._round()
            _sum(slots, piece)
        return tensor

    def gather(self, tensor: torch.Tensor, columns: int) -> torch.Tensor:
        """See ``ParallelGroup``."""
        rows = len(tensor)
        shares = [part(columns, rank, self.size) for rank in range(self.size)]
        widest = max(len(share) for share in shares)
        limit = SLOT_BYTES // tensor.itemsize
        width = min(limit, widest)
        height = max(1, limit // width)
        whole = tensor
        if self.rank == 0:
            whole = tensor.new_empty(rows, columns)
            whole[:, : len(shares[0])] = tensor
        for top in range(0, rows, height):
            for left in range(0, widest, width):
                slots = self._next_slots(tensor.dtype)
                if self.rank != 0:
                    piece = tensor[top : top + height, left : left + width]
                    slots[self.rank][: piece.numel()].view(piece.shape).copy_(piece)
                self._round()
                if self.rank == 0:
                    for share, slot in zip(shares[1:], slots[1:], strict=True):
                        piece = whole[:, share.start : share.stop][top : top + height, left : left + width]
                        piece.copy_(slot[: piece.numel()].view(piece.shape))
        return whole

    @contextmanager
    def step(self) -> Iterator[None]:
        """See ``ParallelGroup``."""
        self._step += 1
        self._now = self._step * _ROUNDS - 1
        self._parity = 0
        try:
            self._round()
            yield
        except GroupLost:
            raise
        except BaseException:
            self._words[self._mine + _FAILED] = self._step
            self._words[self._mine + _COUNTER] = self._broken()  # whoever waits for us looks up
            raise

    def check(self) -> None:
        """See ``ParallelGroup``."""
        for peer, offset in self._others:
            if self._words[offset + _FAILED] == _LEFT:
                raise GroupLost(f"rank {peer} of {self.size} has left the group")
        for peer, process in self._processes.items():
            if has_exited(process):
                raise GroupLost(f"rank {peer} of {self.size} has died")

    def close(self) -> None:
        """See ``ParallelGroup``; the memory goes when all ranks have let go of it."""
        self._words[self._mine + _FAILED] = _LEFT
        for process in self._processes.values():
            os.close(process)
        self._processes.clear()
        if self._owned is not None:
            self._owned.close()

    def _next_slots(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Every rank's slot of the coming round."""
        slots = self._slots.get(dtype)
        if slots is None:
            count = SLOT_BYTES // dtype.itemsize
            start = _head(self.size)
            flat = torch.frombuffer(self._memory, dtype=dtype, offset=start, count=2 * self.size * count)
            slots = [list(pair) for pair in flat.view(2, self.size, count).unbind(0)]
            self._slots[dtype] = slots
        self._parity ^= 1
        return slots[self._parity]

    def _round(self) -> None:
        """Say that our slot is written; return when every rank's is."""
        self._now += 1
        self._words[self._mine + _COUNTER] = self._now
        for peer, offset in self._others:
            self._wait(peer, offset + _COUNTER, self._now, self._timeout)
            failed = self._words[offset + _FAILED]
            if failed >= self._step and (failed != _LEFT or self._words[offset + _COUNTER] == self._broken()):
                raise StepLost(f"rank {peer} of {self.size} failed in this step")

    def _broken(self) -> int:
        """The counter of a rank that failed in this step: above that of every round of it."""
        return (self._step + 1) * _ROUNDS - 1

    def _wait(self, peer: int, word: int, wanted: int, timeout: float) -> None:
        """Until a word of ``peer`` is ``wanted`` or more; ``GroupLost`` if it is dead, or silent for too long."""
        words = self._words
        for _ in range(_SPINS):
            if words[word] >= wanted:
                return
        began, turns = time.monotonic(), 0
        while words[word] < wanted:
            if turns < _YIELDS:
                _libc.sched_yield()
            else:  # whoever is waited for may need this core
                time.sleep(_NAP)
            turns += 1
            if turns % _TURNS_A_LOOK == 0:
                self.check()
                if time.monotonic() - began > timeout:
                    raise GroupLost(f"rank {peer} of {self.size} has been silent for {timeout:g} s")

    def _meet(self, timeout: float) -> None:
        """Wait until every rank is here, and hold on to its process."""
        self._words[self._mine + _PID] = os.getpid()
        for peer, offset in self._others:
            self._wait(peer, offset + _PID, 1, timeout)
            if peer not in self._processes:
                try:
                    self._processes[peer] = os.pidfd_open(self._words[offset + _PID])
                except OSError as error:
                    raise GroupLost(f"rank {peer} of {self.size} has died") from error
        if self._owned is not None:
            self._owned.close()  # all have it: nobody else is to map it


def _sum(slots: list[torch.Tensor], out: torch.Tensor) -> None:
    """The slots in the order of their ranks."""
    if len(slots) == 2 or out.dtype is torch.float32:
        torch.add(slots[0], slots[1], out=out)
        for slot in slots[2:]:
            out += slot
        return
    total = slots[0].float()
    for slot in slots[1:]:
        total += slot
    out.copy_(total)


def _head(size: int) -> int:
    """Bytes before the slots: whole pages."""
    return -(-size * _LINE // 4096) * 4096


def _bytes(size: int) -> int:
    return _head(size) + 2 * size * SLOT_BYTES

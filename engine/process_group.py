"""Ranks that meet through torch.distributed: NCCL between GPUs, gloo where memory cannot be shared as it should."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from engine.core.errors import GroupLost, ModelError
from engine.core.shards import part
from engine.parallel import ParallelGroup

SILENT_AFTER = 60.0
"""Seconds that a rank may take to the next meeting before it is given up."""


def check_backend(backend: str) -> None:
    """``ModelError`` where this torch cannot meet through ``backend``."""
    there = dist.is_available() and (dist.is_nccl_available() if backend == "nccl" else dist.is_gloo_available())
    if not there:
        raise ModelError(f"tensor_parallel > 1 needs {backend}, which this build of torch has not; write 1")


class ProcessGroup(ParallelGroup):
    """Joined by every rank; ``rendezvous`` is a file that does not exist yet, in a folder of this user's own.

    A step that fails on one rank leaves the others waiting in the middle of it, so it ends the group. Raises
    ``GroupLost``, and ``ModelError`` where the backend is not there.
    """

    def __init__(self, rank: int, size: int, backend: str, rendezvous: Path, *, timeout: float = SILENT_AFTER) -> None:
        check_backend(backend)
        self.rank, self.size = rank, size
        # Ranks are on one host: nothing of theirs is to be heard outside.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        with self._told("cannot join"):
            dist.init_process_group(
                backend,
                store=dist.FileStore(str(rendezvous), size),  # type: ignore[attr-defined]
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout),
            )

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """See ``ParallelGroup``."""
        with self._told("has lost"):
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor, columns: int) -> torch.Tensor:
        """See ``ParallelGroup``. What is sent has the width of the widest share: backends want equals."""
        shares = [part(columns, rank, self.size) for rank in range(self.size)]
        widest = max(len(share) for share in shares)
        padded = torch.nn.functional.pad(tensor, (0, widest - tensor.shape[1])).contiguous()
        pieces = [torch.empty_like(padded) for _ in shares] if self.rank == 0 else None
        with self._told("has lost"):
            dist.gather(padded, pieces)
        if pieces is None:
            return tensor
        return torch.cat([piece[:, : len(share)] for piece, share in zip(pieces, shares, strict=True)], 1)

    @contextmanager
    def step(self) -> Iterator[None]:
        """See ``ParallelGroup``."""
        try:
            yield
        except GroupLost:
            raise
        except Exception as error:
            raise GroupLost(
                f"a step failed on rank {self.rank} of {self.size}, and the others could not be told: {error}"
            ) from error

    def close(self) -> None:
        """See ``ParallelGroup``."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors are
            raise GroupLost(f"rank {self.rank} {what} its group of {self.size}: {error}") from error

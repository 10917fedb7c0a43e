"""The tensor-parallel group that a model runs on: who holds what, and the few ways in which ranks meet.

Every rank makes the same calls in the same order. ``ParallelGroup`` itself is a group of one;
``engine.shared_memory_group`` is for ranks of one host on CPUs, ``engine.process_group`` for all others.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.core.shards import HeadShard, head_shard, part


class ParallelGroup:
    """``rank`` of ``size``; the methods of a group of one."""

    rank = 0
    size = 1

    def part(self, count: int) -> range:
        """This rank's share of ``count`` columns, rows or experts; may be one more than another rank's."""
        return part(count, self.rank, self.size)

    def heads(self, num_heads: int, num_kv_heads: int) -> HeadShard:
        """This rank's attention heads; ``ValueError`` where heads are fewer than ranks."""
        return head_shard(num_heads, num_kv_heads, self.rank, self.size)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place; ``tensor`` is contiguous. Bit by bit the same on every rank."""
        return tensor

    def gather(self, tensor: torch.Tensor, columns: int) -> torch.Tensor:
        """``[rows, part(columns)]`` of each rank -> ``[rows, columns]`` on rank 0; elsewhere what was given."""
        return tensor

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around all that one step of the model does on this rank.

        What is raised within ends the step on every rank: there as ``StepLost``, or, where the group has no way to
        tell, as ``GroupLost``.
        """
        yield

    def check(self) -> None:
        """``GroupLost`` if another rank is known to be gone; never waits."""

    def close(self) -> None:
        """Leave the group. Ranks that still count on this one get ``GroupLost``."""

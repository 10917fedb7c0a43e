"""The tensor-parallel group that a model runs on. For now a group has one rank; the seam is where more will come in."""

from dataclasses import dataclass

import torch

from engine.core.errors import ModelError


@dataclass(frozen=True, slots=True)
class ParallelGroup:
    """``rank`` of ``size``: a rank holds ``1 / size`` of the heads and of the MLP's columns."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if (self.rank, self.size) != (0, 1):
            raise ModelError("tensor_parallel must be 1 in this version")

    def share(self, count: int, what: str) -> int:
        """This rank's part of ``count`` things."""
        if count % self.size:
            raise ModelError(f"{count} {what} do not divide among {self.size} ranks")
        return count // self.size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        return tensor

"""Whole blocks that a step copies before it computes anything."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Pairs = NDArray[np.int32]
"""``[n, 2]``: from, to."""


def pairs(listed: list[tuple[int, int]] = ()) -> Pairs:  # type: ignore[assignment]
    return np.array(listed, np.int32).reshape(-1, 2)


@dataclass(frozen=True, slots=True)
class BlockMoves:
    """In this order: what is swapped out may be overwritten by what is swapped in, and that may be copied. Within each
    kind no block is written twice, and none is read after it is written."""

    swap_out: Pairs = field(default_factory=pairs)
    """Block of the pool -> block of the host tier."""
    swap_in: Pairs = field(default_factory=pairs)
    """Block of the host tier -> block of the pool."""
    copies: Pairs = field(default_factory=pairs)
    """Block of the pool -> block of the pool."""

    def __bool__(self) -> bool:
        return bool(len(self.swap_out) or len(self.swap_in) or len(self.copies))


class Saved(NamedTuple):
    """KV of a preempted sequence in the host tier."""

    slots: NDArray[np.int32]
    """Of its leading blocks, which the sequence holds."""
    num_tokens: int

"""The pool of KV blocks: numbers only, the memory lies elsewhere."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """``free + held + cached == total``, always."""

    free: int
    held: int
    """Owned by a sequence, a promise or a hand-over."""
    cached: int
    """Owned by nobody, kept for their content; 0 without a prefix cache."""
    total: int


class BlockPool:
    """Gives out and takes back ``num_blocks`` blocks of ``block_size`` tokens. A block has one owner."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks, got {num_blocks} of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the blocks freed last are given out first, while they are still in a cache of the processor.
        self._stack = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
        self._free = num_blocks
        self._held = np.zeros(num_blocks, np.bool_)

    @property
    def num_free(self) -> int:
        return self._free

    def allocate(self, count: int) -> Blocks | None:
        """``count`` blocks, now held by the caller; None when there are not so many."""
        assert count >= 0
        if count > self._free:
            return None
        self._free -= count
        blocks = self._stack[self._free : self._free + count][::-1].copy()
        self._held[blocks] = True
        return blocks

    def free(self, blocks: Blocks) -> None:
        """Take blocks back. A block that is not held, or comes twice, is a bug of the caller's."""
        if not len(blocks):
            return
        assert self._held[blocks].all(), f"freed blocks that nobody held: {blocks[~self._held[blocks]].tolist()}"
        self._held[blocks] = False
        assert self._free + len(blocks) + int(self._held.sum()) == self.num_blocks, f"freed twice at once: {blocks}"
        self._stack[self._free : self._free + len(blocks)] = blocks
        self._free += len(blocks)

    def counts(self) -> BlockCounts:
        return BlockCounts(free=self._free, held=int(np.count_nonzero(self._held)), cached=0, total=self.num_blocks)

    def check_integrity(self) -> None:
        """Every block is free or held, not both."""
        free = self._stack[: self._free]
        assert len(np.unique(free)) == len(free), "a block is free twice"
        assert not self._held[free].any(), "a block is free and held"
        assert int(self._held.sum()) + self._free == self.num_blocks, "a block is lost"

"""The pool of KV blocks: numbers only, the memory lies elsewhere.

A block is free, held by one or more owners, or cached: owned by nobody and kept for its content. Content is known by
the hash of all tokens up to the block's end (``engine.core.prefix``); a block is registered once its KV is written.
What is held may be claimed for a hand-over, on its way out (``pin``) or in (``move``): see ``engine.core.ownership``.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.core.ownership import BlockState, check_moves

Blocks = NDArray[np.int32]
NO_BLOCKS: Blocks = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """``free + held + cached == total``, always."""

    free: int
    held: int
    """Owned by a sequence, a promise or a hand-over; by several of them, it counts once."""
    cached: int
    """Owned by nobody, kept for their content until somebody needs the room."""
    total: int


class BlockPool:
    """``num_blocks`` blocks of ``block_size`` tokens, counted by owner. Everything here is O(1) a block."""

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        """Without ``caching`` nothing is ever registered, so no content outlives its owners."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks, got {num_blocks} of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = caching
        self.num_references = 0
        """Owners, summed over all blocks."""
        self.prefix_cache_queries = 0
        """Tokens that were looked up for sequences that began; the names are vLLM's."""
        self.prefix_cache_hits = 0
        """Those of them whose KV was there."""
        # A stack: the blocks freed last are given out first, while they are still in a cache of the processor.
        self._stack = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
        self._free = num_blocks
        self._refs = np.zeros(num_blocks, np.int32)
        self._pins = np.zeros(num_blocks, np.int32)
        """Hand-overs that read it; each of them is an owner too."""
        self._incoming = np.zeros(num_blocks, np.int8)
        """PROMISED, LANDING, LANDED or QUARANTINED, else 0."""
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._registered = np.zeros(num_blocks, np.bool_)
        self._by_hash: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()
        """Cached blocks, the one that was let go of first in front."""

    @property
    def num_free(self) -> int:
        """Blocks that can be had: free ones, and cached ones at the cost of their content."""
        return self._free + len(self._unused)

    def allocate(self, count: int, evicted: Callable[[int, bytes], None] | None = None) -> Blocks | None:
        """``count`` blocks, now held by the caller; None when there are not so many.

        Content that makes room is the least recently used; ``evicted(block, hash)`` is called for each block of it.
        """
        assert count >= 0
        if count > self.num_free:
            return None
        fresh = min(count, self._free)
        self._free -= fresh
        blocks = np.empty(count, np.int32)
        blocks[:fresh] = self._stack[self._free : self._free + fresh][::-1]
        for place in range(fresh, count):
            block, _ = self._unused.popitem(last=False)
            blocks[place] = block
            digest = self._forget(block)
            if evicted is not None:
                evicted(block, digest)
        self._refs[blocks] = 1
        self.num_references += count
        return blocks

    def share(self, blocks: Blocks) -> None:
        """One owner more for each of these, which are held or cached, and no KV is on its way into them."""
        assert not self._incoming[blocks].any(), f"nobody may read {self._described(blocks)}"
        for block in blocks[self._refs[blocks] == 0].tolist():
            del self._unused[block]
        self._refs[blocks] += 1
        self.num_references += len(blocks)

    def free(self, blocks: Blocks) -> None:
        """One owner less for each of these, every block once. What nobody owns any more is cached or free.

        Later blocks of a sequence are given up first: without its beginning, an end is of no use.
        """
        if not len(blocks):
            return
        refs = self._refs[blocks]
        assert (refs > self._pins[blocks]).all() and not self._incoming[blocks].any(), (
            f"nobody may give up {self._described(blocks)}"
        )
        self._refs[blocks] = refs - 1
        self.num_references -= len(blocks)
        idle = blocks[refs == 1]
        known = self._registered[idle]
        for block in idle[known][::-1].tolist():
            self._unused[block] = None
        gone = idle[~known]
        assert self._free + len(gone) <= self.num_blocks, f"freed twice at once: {blocks.tolist()}"
        self._stack[self._free : self._free + len(gone)] = gone
        self._free += len(gone)

    def pin(self, blocks: Blocks) -> None:
        """A hand-over that owns these reads them from now on, whoever else does."""
        if not self._refs[blocks].all() or self._incoming[blocks].any():
            check_moves(blocks, self.states(blocks), BlockState.PINNED)
        self._pins[blocks] += 1

    def unpin(self, blocks: Blocks) -> None:
        """The hand-over reads them no more, and can give them up."""
        assert (self._pins[blocks] > 0).all(), f"no hand-over reads {self._described(blocks)}"
        self._pins[blocks] -= 1

    def move(self, blocks: Blocks, state: BlockState) -> None:
        """KV is on its way into these, which have one owner: PROMISED, LANDING, LANDED or QUARANTINED. With HELD it is
        so no more, and nobody else can write into them."""
        incoming = self._incoming[blocks]
        if not incoming.all():  # the other moves keep what this one has seen
            check_moves(blocks, self.states(blocks), state)
            alone = (self._refs[blocks] == 1).all() and not self._registered[blocks].any()
            assert alone, f"others may read {self._described(blocks)}"
        else:
            check_moves(blocks, incoming, state)
        self._incoming[blocks] = 0 if state is BlockState.HELD else state

    def states(self, blocks: Blocks) -> NDArray[np.int8]:
        """The ``BlockState`` of each of these, int8."""
        incoming = self._incoming[blocks]
        if incoming.all():
            return incoming
        claimed = self._refs[blocks] > 0
        further = np.where(claimed, self._pins[blocks] > 0, self._registered[blocks])
        states: NDArray[np.int8] = 2 * claimed.view(np.int8) + further.view(np.int8)  # FREE, CACHED, HELD, PINNED
        return np.where(incoming > 0, incoming, states)

    def register(self, block: int, digest: bytes) -> None:
        """The KV of ``block``, which is held, is final and has this hash. If another block has it too, that one stays
        the one to be found."""
        assert self._refs[block] > 0 and not self._incoming[block], f"block {block} is registered, and held by nobody"
        if self.caching and not self._registered[block] and digest not in self._by_hash:
            self._by_hash[digest] = block
            self._hashes[block] = digest
            self._registered[block] = True

    def discard(self, digest: bytes) -> None:
        """Whatever has this hash is no good: it shall not be found again."""
        block = self._by_hash.get(digest)
        if block is None:
            return
        self._forget(block)
        if block in self._unused:
            del self._unused[block]
            self._stack[self._free] = block
            self._free += 1

    def lookup(self, digest: bytes) -> int | None:
        """The block with this content."""
        return self._by_hash.get(digest)

    def match(self, names: list[bytes]) -> Blocks:
        """The blocks of the first of these, as far as they are here one after the other."""
        found: list[int] = []
        for name in names:
            block = self._by_hash.get(name)
            if block is None:
                break
            found.append(block)
        return np.array(found, np.int32)

    def looked_up(self, num_tokens: int, num_found: int) -> None:
        """Count a lookup."""
        self.prefix_cache_queries += num_tokens
        self.prefix_cache_hits += num_found

    def num_unheld(self, blocks: Blocks) -> int:
        """How many of these are cached only, so that sharing them takes them from what can be had."""
        return int(np.count_nonzero(self._refs[blocks] == 0))

    def final(self, block: int) -> bool:
        """Whether ``block`` may not be written to: somebody else reads it, or may find it."""
        return bool(self._refs[block] > 1 or self._registered[block])

    def num_claimed(self) -> tuple[int, int]:
        """Pins, summed over all blocks, and blocks into which KV is on its way."""
        return int(self._pins.sum()), int(np.count_nonzero(self._incoming))

    def counts(self) -> BlockCounts:
        cached = len(self._unused)
        return BlockCounts(
            free=self._free, held=self.num_blocks - self._free - cached, cached=cached, total=self.num_blocks
        )

    def check_integrity(self) -> None:
        """Every block is free, held or cached, and nothing else; every hash leads to its block."""
        free = self._stack[: self._free]
        unused = np.fromiter(self._unused, np.int32, len(self._unused))
        assert len(np.unique(free)) == len(free), "a block is free twice"
        assert not self._refs[free].any() and not self._registered[free].any(), "a block is free and held, or known"
        assert not self._refs[unused].any() and self._registered[unused].all(), "a block is cached and held, or unknown"
        assert (self._refs >= self._pins).all() and (self._pins >= 0).all(), "a hand-over reads what it does not own"
        incoming = self._incoming > 0
        assert (self._refs[incoming] == 1).all() and not self._registered[incoming].any(), "a block lands into another"
        assert not self._pins[incoming].any(), "a block is on its way in and out"
        assert (self._refs >= 0).all() and int(self._refs.sum()) == self.num_references, "owners are miscounted"
        held = int(np.count_nonzero(self._refs))
        assert held + self._free + len(unused) == self.num_blocks, "a block is lost"
        assert all(self._hashes[block] == digest for digest, block in self._by_hash.items()), "a hash leads astray"
        assert len(self._by_hash) == int(self._registered.sum()), "a registered block cannot be found"

    def _described(self, blocks: Blocks) -> str:
        return ", ".join(
            f"block {block} ({BlockState(state).name})"
            for block, state in zip(blocks.tolist(), self.states(blocks).tolist(), strict=True)
        )

    def _forget(self, block: int) -> bytes:
        digest = self._hashes[block]
        assert digest is not None
        del self._by_hash[digest]
        self._hashes[block] = None
        self._registered[block] = False
        return digest

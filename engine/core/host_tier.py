"""The host tier: KV blocks that the pool had no room for, in host memory of a size of its own.

It holds the blocks of preempted sequences until they go on, and, as far as there is room left, content that the pool's
prefix cache has evicted. Its slots are a ``BlockPool``: held, cached by hash, evicted least recently used first.

Moves are asked for while a step is scheduled and happen when it runs. Until ``done`` nothing that is to be written can
be found, and nothing that is to be read is given away.
"""

import numpy as np

from engine.core.blocks import BlockPool, Blocks
from engine.core.moves import Pairs, pairs


class HostTier:
    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        self.pool = BlockPool(num_blocks, block_size, caching=caching)
        self.blocks_out = 0
        self.blocks_in = 0
        self._out: list[tuple[int, int]] = []
        self._in: list[tuple[int, int]] = []
        self._arriving: dict[bytes, int] = {}
        """Slots that the step writes, by the name of what will stand in them."""
        self._lent: list[Blocks] = []
        """Slots to be let go of when the step has run."""

    @property
    def num_lent(self) -> int:
        """Slots held for the step alone."""
        return sum(len(slots) for slots in self._lent)

    def offload(self, block: int, name: bytes) -> None:
        """``block`` of the pool loses this content: keep it here if there is room."""
        if name in self._arriving or self.pool.lookup(name) is not None:
            return
        slots = self.pool.allocate(1)
        if slots is None:
            return
        slot = int(slots[0])
        self._out.append((block, slot))
        self._arriving[name] = slot
        self._lent.append(slots)

    def save(self, blocks: Blocks, names: list[bytes]) -> Blocks | None:
        """Keep ``blocks`` of a sequence; the first ones have ``names``, and what is here already is not copied. Returns
        their slots, which the caller holds, or None when there is no room."""
        known = [self._arriving.get(name, self.pool.lookup(name)) for name in names]
        known += [None] * (len(blocks) - len(names))
        slots = np.array([-1 if slot is None else slot for slot in known], np.int32)
        new = slots < 0
        self.pool.share(slots[~new])
        fresh = self.pool.allocate(int(new.sum()))
        if fresh is None:
            self.pool.free(slots[~new])
            return None
        slots[new] = fresh
        self.pool.share(fresh)  # until they are written, even if the sequence ends before
        self._lent.append(fresh)
        self._out += zip(blocks[new].tolist(), fresh.tolist(), strict=True)
        for name, slot, is_new in zip(names, slots.tolist(), new.tolist(), strict=False):
            if is_new:
                self._arriving[name] = slot
        return slots

    def load(self, slots: Blocks, blocks: Blocks) -> None:
        """Bring ``slots`` back into ``blocks`` of the pool. The caller's hold on the slots ends when that is done."""
        self._in += zip(slots.tolist(), blocks.tolist(), strict=True)
        self._lent.append(slots)

    def take(self) -> tuple[Pairs, Pairs]:
        """What the step has to swap out, and in."""
        moves = pairs(self._out), pairs(self._in)
        self._out, self._in = [], []
        return moves

    def done(self, swapped_out: int, swapped_in: int) -> None:
        """The step has run: what it wrote can be found."""
        self.blocks_out += swapped_out
        self.blocks_in += swapped_in
        for name, slot in self._arriving.items():
            self.pool.register(slot, name)
        self._settle()

    def failed(self) -> None:
        """The step has not run: what it was to write is not here. The slots of ``save`` are still the caller's."""
        self._settle()

    def _settle(self) -> None:
        for slots in self._lent:
            self.pool.free(slots)
        self._lent.clear()
        self._arriving.clear()
        self._out, self._in = [], []

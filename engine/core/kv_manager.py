"""The blocks of sequences: found in the prefix cache, allocated, copied before they are written, swapped, given back.

1. ``find`` looks up how much of a waiting sequence's KV is there already, in the pool or in the host tier.
2. ``take`` gives it those blocks and ``grow`` the others, step by step. A block that somebody else may read is replaced
   by a copy before the sequence writes to it.
3. ``computed`` registers each block whose KV is final: from then on it can be found.
4. ``release`` gives up all of it; ``swap_out`` keeps a copy in the host tier.

Copies and swaps are collected while a step is scheduled (``take_moves``), and happen when it runs. Then comes
``moved``, or ``not_moved`` where the step could not run; nothing that a move reads is overwritten, and nothing that it
writes is found, before that.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from engine.core.blocks import NO_BLOCKS, BlockPool, Blocks
from engine.core.host_tier import HostTier
from engine.core.moves import BlockMoves, Saved, pairs
from engine.core.prefix import BlockHashes
from engine.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Hit:
    """What is there of a sequence's KV: its leading blocks in the pool, and those behind them in the host tier."""

    blocks: Blocks
    slots: Blocks
    num_tokens: int
    """Tokens that need not be computed; one is always left, for its logits."""

    def copies(self, block_size: int) -> bool:
        """Whether the first token that is computed belongs into a shared block, of which a copy must be made."""
        return len(self.blocks) * block_size > self.num_tokens


class KVManager:
    def __init__(self, pool: BlockPool, host: HostTier | None = None) -> None:
        self.pool = pool
        self.host = host
        self._block_size = pool.block_size
        self._evicted: Callable[[int, bytes], None] | None = None if host is None else host.offload
        self._copies: list[tuple[int, int]] = []
        self._sources: list[int] = []
        """Blocks that the next step copies: held until it has."""
        self._saved: list[Sequence] = []
        """Sequences whose blocks the next step swaps out."""

    def names(self, seq: Sequence) -> list[bytes]:
        """The hashes of its full blocks, as far as its tokens are known."""
        if not self.pool.caching:
            return []
        if seq.hashes is None:
            seq.hashes = BlockHashes(seq.salt, self._block_size)
        return seq.hashes.extend(seq.token_ids)

    def find(self, seq: Sequence) -> Hit:
        """What ``seq``, which has no blocks, could start from. One whose prompt is to be scored starts at its first
        token: that takes the logits of them all."""
        names = [] if seq.scores_prompt else self.names(seq)
        found = self.pool.match(names)
        if len(found) * self._block_size == seq.num_tokens and len(found) == self.pool.num_blocks:
            found = found[:-1]  # no block is left for a copy of the last one
        place = len(found)
        if seq.saved is not None:
            slots, num_tokens = seq.saved.slots[place:], max(seq.saved.num_tokens, place * self._block_size)
        else:
            slots = self._find_on_host(names[place:])
            num_tokens = (place + len(slots)) * self._block_size
        return Hit(found, slots, min(num_tokens, seq.num_tokens - 1))

    def needed(self, seq: Sequence, hit: Hit | None) -> int:
        """Blocks that the pool must be able to spare for ``seq`` to compute all tokens that it has."""
        total = -(-seq.num_tokens // self._block_size)
        if hit is None:
            return total - seq.num_blocks + (self._tail_to_copy(seq) is not None)
        held = len(hit.blocks) - self.pool.num_unheld(hit.blocks)
        return total - held + hit.copies(self._block_size)

    def take(self, seq: Sequence, hit: Hit) -> None:
        """Give ``seq`` what was found. The pool has the blocks that this needs: see ``needed``."""
        self.pool.share(hit.blocks)
        if len(hit.slots) or seq.saved is not None:
            self._take_slots(seq, hit)
        seq.append_blocks(hit.blocks)
        seq.num_computed_tokens = hit.num_tokens
        seq.num_final_blocks = min(len(hit.blocks), hit.num_tokens // self._block_size)
        seq.shared_tail = hit.copies(self._block_size)
        if len(hit.slots):
            fresh = self.pool.allocate(len(hit.slots), self._evicted)
            assert fresh is not None and self.host is not None, f"{seq} was found to fit"
            seq.append_blocks(fresh)
            self.host.load(hit.slots, fresh)

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Give ``seq`` blocks of its own for its tokens up to ``num_tokens``; False when the pool has too few."""
        missing = max(0, -(-num_tokens // self._block_size) - seq.num_blocks)
        tail = self._tail_to_copy(seq)
        if missing or tail is not None:
            blocks = self.pool.allocate(missing + (tail is not None), self._evicted)
            if blocks is None:
                return False
            if tail is not None:
                source = seq.replace_block(tail, int(blocks[0]))
                self._copies.append((source, int(blocks[0])))
                self._sources.append(source)
                blocks = blocks[1:]
            seq.append_blocks(blocks)
        seq.shared_tail = False
        return True

    def computed(self, seq: Sequence) -> list[bytes]:
        """``num_computed_tokens`` of ``seq`` are final: register the blocks that are full now; returns their names."""
        full = seq.num_computed_tokens // self._block_size
        if full <= seq.num_final_blocks:
            return []
        first, seq.num_final_blocks = seq.num_final_blocks, full
        if not self.pool.caching:
            return []
        made = self.names(seq)[first:full]
        for block, name in zip(seq.block_table[first:full].tolist(), made, strict=True):
            self.pool.register(block, name)
        return made

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """``child`` begins with the tokens of ``parent``, whose KV is computed: share all of it but the last token's,
        which is computed again for its logits."""
        blocks = parent.block_table[: -(-child.num_tokens // self._block_size)]
        self.pool.share(blocks)
        child.append_blocks(blocks)
        child.num_computed_tokens = child.num_tokens - 1
        child.num_final_blocks = child.num_computed_tokens // self._block_size
        child.shared_tail = parent.shared_tail = True

    def discard(self, seq: Sequence) -> None:
        """Some of the KV that ``seq`` has computed, or found, is no good: none of it is to be found any more."""
        for name in self.names(seq):
            self.pool.discard(name)
            if self.host is not None:
                self.host.pool.discard(name)

    def release(self, seq: Sequence) -> None:
        """Give up all that ``seq`` has; it is computed again, but for what can still be found then."""
        self.pool.free(seq.take_blocks())
        self.forget_saved(seq)
        seq.restart()

    def swap_out(self, seq: Sequence) -> bool:
        """Give up the blocks of ``seq``, with a copy in the host tier; False, and nothing done, if it has no room."""
        used = -(-seq.num_computed_tokens // self._block_size)
        if self.host is None or not used:
            return False
        names = self.names(seq)[: seq.num_computed_tokens // self._block_size]
        slots = self.host.save(seq.block_table[:used], names)
        if slots is None:
            return False
        self.pool.free(seq.take_blocks())
        seq.saved = Saved(slots, seq.num_computed_tokens)
        self._saved.append(seq)
        seq.num_computed_tokens = seq.num_final_blocks = 0
        return True

    def forget_saved(self, seq: Sequence) -> None:
        """Let go of what the host tier keeps for ``seq``."""
        if seq.saved is not None:
            assert self.host is not None
            self.host.pool.free(seq.saved.slots)
            seq.saved = None

    def take_moves(self) -> BlockMoves:
        """What the step has to copy before it computes."""
        out, into = (pairs(), pairs()) if self.host is None else self.host.take()
        copies, self._copies = pairs(self._copies), []
        return BlockMoves(out, into, copies)

    def moved(self, moves: BlockMoves) -> None:
        """The step has run."""
        if self.host is not None:
            self.host.done(len(moves.swap_out), len(moves.swap_in))
        self._settle()

    def not_moved(self) -> None:
        """There was no step, or it failed: whatever was to be saved by it is lost, and computed again."""
        for seq in self._saved:
            if seq.saved is not None:
                self.forget_saved(seq)
                seq.restart()
        if self.host is not None:
            self.host.failed()
        self._settle()

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """``sequences``: all that have blocks from here."""
        self.pool.check_integrity()
        sequences = list(sequences)
        assert sum(seq.num_blocks for seq in sequences) <= self.pool.num_references, "a block's owner is not counted"
        saved = sum(len(seq.saved.slots) for seq in sequences if seq.saved is not None)
        if self.host is not None:
            self.host.pool.check_integrity()
            assert saved + self.host.num_lent == self.host.pool.num_references, "slots of the host tier are lost"

    def _tail_to_copy(self, seq: Sequence) -> int | None:
        """The place in its table of the block that ``seq`` writes to next, if somebody else may read it."""
        tail = seq.num_computed_tokens // self._block_size
        shared = seq.shared_tail and tail < seq.num_blocks and self.pool.final(int(seq.block_table[tail]))
        return tail if shared else None

    def _settle(self) -> None:
        for block in self._sources:  # one at a time: several copies may be of the same block
            self.pool.free(np.array([block], np.int32))
        self._sources.clear()
        self._copies.clear()
        self._saved.clear()

    def _find_on_host(self, names: list[bytes]) -> Blocks:
        return NO_BLOCKS if self.host is None else self.host.pool.match(names)

    def _take_slots(self, seq: Sequence, hit: Hit) -> None:
        """Hold the slots that are to be read; of those that were saved, let go of the others."""
        assert self.host is not None
        if seq.saved is None:
            self.host.pool.share(hit.slots)
        else:
            unused = len(seq.saved.slots) - len(hit.slots)
            self.host.pool.free(seq.saved.slots[:unused])
            seq.saved = None

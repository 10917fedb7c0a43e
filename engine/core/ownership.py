"""The life of a block, as one table; ``docs/protocol.md`` has it in words.

A block has one state, that of the strongest claim on it. Who may read or write it follows from that alone.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class BlockState(IntEnum):
    FREE = 0
    """Nobody's, and nothing is known of what it holds."""
    CACHED = 1
    """Nobody's, kept for its content until somebody needs the room."""
    HELD = 2
    """Sequences of this worker own it; it may be found by its content too."""
    PINNED = 3
    """Hand-overs read it, one or several; sequences may own it and it may be found all the same."""
    PROMISED = 4
    """An attempt shall have it, and nobody writes yet."""
    LANDING = 5
    """The attempt's sender writes, and nobody reads."""
    LANDED = 6
    """All has come, and is being verified; nobody writes."""
    QUARANTINED = 7
    """The attempt was given up, and its sender could still write."""


MOVES: dict[BlockState, frozenset[BlockState]] = {
    BlockState.FREE: frozenset({BlockState.HELD}),
    BlockState.CACHED: frozenset({BlockState.HELD, BlockState.FREE}),
    BlockState.HELD: frozenset({BlockState.FREE, BlockState.CACHED, BlockState.PINNED, BlockState.PROMISED}),
    BlockState.PINNED: frozenset({BlockState.HELD, BlockState.PINNED}),
    BlockState.PROMISED: frozenset({BlockState.LANDING, BlockState.HELD}),
    BlockState.LANDING: frozenset({BlockState.LANDED, BlockState.QUARANTINED, BlockState.HELD}),
    BlockState.LANDED: frozenset({BlockState.HELD, BlockState.PROMISED, BlockState.LANDING, BlockState.QUARANTINED}),
    BlockState.QUARANTINED: frozenset({BlockState.HELD}),
}
"""What may follow what. A claim ends in HELD, by whoever made it; only what is held, and not pinned, is given up."""

_LEGAL = np.zeros((len(BlockState), len(BlockState)), np.bool_)
for _state, _following in MOVES.items():
    _LEGAL[_state, list(_following)] = True


def check_moves(blocks: NDArray[np.int32], states: NDArray[np.int8], to: BlockState) -> None:
    """Raise ``AssertionError`` unless each of ``blocks``, in its state of ``states``, may go to ``to``."""
    legal = _LEGAL[states, to]
    if not legal.all():
        bad = int(np.argmin(legal))
        raise AssertionError(f"block {blocks[bad]} cannot go from {BlockState(states[bad]).name} to {to.name}")

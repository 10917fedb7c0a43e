"""Which copies move blocks from one pool into another of the same layout.

Runs of blocks that are consecutive in both pools become one piece, so that a copy, or a frame, is as large as can be.
"""

from typing import NamedTuple

import numpy as np

from kv_transfer.core.events import Blocks


class Pieces(NamedTuple):
    """Copies in the order of the sequence: ``length[i]`` blocks from block ``source[i]`` on go to ``target[i]`` on."""

    source: Blocks
    target: Blocks
    length: Blocks


def plan(source: Blocks, target: Blocks, max_blocks: int) -> Pieces:
    """The fewest copies, none of more than ``max_blocks``, that move block ``source[i]`` to ``target[i]`` for all i."""
    size = len(source)
    if len(target) != size:
        raise ValueError(f"{size} source blocks for {len(target)} target blocks")
    if not size:
        return Pieces(source, target, np.empty(0, np.int32))
    places = np.arange(size)
    breaks = np.ones(size, np.bool_)
    breaks[1:] = (np.diff(source) != 1) | (np.diff(target) != 1)
    within_run = places - np.maximum.accumulate(np.where(breaks, places, 0))
    starts = np.flatnonzero(within_run % max_blocks == 0)
    length = np.diff(starts, append=size).astype(np.int32)
    return Pieces(source[starts], target[starts], length)

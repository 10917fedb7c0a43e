"""One step's input as plain arrays: what every rank of a tensor-parallel group needs to run its share, and no more.

Rank 0 makes it from the ``StepPlan``; see ``engine.runner``.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from engine.core.moves import BlockMoves

Ints = NDArray[np.int32]

LOGIT_ROWS = 256
"""Scored prompt positions whose logits are made at once: bounds the memory for a long prompt."""


@dataclass(frozen=True)
class StepInput:
    """Rows are sequences; row ``i`` computes ``num_tokens[i]`` tokens behind its first ``num_computed[i]``."""

    tokens: Ints
    """``[tokens]``: the rows' tokens behind each other."""
    num_tokens: Ints
    """``[rows]``, each >= 1."""
    num_computed: Ints
    """``[rows]``."""
    block_tables: Ints
    """``[rows, width]``. Behind a row's own blocks its first block is repeated: no other sequence's is looked at."""
    logit_rows: Ints
    """Places in ``tokens`` whose logits are wanted: first the ``num_sampled`` that a token is drawn at, then those of
    prompts that are scored."""
    num_sampled: int
    moves: BlockMoves = field(default_factory=BlockMoves)
    """Blocks to copy before anything is computed."""

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """``[rows + 1]``: where each row begins in ``tokens``."""
        starts = np.zeros(len(self.num_tokens) + 1, np.int64)
        np.cumsum(self.num_tokens, out=starts[1:])
        return starts

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """``[tokens]``: each token's place in its sequence."""
        return np.arange(self.starts[-1]) - np.repeat(self.starts[:-1] - self.num_computed, self.num_tokens)

    def logit_chunks(self) -> list[slice]:
        """``logit_rows`` in the pieces in which every rank makes their logits."""
        chunks = [slice(0, self.num_sampled)] if self.num_sampled else []
        total = len(self.logit_rows)
        return chunks + [
            slice(first, min(first + LOGIT_ROWS, total)) for first in range(self.num_sampled, total, LOGIT_ROWS)
        ]

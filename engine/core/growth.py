"""How many more blocks a batch will need at its peak, were nobody to join it.

Sequences grow while they decode, and give everything back when they end. With each one's remaining output as expected,
the need is largest just before one of them ends (the "future required memory" of Gong et al.: "Past-Future Scheduler
for LLM Serving under SLA Guarantees", ASPLOS 2025).
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def peak_growth(remaining: Ints, missing: Ints, owned: Ints, block_size: int) -> int:
    """Blocks beyond those held now, at the most, until all have ended.

    Each ``[sequences]``: ``remaining`` tokens until it ends, blocks ``missing`` for the tokens that it has already, and
    blocks ``owned`` that come free at its end.
    """
    order = np.argsort(remaining, kind="stable")
    remaining, missing, owned = remaining[order], missing[order], owned[order]
    ended = np.cumsum(owned) - owned
    present = np.cumsum(missing[::-1])[::-1]
    alive = np.arange(len(order), 0, -1)
    return int((present + alive * -(-remaining // block_size) - ended).max(initial=0))

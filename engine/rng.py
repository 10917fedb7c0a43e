"""A counter-based generator: the number that a token draws depends on (seed, position) and on nothing else.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011), over many tokens at
once.
"""

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10

Words = NDArray[np.uint64]


def philox(counter: Words, key: Words) -> Words:
    """``counter [n, 4]`` and ``key [n, 2]``, words of 32 bits in uint64 -> ``[n, 4]``."""
    counter, key = counter.copy(), key.copy()
    for _ in range(_ROUNDS):
        product = counter[:, (0, 2)] * _MULTIPLIERS
        high, low = product >> _HALF, product & _LOW
        counter = np.stack(
            [high[:, 1] ^ counter[:, 1] ^ key[:, 0], low[:, 1], high[:, 0] ^ counter[:, 3] ^ key[:, 1], low[:, 0]],
            axis=1,
        )
        key = (key + _WEYL) & _LOW
    return counter


def uniforms(seeds: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each (seed, position)."""
    seeds, positions = seeds.astype(np.uint64), positions.astype(np.uint64)
    key = np.stack([seeds & _LOW, seeds >> _HALF], axis=1)
    zero = np.zeros_like(positions)
    words = philox(np.stack([positions & _LOW, positions >> _HALF, zero, zero], axis=1), key)
    bits = ((words[:, 0] << _HALF) | words[:, 1]) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53

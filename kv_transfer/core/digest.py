"""A digest a block, bound to the attempt, to the layers and heads, and to the block's place in the sequence.

XXH3 with 64 bits (Yann Collet), from the ``xxhash`` library: it guards against faults, not against an attacker, who is
kept out by tickets and keys. The seed is made of request, attempt, layers, heads (which say the ranks) and index, so
that a good block in the wrong place, or one that was left there by another request, has another digest.
"""

from collections.abc import Sequence

import numpy as np
import xxhash

from kv_transfer.core.events import Blocks, Pool, TransferKey
from kv_transfer.core.lanes import Heads, Layers

DIGEST_BYTES = 8
ONE_LAYER, ONE_HEAD = Layers(0, 1), Heads(0, 1)
_INDEX_STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: neighbouring indices get far seeds
_MASK = 2**64 - 1


def digests(
    pool: Pool,
    blocks: Blocks,
    key: TransferKey,
    first: int,
    layers: Layers = ONE_LAYER,
    heads: Heads = ONE_HEAD,
) -> bytes:
    """``DIGEST_BYTES`` for each of ``blocks``, which are ``layers`` and ``heads`` of the sequence's blocks ``first``,
    ``first + 1``, ..."""
    bound = (key.request, key.attempt, *layers, *heads)
    base = xxhash.xxh3_64_intdigest("/".join(map(str, bound)).encode())
    return b"".join(
        xxhash.xxh3_64_digest(pool[block], (base + (first + place) * _INDEX_STEP) & _MASK)
        for place, block in enumerate(blocks.tolist())
    )


def combined(lanes: Sequence[bytes]) -> bytes:
    """The digests of blocks from those of their lanes, in the order of the plan. One lane's are the blocks' own.

    A polynomial over the lanes, modulo 2**64, with an odd base: no lane can differ alone and go unseen.
    """
    total = np.frombuffer(lanes[0], "<u8")
    for lane in lanes[1:]:
        total = total * np.uint64(_INDEX_STEP) + np.frombuffer(lane, "<u8")
    return total.tobytes()


def mismatches(expected: bytes, actual: bytes) -> Blocks:
    """Places at which two strings of digests of the same length differ, int32."""
    return np.flatnonzero(np.frombuffer(expected, "<u8") != np.frombuffer(actual, "<u8")).astype(np.int32)

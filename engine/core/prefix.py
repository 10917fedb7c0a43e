"""Names for the content of KV blocks: chained hashes of their tokens.

The KV of a block is a function of every token up to the block's end. So block ``i`` of a sequence is named
``SHA-256(name of block i - 1, tokens of block i)``, tokens as little-endian int32; before the first block stands a hash
of the tenant's salt, so that no name, and no block, is common to two tenants. Only full blocks have names.
"""

import sys
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]

assert sys.byteorder == "little", "tokens are hashed, and sent, as they lie in memory"


def root_hash(salt: bytes) -> bytes:
    """What stands before the first block of every sequence of a tenant."""
    return sha256(b"baton prefix\0" + salt).digest()


class BlockHashes:
    """The names of one sequence's full blocks, made as it grows: each token is hashed once."""

    __slots__ = ("_block_size", "_parent", "names")

    def __init__(self, salt: bytes, block_size: int) -> None:
        self._parent = root_hash(salt)
        self._block_size = block_size
        self.names: list[bytes] = []

    def extend(self, tokens: Tokens) -> list[bytes]:
        """The names of all full blocks of ``tokens``, the sequence's from its first one on."""
        size = 4 * self._block_size
        data = tokens.data.cast("B")
        for start in range(len(self.names) * size, len(data) - size + 1, size):
            hasher = sha256(self._parent)
            hasher.update(data[start : start + size])
            self._parent = hasher.digest()
            self.names.append(self._parent)
        return self.names

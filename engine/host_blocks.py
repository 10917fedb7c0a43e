"""One rank's part of the host tier: KV blocks in host memory, copied from and to the cache as wholes."""

from collections.abc import Iterator

import numpy as np
import torch

from engine.core.moves import Pairs
from engine.kv_cache import KVCache

BYTES_AT_ONCE = 8 << 20


class HostBlocks:
    """``num_blocks`` blocks of ``block_bytes``, in pages that cost nothing until they are written."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self._memory = torch.from_numpy(np.zeros((num_blocks, block_bytes), np.uint8))

    def swap_out(self, cache: KVCache, moves: Pairs) -> None:
        """Block ``moves[i, 0]`` of the cache -> block ``moves[i, 1]`` here."""
        for blocks, slots in self._pieces(moves):
            self._memory.index_copy_(0, slots, cache.bytes.index_select(0, blocks.to(cache.bytes.device)).cpu())

    def swap_in(self, cache: KVCache, moves: Pairs) -> None:
        """Block ``moves[i, 0]`` here -> block ``moves[i, 1]`` of the cache."""
        device = cache.bytes.device
        for slots, blocks in self._pieces(moves):
            cache.bytes.index_copy_(0, blocks.to(device), self._memory.index_select(0, slots).to(device))

    def _pieces(self, moves: Pairs) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """From and to, of so many blocks at once that what stands between the two stays small."""
        step = max(1, BYTES_AT_ONCE // self._memory.shape[1])
        for first in range(0, len(moves), step):
            indices = torch.from_numpy(moves[first : first + step].T.astype(np.int64))
            yield indices[0], indices[1]

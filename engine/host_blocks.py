"""One rank's part of the host tier: KV blocks in host memory, copied from and to the cache as wholes."""

import numpy as np
import torch

from engine.core.moves import Pairs
from engine.kv_cache import KVCache


class HostBlocks:
    """``num_blocks`` blocks of ``block_bytes``, in pages that cost nothing until they are written."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self._memory = torch.from_numpy(np.zeros((num_blocks, block_bytes), np.uint8))

    def swap_out(self, cache: KVCache, moves: Pairs) -> None:
        """Block ``moves[i, 0]`` of the cache -> block ``moves[i, 1]`` here."""
        if len(moves):
            blocks, slots = _indices(moves)
            self._memory.index_copy_(0, slots, cache.bytes.index_select(0, blocks.to(cache.bytes.device)).cpu())

    def swap_in(self, cache: KVCache, moves: Pairs) -> None:
        """Block ``moves[i, 0]`` here -> block ``moves[i, 1]`` of the cache."""
        if len(moves):
            slots, blocks = _indices(moves)
            device = cache.bytes.device
            cache.bytes.index_copy_(0, blocks.to(device), self._memory.index_select(0, slots).to(device))


def _indices(moves: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    indices = torch.from_numpy(moves.T.astype(np.int64))
    return indices[0], indices[1]

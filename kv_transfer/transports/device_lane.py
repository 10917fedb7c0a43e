"""A lane's copies on a GPU: what ``records`` does in host memory, by the engine's kernels."""

import numpy as np
import torch

from engine.core.kv_layout import KVLayout
from engine.kernels.blocks import copy_across, quantize_blocks, records_of, scatter_blocks
from engine.kv_cache import KVCache
from kv_transfer.core.lanes import CannotPair, Heads, Layers, check_pair, layout_of
from kv_transfer.transports.base import Blocks
from messages.common import KVShard

STAGED_BYTES = 32 << 20
"""Of a lane that has to be converted, at once."""


class DeviceLane:
    """Copies ``heads`` out of blocks of ``pool [num_blocks, block_bytes]`` into records of ``target``, on the stream
    that is current. Raises ``CannotPair`` where that cannot be."""

    def __init__(self, pool: torch.Tensor, source: KVShard, target: KVShard, heads: Heads) -> None:
        check_pair(source, target)
        self._heads = heads
        self._target = target
        self._layout = layout_of(target, heads)
        self.num_layers = target.num_layers
        self.layer_bytes = self._layout.layer_bytes
        _heads_in(target, heads)
        cache, held = _cache(pool, source), _heads_in(source, heads)
        self._records = records_of(cache)[:, :, :, held]
        self._values = None if source.dtype == target.dtype else cache.data[:, :, :, held]
        """Of a lane that has to be converted."""

    def write(self, there: torch.Tensor, target: Blocks, source: Blocks, layers: Layers) -> None:
        """``layers`` of block ``source[i]`` -> block ``target[i]`` of ``there [num_blocks, block_bytes]``, a pool of
        ``target``'s shard that this GPU reaches. The numbers must be blocks of the pools."""
        into = records_of(_cache(there, self._target))[
            :, layers.first : layers.end, :, _heads_in(self._target, self._heads)
        ]
        out_of, to = torch.from_numpy(np.stack([source, target]).astype(np.int64)).to(there.device)
        if self._values is None:
            copy_across(self._records[:, layers.first : layers.end], out_of, into, to)
            return
        at_once = max(1, STAGED_BYTES // (self.layer_bytes * (layers.end - layers.first)))
        for some, places in zip(out_of.split(at_once), to.split(at_once), strict=True):
            scatter_blocks(self._converted(self._values[:, layers.first : layers.end], some), into, places)

    def _converted(self, values: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Records of the target's dtype, ``[block, layer, k|v, head, record]``, contiguous."""
        as_sent = KVLayout(
            values.shape[1], self._heads.num, self._layout.head_dim, self._layout.block_size, self._layout.dtype
        )
        memory = torch.zeros(len(blocks) * as_sent.block_bytes, dtype=torch.uint8, device=values.device)
        staged = KVCache(as_sent, memory)
        if staged.scales is None:
            staged.data.copy_(values[blocks])
        else:
            full = torch.full((len(blocks),), as_sent.block_size, dtype=torch.int32, device=values.device)
            quantize_blocks(values, blocks, full, staged.data, staged.scales)
        return records_of(staged)


def _cache(pool: torch.Tensor, shard: KVShard) -> KVCache:
    layout = layout_of(shard)
    if pool.shape[1] != layout.block_bytes:
        raise CannotPair(f"blocks of {pool.shape[1]} bytes are not those of {shard}")
    return KVCache(layout, pool.view(-1))


def _heads_in(shard: KVShard, heads: Heads) -> slice:
    """Where ``heads`` are among those of ``shard``."""
    begin = heads.first - shard.first_head
    if begin < 0 or heads.num < 1 or begin + heads.num > shard.num_heads:
        raise CannotPair(f"KV heads {heads.first} to {heads.first + heads.num - 1} are not all in {shard}")
    return slice(begin, begin + heads.num)

"""A lane's copies: a range of heads out of one pool's blocks into another's, in the other's dtype.

Runs of blocks are copied as one strided piece, straight from view to view: faster than gathering with index arrays,
which makes an array in between. What has to be quantised passes through a scratch that stays in the cache.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from engine.core.kv_layout import QUANTIZED_MAX, KVLayout
from kv_transfer.core.events import Blocks, Pool
from kv_transfer.core.lanes import CannotPair, Heads, check_pair, heads_of, layout_of
from kv_transfer.core.plan import plan
from messages.common import KVShard

Records = NDArray[np.uint8]
"""``[block, layer and k|v, head, record_bytes]``, a view of a pool."""

SCRATCH_VALUES = 28 << 10
"""Quantised at once. torch splits no work below 32 Ki values among threads: it would take them from the model."""
_STORED = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "int8": torch.int8, "fp8": torch.float8_e4m3fn,
}  # fmt: skip


def records(pool: Pool, shard: KVShard, heads: Heads | None = None) -> Records:
    """The records of ``heads`` in ``pool``, whose blocks are those of ``shard``; of all heads without ``heads``."""
    layout = layout_of(shard)
    if pool.shape[1] != layout.block_bytes:
        raise CannotPair(f"blocks of {pool.shape[1]} bytes are not those of {shard}")
    first, num = heads or heads_of(shard)
    begin = first - shard.first_head
    if begin < 0 or num < 1 or begin + num > shard.num_heads:
        raise CannotPair(f"KV heads {first} to {first + num - 1} are not all in {shard}")
    whole = pool.reshape(len(pool), 2 * layout.num_layers, layout.num_kv_heads, layout.record_bytes)
    return whole[:, :, begin : begin + num]


class LaneCopy:
    """Copies ``heads`` out of blocks of ``pool`` into records of ``target``; for one thread.

    Raises ``CannotPair`` where that cannot be.
    """

    def __init__(self, pool: Pool, source: KVShard, target: KVShard, heads: Heads) -> None:
        check_pair(source, target)
        self.whole = source.dtype == target.dtype and heads == heads_of(source) == heads_of(target)
        """Whether a lane is whole blocks, the same at both ends."""
        self.target = target
        self.heads = heads
        self.row_bytes = layout_of(target, heads).block_bytes
        """Of a block of the lane, as it travels."""
        self._pool = pool
        self._source = records(pool, source, heads)
        self._convert = None if source.dtype == target.dtype else _conversion(layout_of(source), layout_of(target))

    def write(self, there: Pool, target: Blocks, source: Blocks) -> None:
        """Block ``source[i]`` -> block ``target[i]`` of a pool of ``target``'s shard."""
        if self.whole:
            copy_blocks(there, target, self._pool, source)
        else:
            self._write(records(there, self.target, self.heads), target, source)

    def pack(self, rows: Pool, source: Blocks) -> None:
        """Block ``source[i]`` -> ``rows[i]``, of ``row_bytes``: as it travels."""
        unpacked = rows.reshape(len(rows), 2 * self.target.num_layers, self.heads.num, -1)
        self._write(unpacked, np.arange(len(source), dtype=np.int32), source)

    def _write(self, there: Records, target: Blocks, source: Blocks) -> None:
        if self._convert is not None:
            self._convert(there, target, self._source, source)
        else:
            copy_blocks(there, target, self._source, source)


def unpack(rows: Pool, pool: Pool, shard: KVShard, heads: Heads, target: Blocks) -> None:
    """``rows[i]``, as a lane's blocks travel -> ``heads`` of block ``target[i]`` of ``pool``."""
    source = np.arange(len(rows), dtype=np.int32)
    if heads == heads_of(shard):
        copy_blocks(pool, target, rows, source)
    else:
        there = records(pool, shard, heads)
        copy_blocks(there, target, rows.reshape(len(rows), *there.shape[1:]), source)


def copy_blocks(into: NDArray[np.uint8], target: Blocks, out_of: NDArray[np.uint8], source: Blocks) -> None:
    """``into[target] = out_of[source]`` piece by piece, with no array in between; lets go of the GIL in each."""
    pieces = plan(source, target, max_blocks=len(source) or 1)
    for begin, to, count in zip(*(column.tolist() for column in pieces), strict=True):
        into[to : to + count] = out_of[begin : begin + count]


def _conversion(source: KVLayout, target: KVLayout) -> "_Cast | _Quantize":
    return _Quantize(source, target) if target.quantized else _Cast(source, target)


def _values(view: Records, layout: KVLayout) -> torch.Tensor:
    """``[block, layer and k|v, head, value]``."""
    return torch.from_numpy(view)[..., : layout.record_values * layout.item_bytes].view(_STORED[layout.dtype])


class _Cast:
    """One float dtype into another."""

    def __init__(self, source: KVLayout, target: KVLayout) -> None:
        self._source, self._target = source, target

    def __call__(self, there: Records, target: Blocks, here: Records, source: Blocks) -> None:
        into, out_of = _values(there, self._target), _values(here, self._source)
        step = max(1, SCRATCH_VALUES // (here.shape[2] * self._source.record_values))
        for to, begin in zip(target.tolist(), source.tolist(), strict=True):
            for part in _parts(here.shape[1], step):
                into[to, part].copy_(out_of[begin, part])


class _Quantize:
    """Floats into values of one byte with a scale a record, as the kernels that write KV do it.

    scale = largest magnitude / the dtype's largest number; stored = value / scale, to the nearest, ties to even. A
    record of zeros has scale 0.
    """

    def __init__(self, source: KVLayout, target: KVLayout) -> None:
        self._source, self._target = source, target
        self._max = QUANTIZED_MAX[target.dtype]
        size = max(SCRATCH_VALUES, target.record_values)
        self._floats, self._magnitudes = torch.empty(size), torch.empty(size)

    def __call__(self, there: Records, target: Blocks, here: Records, source: Blocks) -> None:
        into, out_of = _values(there, self._target), _values(here, self._source)
        values = self._target.record_values
        tails = torch.from_numpy(there)[..., values:].view(torch.float32)
        heads = here.shape[2]
        layers = max(1, SCRATCH_VALUES // (heads * values))
        at_once = max(1, SCRATCH_VALUES // (heads * values * here.shape[1]))
        for first in range(0, len(source), at_once):
            froms, tos = source[first : first + at_once].tolist(), target[first : first + at_once].tolist()
            for part in _parts(here.shape[1], layers):
                for head in _parts(heads, max(1, SCRATCH_VALUES // values)):
                    self._some(
                        [into[to, part, head] for to in tos],
                        [tails[to, part, head] for to in tos],
                        [out_of[begin, part, head] for begin in froms],
                    )

    def _some(self, into: list[torch.Tensor], tails: list[torch.Tensor], out_of: list[torch.Tensor]) -> None:
        """``[layer and k|v, head, value]`` each, of one shape, few enough for the scratch."""
        shape = (len(out_of), *out_of[0].shape)
        size = len(out_of) * out_of[0].numel()
        floats = self._floats[:size].view(shape)
        for place, each in enumerate(out_of):
            floats[place].copy_(each)
        scales = torch.abs(floats, out=self._magnitudes[:size].view(shape)).amax(-1, keepdim=True).div_(self._max)
        floats.div_(torch.where(scales > 0, scales, 1.0)).clamp_(-self._max, self._max)
        if self._target.dtype == "int8":
            floats.round_()
        for place, (to, tail) in enumerate(zip(into, tails, strict=True)):
            to.copy_(floats[place])
            tail[..., :1] = scales[place]
            tail[..., 1:] = 0


def _parts(size: int, step: int) -> list[slice]:
    return [slice(begin, min(begin + step, size)) for begin in range(0, size, step)]

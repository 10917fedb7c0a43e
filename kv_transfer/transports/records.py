"""A lane's copies: a range of heads out of one pool's blocks into another's, in the other's dtype.

Records of one dtype are copied by ``engine.cpu.pieces``. What has to be quantised passes through a scratch that stays
in the cache.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.core.kv_layout import QUANTIZED_MAX, KVLayout
from engine.cpu.pieces import copy_blocks
from kv_transfer.core.events import Blocks, Pool
from kv_transfer.core.lanes import CannotPair, Heads, Layers, check_pair, heads_of, layout_of
from messages.common import KVShard

Records = NDArray[np.uint8]
"""``[block, layer and k|v, head, record_bytes]``, a view of a pool."""

SCRATCH_VALUES = 128 << 10
"""Quantised at once: so few that they stay in the cache."""
UNSHARED_VALUES = 28 << 10
"""torch splits no work below 32 Ki values among threads, which it would take from the model."""
_STORED = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "int8": torch.int8, "fp8": torch.float8_e4m3fn,
}  # fmt: skip


def records(pool: Pool, shard: KVShard, heads: Heads) -> Records:
    """The records of ``heads`` in ``pool``, whose blocks are those of ``shard``; raises ``CannotPair``."""
    layout = layout_of(shard)
    if pool.shape[1] != layout.block_bytes:
        raise CannotPair(f"blocks of {pool.shape[1]} bytes are not those of {shard}")
    first, num = heads
    begin = first - shard.first_head
    if begin < 0 or num < 1 or begin + num > shard.num_heads:
        raise CannotPair(f"KV heads {first} to {first + num - 1} are not all in {shard}")
    whole = pool.reshape(len(pool), 2 * layout.num_layers, layout.num_kv_heads, layout.record_bytes)
    return whole[:, :, begin : begin + num]


def _of_layers(view: Records, layers: Layers | None) -> Records:
    return view if layers is None else view[:, 2 * layers.first : 2 * layers.end]


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
        self.num_layers = target.num_layers
        self.layers = Layers(0, target.num_layers)
        self.layer_bytes = layout_of(target, heads).layer_bytes
        self.row_bytes = self.num_layers * self.layer_bytes
        """Of a block of the lane, as it travels."""
        self._pool = pool
        self._source = records(pool, source, heads)
        self._convert = None if source.dtype == target.dtype else _conversion(layout_of(source), layout_of(target))

    def write(self, there: Pool, target: Blocks, source: Blocks, layers: Layers | None = None) -> None:
        """Block ``source[i]``, or some ``layers`` of it, -> block ``target[i]`` of a pool of ``target``'s shard."""
        if self.whole:
            part = slice(None) if layers is None else slice(*(self.layer_bytes * layer for layer in layers))
            copy_blocks(there[:, part], target, self._pool[:, part], source)
        else:
            self._write(_of_layers(records(there, self.target, self.heads), layers), target, source, layers)

    def pack(self, rows: Pool, source: Blocks, layers: Layers | None = None) -> None:
        """Block ``source[i]``, or some ``layers`` of it, -> ``rows[i]``, of ``row_bytes`` or as many times
        ``layer_bytes``: as it travels."""
        num = self.num_layers if layers is None else layers.end - layers.first
        unpacked = rows.reshape(len(rows), 2 * num, self.heads.num, -1)
        self._write(unpacked, np.arange(len(source), dtype=np.int32), source, layers)

    def _write(self, there: Records, target: Blocks, source: Blocks, layers: Layers | None) -> None:
        here = _of_layers(self._source, layers)
        if self._convert is not None:
            self._convert(there, target, here, source)
        else:
            copy_blocks(there, target, here, source)


def unpack(rows: Pool, pool: Pool, shard: KVShard, heads: Heads, layers: Layers, target: Blocks) -> None:
    """``rows[i]``, as a lane's blocks travel -> ``layers`` and ``heads`` of block ``target[i]`` of ``pool``."""
    there = _of_layers(records(pool, shard, heads), layers)
    copy_blocks(there, target, rows.reshape(len(rows), *there.shape[1:]), np.arange(len(rows), dtype=np.int32))


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
        step = max(1, UNSHARED_VALUES // (here.shape[2] * self._source.record_values))
        for to, begin in zip(target.tolist(), source.tolist(), strict=True):
            for part in _parts(here.shape[1], step):
                into[to, part].copy_(out_of[begin, part])


class _Quantize:
    """Floats into values of one byte with a scale a record, as ``engine.kernels.reference.quantize_blocks`` does it.

    scale = largest magnitude / the dtype's largest number; stored = value / scale, to the nearest, ties to even. A
    record of zeros has scale 0. In numpy, which never takes threads from the model.
    """

    def __init__(self, source: KVLayout, target: KVLayout) -> None:
        self._source, self._target = source, target
        self._max = np.float32(QUANTIZED_MAX[target.dtype])
        size = max(SCRATCH_VALUES, target.record_values)
        self._floats, self._magnitudes = np.empty(size, np.float32), np.empty(size, np.float32)

    def __call__(self, there: Records, target: Blocks, here: Records, source: Blocks) -> None:
        values, (layers, heads) = self._target.record_values, here.shape[1:3]
        out_of = here.view(_READ[self._source.dtype])
        into, tails = there[..., :values].view(np.int8), there[..., values:].view(np.float32)
        records = max(1, SCRATCH_VALUES // values)
        for begin in range(0, len(source), at_once := max(1, records // (layers * heads))):
            froms, tos = source[begin : begin + at_once].tolist(), target[begin : begin + at_once].tolist()
            for part in _parts(layers, max(1, records // heads)):
                for head in _parts(heads, records):
                    at = [(to, part, head) for to in tos]
                    self._some(
                        [into[to] for to in at], [tails[to] for to in at], [out_of[of, part, head] for of in froms]
                    )

    def _some(self, into: list[Any], tails: list[Any], out_of: list[Any]) -> None:
        """``[layer and k|v, head, value]`` each, of one shape, few enough for the scratch."""
        shape = (len(out_of), *out_of[0].shape)
        size = len(out_of) * out_of[0].size
        floats, magnitudes = self._floats[:size].reshape(shape), self._magnitudes[:size].reshape(shape)
        for place, each in enumerate(out_of):
            _widen(each, floats[place])
        with np.errstate(invalid="ignore", over="ignore"):  # what is no number is the engine's to complain of
            scales = np.abs(floats, out=magnitudes).max(-1, keepdims=True) / self._max
            np.divide(floats, np.where(scales > 0, scales, np.float32(1)), out=floats)
            if (scales < np.finfo(np.float32).tiny).any():  # of few bits, so that a quotient can be too large
                np.clip(floats, -self._max, self._max, out=floats)
            stored = _to_fp8(floats) if self._target.dtype == "fp8" else np.rint(floats, out=floats)
            for place, (to, tail) in enumerate(zip(into, tails, strict=True)):
                np.copyto(to, stored[place], casting="unsafe")
                tail[..., :1] = scales[place]
                tail[..., 1:] = 0


_READ = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
"""What numpy reads float records as; it has no bfloat16."""


def _widen(values: NDArray[Any], into: NDArray[np.float32]) -> None:
    """Float records, as ``_READ`` says, into fp32."""
    if values.dtype == np.uint16:  # bfloat16 is the upper half of a float
        bits = into.view(np.uint32)
        np.copyto(bits, values)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(into, values)


def _to_fp8(floats: NDArray[np.float32]) -> NDArray[np.int8]:
    """The bytes of ``floats`` as e4m3."""
    stored = torch.empty(floats.shape, dtype=torch.float8_e4m3fn)
    flat, out = torch.from_numpy(floats).view(-1), stored.view(-1)
    for part in _parts(len(flat), UNSHARED_VALUES):
        out[part].copy_(flat[part])
    return stored.view(torch.int8).numpy()


def _parts(size: int, step: int) -> list[slice]:
    return [slice(begin, min(begin + step, size)) for begin in range(0, size, step)]

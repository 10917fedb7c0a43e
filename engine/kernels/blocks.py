"""Chosen KV blocks into a contiguous buffer and back, for transfers; and the same with quantisation on the way.

Records are ``[block, layer, k|v, kv_head, record]`` views (``engine.core.kv_layout``): a slice of layers or of heads is
a view too, and what one of them holds of a block is copied in pieces as large as they come.
"""

import torch
import triton
import triton.language as tl

from engine.kernels.common import divide, to_stored
from engine.kernels.reference import QUANTIZED_MAX
from engine.kv_cache import KVCache

WORDS = 2048
"""32-bit words that a program copies at a time."""
CHUNK = 8
"""Times that it does so."""


@triton.jit
def copy_kernel(
    source, source_blocks, target, target_blocks, words, sides,
    stride_source_block, stride_source_layer, stride_source_side,
    stride_target_block, stride_target_layer, stride_target_side,
    FROM_TABLE: tl.constexpr, TO_TABLE: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    piece, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place, side = piece // sides, piece % sides
    layer, side = side // 2, side % 2
    source_block = place
    if FROM_TABLE:
        source_block = tl.load(source_blocks + place).to(tl.int64)
    target_block = place
    if TO_TABLE:
        target_block = tl.load(target_blocks + place).to(tl.int64)
    source += source_block * stride_source_block + layer * stride_source_layer + side * stride_source_side
    target += target_block * stride_target_block + layer * stride_target_layer + side * stride_target_side
    first = part * WORDS * CHUNK
    for at in range(first, tl.minimum(first + WORDS * CHUNK, words), WORDS):
        index = at + tl.arange(0, WORDS)
        tl.store(target + index, tl.load(source + index, mask=index < words), mask=index < words)


@triton.jit
def quantize_kernel(
    source, blocks, counts, data, scales,
    stride_source_block, stride_source_layer, stride_source_side, stride_source_head,
    stride_data_block, stride_data_layer, stride_data_side, stride_data_head,
    stride_scale_block, stride_scale_layer, stride_scale_side, stride_scale_head,
    heads, sides,
    DIM: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One program a record: its largest magnitude, then its values divided by what that makes the scale."""
    record = tl.program_id(0).to(tl.int64)
    head, rest = record % heads, record // heads
    place, side = rest // sides, rest % sides
    layer, side = side // 2, side % 2
    block = tl.load(blocks + place).to(tl.int64)
    held = tl.load(counts + place) * DIM
    source += block * stride_source_block + layer * stride_source_layer + side * stride_source_side
    source += head * stride_source_head
    data += place * stride_data_block + layer * stride_data_layer + side * stride_data_side + head * stride_data_head
    largest = tl.zeros((TILE,), tl.float32)
    for at in range(0, SIZE, TILE):
        index = at + tl.arange(0, TILE)
        values = tl.load(source + index, mask=index < held, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
    scale = tl.div_rn(tl.max(largest, 0), LARGEST)
    for at in range(0, SIZE, TILE):
        index = at + tl.arange(0, TILE)
        values = tl.load(source + index, mask=index < held, other=0.0).to(tl.float32)
        tl.store(data + index, to_stored(divide(values, scale), data.dtype.element_ty, LARGEST), mask=index < SIZE)
    scales += place * stride_scale_block + layer * stride_scale_layer + side * stride_scale_side
    tl.store(scales + head * stride_scale_head, scale)


def records_of(cache: KVCache) -> torch.Tensor:
    """A cache's bytes as ``[block, layer, k|v, kv_head, record]``."""
    layout = cache.layout
    return cache.bytes.view(cache.num_blocks, layout.num_layers, 2, layout.num_kv_heads, layout.record_bytes)


def gather_blocks(records: torch.Tensor, blocks: torch.Tensor, staging: torch.Tensor) -> None:
    """``staging[i] = records[blocks[i]]``: ``records`` any layers and heads of ``records_of``; ``blocks`` int64;
    ``staging [blocks, layers, 2, heads, record]`` of bytes, contiguous."""
    _copy(records, blocks, staging, None)


def scatter_blocks(staging: torch.Tensor, records: torch.Tensor, blocks: torch.Tensor) -> None:
    """``records[blocks[i]] = staging[i]``, of the same shapes as in ``gather_blocks``; no block is named twice."""
    _copy(staging, None, records, blocks)


def copy_blocks(records: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """``records[target[i]] = records[source[i]]``, int64; no block is both, and none is written twice."""
    _copy(records, source, records, target)


def copy_across(
    source: torch.Tensor, source_blocks: torch.Tensor, target: torch.Tensor, target_blocks: torch.Tensor
) -> None:
    """``target[target_blocks[i]] = source[source_blocks[i]]``, of another cache; int64, none written twice."""
    _copy(source, source_blocks, target, target_blocks)


def _copy(
    source: torch.Tensor, source_blocks: torch.Tensor | None, target: torch.Tensor, target_blocks: torch.Tensor | None
) -> None:
    table = source_blocks if source_blocks is not None else target_blocks
    assert table is not None
    count, layers, sides, heads, record = (len(table), *source.shape[1:])
    if target.shape[1:] != source.shape[1:]:
        raise ValueError(f"records of shapes {tuple(source.shape[1:])} and {tuple(target.shape[1:])} do not match")
    if not count:
        return
    # Heads lie behind each other, so those of a piece are one run of words.
    if record % 4 == 0:
        source, target = source.view(torch.int32), target.view(torch.int32)
    words = heads * source.shape[4]
    copy_kernel[(count * layers * sides, triton.cdiv(words, WORDS * CHUNK))](
        source, source_blocks if source_blocks is not None else table,
        target, target_blocks if target_blocks is not None else table, words, layers * sides,
        source.stride(0), source.stride(1), source.stride(2), target.stride(0), target.stride(1), target.stride(2),
        FROM_TABLE=source_blocks is not None, TO_TABLE=target_blocks is not None, WORDS=WORDS, CHUNK=CHUNK, num_warps=8,
    )  # fmt: skip


def quantize_blocks(
    source: torch.Tensor, blocks: torch.Tensor, counts: torch.Tensor, data: torch.Tensor, scales: torch.Tensor
) -> None:
    """See ``reference``. ``source`` and ``data`` are ``KVCache.data``, ``scales`` ``KVCache.scales``, or
    the same layers and heads of them; ``blocks`` int64; ``counts`` int32, tokens held by each block."""
    count, layers, sides, heads, size, dim = data.shape
    quantize_kernel[(count * layers * sides * heads,)](
        source, blocks, counts, data, scales, *source.stride()[:4], *data.stride()[:4], *scales.stride(),
        heads, layers * sides, DIM=dim, SIZE=size * dim, TILE=min(2048, triton.next_power_of_2(size * dim)),
        LARGEST=QUANTIZED_MAX[data.dtype], num_warps=4,
    )  # fmt: skip

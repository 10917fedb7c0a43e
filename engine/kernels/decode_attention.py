"""Attention of rows with one query token over the paged cache: flash decoding (Dao, Haziza, Massa, Sizov 2023).

1. A program takes one row, one KV head and one split of the row's keys; all query heads of the KV head share what it
   loads.
2. With more than one split, a second kernel weighs the splits' results against each other.

How many splits a row uses depends on its own length and on the most that the launch allows; splits beyond do nothing.
So a launch fits any lengths, as a captured CUDA graph must.
"""

import torch
import triton
import triton.language as tl

from engine.kernels.attention_tile import LOG2_E, attend_tile
from engine.kernels.common import is_quantized, scale_arguments

MIN_SPLIT = 128
"""Keys below which a row is not split further: a program's start costs as much."""


@triton.jit
def _split_of(length, split, window, WINDOWED: tl.constexpr, SPLITS: tl.constexpr, SHORTEST: tl.constexpr):
    """The keys ``first <= j < last`` of one split; none where ``first >= last``."""
    begin = 0
    if WINDOWED:
        begin = tl.maximum(length - window, 0)
    size = tl.maximum(tl.cdiv(tl.cdiv(length - begin, SPLITS), 16) * 16, SHORTEST)
    first = begin + split * size
    return first, tl.minimum(first + size, length)


@triton.jit(do_not_specialize=["stride_table"])  # which changes from step to step
def decode_kernel(
    query, data, scales, tables, query_rows, lengths, out, partial, peaks,
    factor, softcap, window,
    stride_query_token, stride_query_head, stride_block, stride_kv, stride_head,
    stride_scale_block, stride_scale_kv, stride_scale_head, stride_table, stride_out_token,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, SHORTEST: tl.constexpr,
    QUANTIZED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    first, last = _split_of(length, split, window, WINDOWED, SPLITS, SHORTEST)
    if SPLITS > 1 and first >= last:
        return
    token = tl.load(query_rows + row).to(tl.int64)
    heads = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, DIM_PAD)
    held = (heads[:, None] < GROUP) & (dims[None, :] < DIM)
    head = kv_head * GROUP + heads
    at = token * stride_query_token + head[:, None] * stride_query_head + dims[None, :]
    q = tl.load(query + at, mask=held, other=0.0)
    acc = tl.zeros((GROUP_PAD, DIM_PAD), tl.float32)
    peak = tl.full((GROUP_PAD,), -float("inf"), tl.float32)
    mass = tl.zeros((GROUP_PAD,), tl.float32)
    positions = tl.zeros((GROUP_PAD,), tl.int32) + (length - 1)
    for start in range(first, last, TILE):
        acc, peak, mass = attend_tile(
            q, positions, start + tl.arange(0, TILE), last, acc, peak, mass,
            data + kv_head * stride_head, scales + kv_head * stride_scale_head, tables + row * stride_table,
            factor, window, softcap, stride_block, stride_kv, stride_scale_block, stride_scale_kv,
            DIM, DIM_PAD, BLOCK_SIZE, QUANTIZED, CAPPED, False, True,
        )  # fmt: skip
    result = acc / tl.where(mass > 0, mass, 1.0)[:, None]
    if SPLITS == 1:
        at = token * stride_out_token + head[:, None] * DIM + dims[None, :]
        tl.store(out + at, result.to(out.dtype.element_ty), mask=held)
    else:
        place = ((row * SPLITS + split) * KV_HEADS * GROUP).to(tl.int64) + head
        tl.store(partial + place[:, None] * DIM + dims[None, :], result, mask=held)
        tl.store(peaks + place, peak + tl.log2(mass), mask=heads < GROUP)


@triton.jit
def combine_kernel(
    partial, peaks, query_rows, lengths, out, window, stride_out_token,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, SPLITS: tl.constexpr, SHORTEST: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """One program a row and a head: its splits' results, each weighed by its share of the softmax's sum."""
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row)
    dims = tl.arange(0, DIM_PAD)
    splits = tl.arange(0, SPLITS)
    first, last = _split_of(length, splits, window, WINDOWED, SPLITS, SHORTEST)
    used = first < last
    place = (row * SPLITS + splits).to(tl.int64) * HEADS + head
    logs = tl.load(peaks + place, mask=used, other=-float("inf"))
    highest = tl.max(logs, 0)
    weights = tl.exp2(logs - tl.where(highest == -float("inf"), 0.0, highest))
    parts = tl.load(
        partial + place[:, None] * DIM + dims[None, :], mask=used[:, None] & (dims[None, :] < DIM), other=0.0
    )
    mass = tl.sum(weights, 0)
    result = tl.sum(parts * weights[:, None], 0) / tl.where(mass > 0, mass, 1.0)
    token = tl.load(query_rows + row).to(tl.int64)
    at = out + token * stride_out_token + head * DIM + dims
    tl.store(at, result.to(out.dtype.element_ty), mask=dims < DIM)


def num_splits(rows: int, kv_heads: int, longest: int, processors: int = 132) -> int:
    """Splits that let about four programs run on each of the card's ``processors``; a power of two."""
    wanted = min(4 * processors // max(rows * kv_heads, 1), -(-longest // MIN_SPLIT), 64)
    return 1 << max(wanted, 1).bit_length() - 1


def decode_attention(
    query: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    block_tables: torch.Tensor,
    query_rows: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    splits: int = 1,
) -> None:
    """Row ``i``'s query is ``query[query_rows[i]]``, at position ``lengths[i] - 1``; it sees that key and all before.

    ``query [tokens, heads, head_dim]``, ``data``, ``scales`` one layer of the cache (see ``reference``),
    ``block_tables [rows, width]``, ``query_rows``, ``lengths [rows]`` int32. Of ``out [tokens, heads * head_dim]`` only
    the rows' own tokens are written; zeros for a row of length 0. ``splits``: a power of two (``num_splits``).
    """
    rows, heads, dim = len(lengths), query.shape[1], query.shape[2]
    kv_heads, block_size = data.shape[2], data.shape[3]
    group = heads // kv_heads
    dim_pad = triton.next_power_of_2(dim)
    if splits > 1:
        partial = torch.empty((rows, splits, heads, dim), dtype=torch.float32, device=query.device)
        peaks = torch.empty((rows, splits, heads), dtype=torch.float32, device=query.device)
    else:
        partial = peaks = out
    pointer, *scale_strides = scale_arguments(scales)
    options = dict(SPLITS=splits, SHORTEST=MIN_SPLIT, WINDOWED=window is not None)
    decode_kernel[(rows, kv_heads, splits)](
        query, data, data if pointer is None else pointer, block_tables, query_rows, lengths, out, partial, peaks,
        scale if softcap is not None else scale * LOG2_E.value, softcap or 0.0, window or 0,
        query.stride(0), query.stride(1), data.stride(0), data.stride(1), data.stride(2),
        *scale_strides, block_tables.stride(0), out.stride(0),
        KV_HEADS=kv_heads, GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)), DIM=dim, DIM_PAD=dim_pad,
        BLOCK_SIZE=block_size, TILE=tile_of(query.dtype, dim_pad), QUANTIZED=is_quantized(data.dtype),
        CAPPED=softcap is not None, num_warps=4, num_stages=3, **options,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(rows, heads)](
            partial, peaks, query_rows, lengths, out, window or 0, out.stride(0),
            HEADS=heads, DIM=dim, DIM_PAD=dim_pad, num_warps=4, **options,
        )  # fmt: skip


def tile_of(dtype: torch.dtype, dim_pad: int) -> int:
    """Keys of a tile: what its K and V take of shared memory stays the same, whatever the head's size."""
    return max(16, min(64, 64 * 128 * 2 // (dim_pad * dtype.itemsize)))

"""Attention of prompt chunks over themselves and the cached tokens before them, for rows of any lengths at once.

A program takes a tile of one row's query tokens and one KV head; a tile's rows are (token, query head of that KV head),
so that what is loaded serves the whole group. The tiles of a step are listed by ``query_tiles``.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from engine.kernels.attention_tile import LOG2_E, attend_tile
from engine.kernels.common import is_quantized, scale_arguments
from engine.kernels.decode_attention import tile_of


@triton.jit(do_not_specialize=["stride_table"])  # which changes from step to step
def prefill_kernel(
    query, data, scales, tables, tiles, starts, computed, out,
    factor, softcap, window,
    stride_query_token, stride_query_head, stride_block, stride_kv, stride_head,
    stride_scale_block, stride_scale_kv, stride_scale_head, stride_table, stride_out_token,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr,
    QUANTIZED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    row = tl.load(tiles + 2 * tile)
    first_token = tl.load(tiles + 2 * tile + 1)
    start = tl.load(starts + row)
    count = tl.load(starts + row + 1) - start
    before = tl.load(computed + row)
    rows = tl.arange(0, TOKENS * GROUP_PAD)
    token = first_token + rows // GROUP_PAD
    head = rows % GROUP_PAD
    dims = tl.arange(0, DIM_PAD)
    held = ((token < count) & (head < GROUP))[:, None] & (dims[None, :] < DIM)
    flat = (start + token).to(tl.int64)
    head = kv_head * GROUP + head
    q = tl.load(
        query + flat[:, None] * stride_query_token + head[:, None] * stride_query_head + dims[None, :],
        mask=held, other=0.0,
    )  # fmt: skip
    acc = tl.zeros((TOKENS * GROUP_PAD, DIM_PAD), tl.float32)
    peak = tl.full((TOKENS * GROUP_PAD,), -float("inf"), tl.float32)
    mass = tl.zeros((TOKENS * GROUP_PAD,), tl.float32)
    positions = before + token
    last = before + tl.minimum(first_token + TOKENS, count)
    data += kv_head * stride_head
    scales += kv_head * stride_scale_head
    tables += row * stride_table
    # Up to here every query sees every key, and nothing need be masked.
    edge = (before + first_token + 1) // TILE * TILE
    begin = 0
    if WINDOWED:
        begin = tl.maximum(before + first_token - window + 1, 0) // TILE * TILE
        edge = begin
    for at in range(begin, edge, TILE):
        acc, peak, mass = attend_tile(
            q, positions, at + tl.arange(0, TILE), last, acc, peak, mass, data, scales, tables, factor, window, softcap,
            stride_block, stride_kv, stride_scale_block, stride_scale_kv,
            DIM, DIM_PAD, BLOCK_SIZE, QUANTIZED, CAPPED, WINDOWED, False,
        )  # fmt: skip
    for at in range(edge, last, TILE):
        acc, peak, mass = attend_tile(
            q, positions, at + tl.arange(0, TILE), last, acc, peak, mass, data, scales, tables, factor, window, softcap,
            stride_block, stride_kv, stride_scale_block, stride_scale_kv,
            DIM, DIM_PAD, BLOCK_SIZE, QUANTIZED, CAPPED, WINDOWED, True,
        )  # fmt: skip
    result = acc / tl.where(mass > 0, mass, 1.0)[:, None]
    to = out + flat[:, None] * stride_out_token + head[:, None] * DIM + dims[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=held)


def tokens_of_tile(group: int, dtype: torch.dtype, dim: int) -> int:
    """Query tokens of a tile, so that its rows fill the tensor cores, and its sums the registers, but not more."""
    rows = 32 if dtype.itemsize == 4 else 128 if dim <= 128 else 64
    return max(1, rows // triton.next_power_of_2(group))


def query_tiles(num_tokens: NDArray[np.int32], rows: NDArray[np.int64], tokens: int) -> NDArray[np.int32]:
    """``[tiles, 2]``: (row, its first query token) of each tile of the given ``rows``; the longest tiles first."""
    counts = -(-num_tokens[rows].astype(np.int64) // tokens)
    ends = np.cumsum(counts)
    place = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    # A row's last tiles see the most keys: begun first, they do not run alone at the end.
    tiles = np.stack([np.repeat(rows, counts), place * tokens], axis=1)
    return np.ascontiguousarray(tiles[np.argsort(-place, kind="stable")].astype(np.int32))


def prefill_attention(
    query: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    block_tables: torch.Tensor,
    tiles: torch.Tensor,
    starts: torch.Tensor,
    num_computed: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """``reference.paged_attention`` of the rows that ``tiles`` (``query_tiles`` with ``tokens_of_tile``) name.

    ``query [tokens, heads, head_dim]``, ``data``, ``scales`` one layer of the cache, ``block_tables [rows, width]``,
    ``tiles [tiles, 2]``, ``starts [rows + 1]``, ``num_computed [rows]`` int32; ``out [tokens, heads * head_dim]``, of
    which only the named rows' tokens are written.
    """
    heads, dim = query.shape[1], query.shape[2]
    kv_heads, block_size = data.shape[2], data.shape[3]
    group, dim_pad = heads // kv_heads, triton.next_power_of_2(dim)
    group_pad = triton.next_power_of_2(group)
    tokens = tokens_of_tile(group, query.dtype, dim)
    pointer, *scale_strides = scale_arguments(scales)
    prefill_kernel[(len(tiles), kv_heads)](
        query, data, data if pointer is None else pointer, block_tables, tiles, starts, num_computed, out,
        scale if softcap is not None else scale * LOG2_E.value, softcap or 0.0, window or 0,
        query.stride(0), query.stride(1), data.stride(0), data.stride(1), data.stride(2),
        *scale_strides, block_tables.stride(0), out.stride(0),
        GROUP=group, GROUP_PAD=group_pad, DIM=dim, DIM_PAD=dim_pad, BLOCK_SIZE=block_size,
        TOKENS=tokens, TILE=tile_of(query.dtype, dim_pad), QUANTIZED=is_quantized(data.dtype),
        CAPPED=softcap is not None, WINDOWED=window is not None,
        num_warps=4 if query.dtype.itemsize == 2 and dim > 128 else 8, num_stages=2,
    )  # fmt: skip

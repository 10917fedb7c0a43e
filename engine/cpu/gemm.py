"""Products with a weight in bf16: ``y = x @ weight.T``, for one row as for many.

The weight is packed once, as ``[panel, pair of k, 64 columns, 2]``: a panel is 64 of its rows, and a word of 32 bits
holds two neighbours of k, as the processors' bf16 products take them (oneDNN packs in the same order). Up to 6 rows of
x meet a panel in registers; one row of x reads the weights at the memory's rate.

Sums are in fp32, in the order of k, whatever the number of rows or threads: a row's result depends on nothing else.
"""

import numpy as np
import torch
from numba import njit

from engine.cpu import jit, simd
from engine.cpu.jit import kernel, thread, threads
from engine.cpu.simd import (
    LANES,
    add_bf16,
    f32_at,
    from_bf16,
    panel_product,
    scratch,
    silu_mul_bf16,
    store_bf16,
    to_bf16,
    u16_at,
)

PANEL = 64
STORE, ADD, SILU_MUL = 0, 1, 2
"""What becomes of a product: stored; added to what is there; or, of a weight ``[gate | up]``, ``silu(gate) * up``."""

_ROW_BLOCK = 48
"""Rows that a thread takes a panel through before the next thread may: many enough that the panel comes from L2."""
_FEW = 2 * _ROW_BLOCK

_product = panel_product((1, 2, 3, 4, 5, 6), (2, 4))
_tile = scratch(2 * 6 * PANEL * 4)


@njit(fastmath={"contract"})
def _finish(mode, sums, gates, bias, out, column, width):
    """One row of a tile: ``width`` columns from ``column`` on; whole vectors with ``SILU_MUL``."""
    made = f32_at(sums)
    if bias != 0:
        added = f32_at(bias + 4 * column)
        for i in range(width):
            made[i] += added[i]
    place = out + 2 * column
    vectors = width // LANES
    if mode == SILU_MUL:
        silu_mul_bf16(gates, sums, vectors, place)
    elif mode == ADD:
        add_bf16(sums, vectors, place)
    else:
        store_bf16(sums, vectors, place)
    to = u16_at(place)
    for i in range(vectors * LANES, width):
        if mode == ADD:
            made[i] += from_bf16(to[i])
        to[i] = to_bf16(made[i])


@njit(fastmath={"contract"})
def _rows_by_columns(first, last, wide, column, a):
    """Rows ``first`` to ``last`` by 64 or 32 columns from ``column`` on."""
    x, x_stride, w, pairs, columns = a[0], a[1], a[3], a[4], a[5]
    out, out_stride, bias, mode = a[6], a[7], a[8], a[9]
    sums = _tile()
    gates = sums + 6 * PANEL * 4
    width = min(64 if wide else 32, columns - column)
    place = (column // PANEL) * pairs * 256 + (column % PANEL) * 4
    row = first
    while row < last:
        rows = min(6, last - row)
        source = x + row * x_stride
        shape = 8 * rows + (4 if wide else 2)
        # The gates' panel comes first, where there is one.
        for part in range(2 if mode == SILU_MUL else 1):
            to = gates if mode == SILU_MUL and part == 0 else sums
            _product(shape, source, x_stride, w + place + part * columns * pairs * 4, 256, pairs, to, 256, 0)
        if mode == SILU_MUL and bias != 0:
            added = f32_at(bias + 4 * column)
            for r in range(rows):
                gate = f32_at(gates + r * 256)
                for i in range(width):
                    gate[i] += added[i]
        behind = bias + 4 * columns if bias != 0 and mode == SILU_MUL else bias
        for r in range(rows):
            _finish(mode, sums + r * 256, gates + r * 256, behind, out + (row + r) * out_stride, column, width)
        row += rows


@kernel(10)
def _linear(a):
    """x, x_stride, rows, w, pairs, columns (of out), out, out_stride, bias (fp32, or 0), mode; strides in bytes."""
    rows, columns = a[2], a[5]
    me, all_ = np.int64(thread()), np.int64(threads())
    if rows <= _FEW:
        halves = (columns + 31) // 32
        half, end = halves * me // all_, halves * (me + 1) // all_
        while half < end:
            wide = half % 2 == 0 and half + 2 <= end
            _rows_by_columns(0, rows, wide, half * 32, a)
            half += 2 if wide else 1
    elif rows >= _ROW_BLOCK * all_:
        # A thread's rows stay in its cache, from the norm before to the product after.
        tiles = (rows + 5) // 6
        begin, end = tiles * me // all_ * 6, min(rows, tiles * (me + 1) // all_ * 6)
        for panel in range((columns + PANEL - 1) // PANEL):
            for first in range(begin, end, _ROW_BLOCK):
                _rows_by_columns(first, min(end, first + _ROW_BLOCK), True, panel * PANEL, a)
    else:
        blocks = (rows + _ROW_BLOCK - 1) // _ROW_BLOCK
        items = (columns + PANEL - 1) // PANEL * blocks
        for item in range(items * me // all_, items * (me + 1) // all_):
            first = item % blocks * _ROW_BLOCK
            _rows_by_columns(first, min(rows, first + _ROW_BLOCK), True, item // blocks * PANEL, a)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether these kernels multiply with it here: bf16, in one piece of whole pairs."""
    return (
        jit.available
        and simd.HAS_BF16_DOT
        and weight.device.type == "cpu"
        and weight.dtype is torch.bfloat16
        and weight.shape[1] % 2 == 0
    )


def compile_kernels() -> None:
    """While a model is loaded: its first step would take seconds, and its worker be taken for lost."""
    _linear()


def pack(weight: torch.Tensor) -> torch.Tensor:
    """``[out, in]`` -> ``[panels, in / 2, 64, 2]``, what is behind the last row 0."""
    columns, depth = weight.shape
    panels = -(-columns // PANEL)
    packed = weight.new_zeros(panels, depth // 2, PANEL, 2)
    whole = columns // PANEL
    packed[:whole] = weight[: whole * PANEL].view(whole, PANEL, depth // 2, 2).transpose(1, 2)
    if whole < panels:
        packed[whole, :, : columns - whole * PANEL] = weight[whole * PANEL :].view(-1, depth // 2, 2).transpose(0, 1)
    return packed


def rows(packed: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``places [n]`` int64 of a packed weight's rows -> those rows as they were, ``[n, in]``."""
    words = packed.view(torch.int32)[..., 0]
    return words[places // PANEL, :, places % PANEL].contiguous().view(packed.dtype)


def linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, mode: int = STORE
) -> None:
    """``x [tokens, in]`` and the packed weight into ``out [tokens, columns]``; rows may be apart, ``bias`` is fp32.

    With ``SILU_MUL`` the weight has ``2 * columns`` rows, gate before up, ``columns`` being a multiple of 64.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    _linear()(
        x.data_ptr(), 2 * x.stride(0), x.shape[0], packed.data_ptr(), packed.shape[1], out.shape[1], out.data_ptr(),
        2 * out.stride(0), 0 if bias is None else bias.data_ptr(), mode,
    )  # fmt: skip

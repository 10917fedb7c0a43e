"""What lies between a model's products, each in one pass: norms and rotary positions. ``engine.ops`` is the contract.

Computed in fp32 whatever the dtype, and rounded once.
"""

import ctypes

import numpy as np
import torch
from numba import njit

from engine.cpu import jit
from engine.cpu.jit import kernel, thread, threads
from engine.cpu.kv import BF16, F32, KINDS, narrow, widen
from engine.cpu.simd import LANES, as_float, f32_at, i64_at, scale_bf16, scratch, vector_sum, widen_bf16

MAX_WIDTH = 32768
"""Widest row of a norm."""
WORTH_SHARING = 1 << 15
"""Fewer values than this are done before another thread has begun."""
MAX_DIM = 512
"""Widest head."""
_DTYPES = {torch.float32: KINDS["float32"], torch.bfloat16: KINDS["bfloat16"], torch.float16: KINDS["float16"]}

_row_room = scratch(MAX_WIDTH * 4)
_head_room = scratch(2 * MAX_DIM * 4)
_square_room = scratch(64)


@njit(fastmath={"contract"})
def _normalize(row, width, weight, eps):
    """``width`` fp32, in place; the squares are summed in 16 lanes."""
    x, w = f32_at(row), f32_at(weight)
    room = _square_room()
    lanes = f32_at(room)
    for lane in range(16):
        lanes[lane] = np.float32(0.0)
    for first in range(0, width - width % 16, 16):
        for lane in range(16):
            lanes[lane] += x[first + lane] * x[first + lane]
    for i in range(width - width % 16, width):
        lanes[0] += x[i] * x[i]
    factor = np.float32(1.0) / np.sqrt(vector_sum(room, 1) / np.float32(width) + eps)
    for i in range(width):
        x[i] = x[i] * factor * w[i]


@kernel(9)
def _rms_norm(a):
    """x, x_stride, rows, width, weight (fp32), eps (bits), out, out_stride, kind; strides in bytes."""
    x, x_stride, rows, width, weight, out, out_stride, kind = a[0], a[1], a[2], a[3], a[4], a[6], a[7], a[8]
    eps = as_float(np.uint32(a[5]))
    me, all_ = np.int64(thread()), np.int64(threads())
    room = _row_room()
    for row in range(rows * me // all_, rows * (me + 1) // all_):
        if kind == BF16 and width % LANES == 0:
            squares = widen_bf16(x + row * x_stride, width // LANES, room)
            factor = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
            scale_bf16(room, width // LANES, factor, weight, out + row * out_stride)
            continue
        widen(kind, x + row * x_stride, width, np.float32(1.0), room)
        _normalize(room, width, weight, eps)
        narrow(kind, room, width, out + row * out_stride)


@kernel(13)
def _rotate(a):
    """qkv, token stride (bytes), tokens, query heads, KV heads, dim, positions (int64), cos, sin (signed), norm of
    queries and of keys (fp32, or 0), eps (bits), kind."""
    base, stride, tokens, heads, kv_heads, dim = a[0], a[1], a[2], a[3], a[4], a[5]
    positions, cosines, sines, kind = i64_at(a[6]), a[7], a[8], a[12]
    eps = as_float(np.uint32(a[11]))
    size = np.int64(4 if kind == F32 else 2)
    me, all_ = np.int64(thread()), np.int64(threads())
    table, room = _row_room(), _head_room()
    cos, sin, x, y = f32_at(table), f32_at(table + dim * 4), f32_at(room), f32_at(room + dim * 4)
    half = dim // 2
    each = heads + kv_heads
    held = np.int64(-1)
    for item in range(tokens * each * me // all_, tokens * each * (me + 1) // all_):
        token, head = item // each, item % each
        if token != held:
            widen(kind, cosines + positions[token] * dim * size, dim, np.float32(1.0), table)
            widen(kind, sines + positions[token] * dim * size, dim, np.float32(1.0), table + dim * 4)
            held = token
        place = base + token * stride + head * dim * size
        widen(kind, place, dim, np.float32(1.0), room)
        norm = a[9] if head < heads else a[10]
        if norm != 0:
            _normalize(room, dim, norm, eps)
        for i in range(half):
            y[i] = x[i] * cos[i] + x[half + i] * sin[i]
        for i in range(half, dim):
            y[i] = x[i] * cos[i] + x[i - half] * sin[i]
        narrow(kind, room + dim * 4, dim, place)


def fits(x: torch.Tensor, width: int = MAX_WIDTH) -> bool:
    """Whether these kernels can take a tensor's last dimension here."""
    return (
        jit.available and x.device.type == "cpu" and x.dtype in _DTYPES and x.shape[-1] <= width and x.stride(-1) == 1
    )


def compile_kernels() -> None:
    """While a model is loaded: see ``engine.cpu.gemm``."""
    _rms_norm()
    _rotate()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x [tokens, width]``, ``weight [width]`` fp32."""
    out = torch.empty(x.shape, dtype=x.dtype)
    size = x.element_size()
    _rms_norm()(
        x.data_ptr(), x.stride(0) * size, x.shape[0], x.shape[1], weight.data_ptr(), bits(eps), out.data_ptr(),
        x.shape[1] * size, _DTYPES[x.dtype], alone=x.numel() < WORTH_SHARING,
    )  # fmt: skip
    return out


def rotate_(
    qkv: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None, eps: float,
) -> None:  # fmt: skip
    """In place: ``qkv [tokens, heads + 2 * kv_heads, dim]``, of whose tokens only may be apart; ``positions`` int64;
    ``cos``, ``sin [positions, dim]`` of its dtype, the sine of the first half negated."""
    query_norm, key_norm = (0, 0) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
    _rotate()(
        qkv.data_ptr(), qkv.stride(0) * qkv.element_size(), qkv.shape[0], heads, kv_heads, qkv.shape[2],
        positions.data_ptr(), cos.data_ptr(), sin.data_ptr(), query_norm, key_norm, bits(eps), _DTYPES[qkv.dtype],
        alone=qkv.numel() < WORTH_SHARING,
    )  # fmt: skip


def bits(number: float) -> int:
    """Of its fp32."""
    return ctypes.c_uint32.from_buffer(ctypes.c_float(number)).value

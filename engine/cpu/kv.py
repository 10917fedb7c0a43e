"""Values of a paged KV cache, as kernels read and write them: where a token's record lies, and what is stored there.

``engine.core.kv_layout`` fixes the layout, ``engine.kernels.reference.write_kv`` what is stored.
"""

import numpy as np
from numba import njit

from engine.cpu.simd import (
    as_bits,
    as_float,
    f32_at,
    from_bf16,
    from_half,
    to_bf16,
    to_half,
    u8_at,
    u16_at,
)

KINDS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "fp8": 4}
"""Dtypes by number."""
F32, BF16, F16, INT8, FP8 = KINDS.values()
_SHIFT = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, ties to even


@njit(fastmath={"contract"})
def rounded(x):
    return (x + _SHIFT) - _SHIFT


@njit(fastmath={"contract"})
def from_fp8(byte):
    """e4m3 without infinities: its bits are those of a float whose exponent is biased by 120 less."""
    bits = np.uint32(byte)
    magnitude = as_float((bits & np.uint32(0x7F)) << np.uint32(20)) * np.float32(2.0**120)
    return as_float(as_bits(magnitude) | ((bits & np.uint32(0x80)) << np.uint32(24)))


@njit(fastmath={"contract"})
def to_fp8(x):
    """Of a number within +-448, to nearest even; NaN stays NaN."""
    bits = as_bits(x)
    sign = (bits >> np.uint32(24)) & np.uint32(0x80)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    normal = (
        (magnitude + np.uint32(0x7FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
    ) - np.uint32(960)
    small = as_bits(as_float(magnitude) * np.float32(512.0) + _SHIFT) & np.uint32(0xF)
    code = small if magnitude < np.uint32(0x3C800000) else normal  # 2^-6, the smallest normal number
    code = np.uint32(0x7F) if magnitude > np.uint32(0x7F800000) else code
    return np.uint8(sign | code)


@njit(fastmath={"contract"})
def widen(kind, source, count, scale, out):
    """``count`` stored values -> fp32."""
    to = f32_at(out)
    if kind == F32:
        words = f32_at(source)
        for i in range(count):
            to[i] = words[i]
    elif kind == BF16:
        halves = u16_at(source)
        for i in range(count):
            to[i] = from_bf16(halves[i])
    elif kind == F16:
        halves = u16_at(source)
        for i in range(count):
            to[i] = from_half(halves[i])
    elif kind == INT8:
        octets = u8_at(source)
        for i in range(count):
            to[i] = np.float32(np.int8(octets[i])) * scale
    else:
        octets = u8_at(source)
        for i in range(count):
            to[i] = from_fp8(octets[i]) * scale


@njit(fastmath={"contract"})
def narrow(kind, source, count, out):
    """fp32 -> ``count`` values of a plain dtype."""
    made = f32_at(source)
    if kind == BF16:
        halves = u16_at(out)
        for i in range(count):
            halves[i] = to_bf16(made[i])
    elif kind == F16:
        halves = u16_at(out)
        for i in range(count):
            halves[i] = to_half(made[i])
    else:
        words = f32_at(out)
        for i in range(count):
            words[i] = made[i]


@njit(fastmath={"contract"})
def quantize(kind, x, scale):
    """``x / scale`` as it is stored: within the range, to nearest even."""
    ratio = x / scale if scale > np.float32(0.0) else np.float32(0.0)
    limit = np.float32(127.0) if kind == INT8 else np.float32(448.0)
    ratio = limit if ratio > limit else ratio
    ratio = -limit if ratio < -limit else ratio
    if kind == INT8:
        # A number that is none has no place among integers; it comes out as 0.
        return np.uint8(np.int32(rounded(ratio)) if ratio == ratio else np.int32(0))
    return to_fp8(ratio)


@njit(fastmath={"contract"})
def write_record(kind, given, source, source_stride, dim, record, block_size, first, count, wide):
    """``count`` tokens of dtype ``given``, ``source_stride`` bytes apart, into a record from its token ``first`` on.

    ``wide`` is room for ``dim`` fp32.
    """
    if kind < INT8:
        size = 4 if kind == F32 else 2
        for token in range(count):
            widen(given, source + token * source_stride, dim, np.float32(1.0), wide)
            narrow(kind, wide, dim, record + (first + token) * dim * size)
        return
    stored, made = u8_at(record), f32_at(wide)
    place = f32_at(record + block_size * dim)
    old = place[0]
    if first == 0:
        old = np.float32(0.0)
        for i in range(count * dim, block_size * dim):
            stored[i] = np.uint8(0)
    bits = np.uint32(0)  # of magnitudes; as integers they have the numbers' order, and NaN comes last
    for token in range(count):
        widen(given, source + token * source_stride, dim, np.float32(1.0), wide)
        for i in range(dim):
            bits = max(bits, as_bits(made[i]) & np.uint32(0x7FFFFFFF))
    scale = as_float(bits) / (np.float32(127.0) if kind == INT8 else np.float32(448.0))
    if scale <= old or old != old:
        scale = old
    if scale > old and first > 0:
        ratio = old / scale
        for i in range(first * dim):
            now = np.float32(np.int8(stored[i])) if kind == INT8 else from_fp8(stored[i])
            stored[i] = quantize(kind, now * ratio, np.float32(1.0))
    place[0] = scale
    for token in range(count):
        widen(given, source + token * source_stride, dim, np.float32(1.0), wide)
        to = u8_at(record + (first + token) * dim)
        for i in range(dim):
            to[i] = quantize(kind, made[i], scale)

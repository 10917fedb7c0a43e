"""What the kernels share: products that are right in Triton's interpreter too, and the rounding of quantised values."""

import torch
import triton
import triton.language as tl

from engine.kernels.reference import QUANTIZED_MAX

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 before this module is imported."""

_ROUND: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it leaves an fp32 number without its fraction, rounded half to even."""
_ROUND_SMALL: tl.constexpr = tl.constexpr(24576.0)
"""The same for multiples of 2^-9, the step of e4m3 below its smallest normal number."""
_SMALLEST_NORMAL: tl.constexpr = tl.constexpr(0.015625)


@triton.jit
def dot(a, b, acc):
    """``a @ b + acc`` in fp32. The interpreter's bf16 products are wrong (Triton 3.6 and 3.7): there it gets fp32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def from_stored(values, dtype: tl.constexpr):
    """Stored values as ``dtype``, exactly. The interpreter takes int8 for bf16's bits: there it goes by way of fp32."""
    if INTERPRETED:
        values = values.to(tl.float32)
    return values.to(dtype)


@triton.jit
def divide(values, scale):
    """fp32 ``values / scale``, 0 where the scale is 0; correctly rounded, so that every device stores the same."""
    return tl.where(scale > 0, tl.div_rn(values, tl.where(scale > 0, scale, 1.0)), 0.0)


@triton.jit
def to_stored(values, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """fp32 ``values``, already divided by their scale, rounded to nearest even and kept within the stored range."""
    values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
    if dtype == tl.int8:
        return ((values + _ROUND) - _ROUND).to(tl.int8)
    # Rounded here to what e4m3 can hold, since the interpreter's conversion is right only for numbers that fit.
    small = (values + _ROUND_SMALL) - _ROUND_SMALL
    bits = values.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(values) < _SMALLEST_NORMAL, small, normal).to(dtype)


@triton.jit
def soft_cap(scores, cap):
    """``cap * tanh(scores / cap)``."""
    return cap * (2 * tl.sigmoid(2 * scores / cap) - 1)


def is_quantized(dtype: torch.dtype) -> bool:
    return dtype in QUANTIZED_MAX


def scale_arguments(scales: torch.Tensor | None) -> tuple[torch.Tensor | None, int, int, int]:
    """A layer's ``scales [block, k|v, head]`` and its strides; for none, a pointer that no kernel follows."""
    if scales is None:
        return None, 0, 0, 0
    return scales, scales.stride(0), scales.stride(1), scales.stride(2)

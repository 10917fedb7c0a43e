"""Root mean square norm (Zhang and Sennrich 2019), alone or with the residual's addition before it."""

import torch
import triton
import triton.language as tl


@triton.jit
def norm_kernel(
    x, residual, weight, out, eps, stride_x, stride_residual, stride_out,
    ADDS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH_PAD)
    held = columns < WIDTH
    values = tl.load(x + row * stride_x + columns, mask=held, other=0.0).to(tl.float32)
    if ADDS:
        kept = residual + row * stride_residual + columns
        values += tl.load(kept, mask=held, other=0.0).to(tl.float32)
        # The norm is of what the residual keeps, rounded to its dtype.
        rounded = values.to(residual.dtype.element_ty)
        tl.store(kept, rounded, mask=held)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / WIDTH + eps)
    gain = tl.load(weight + columns, mask=held, other=0.0).to(tl.float32)
    tl.store(out + row * stride_out + columns, (values * scale * gain).to(out.dtype.element_ty), mask=held)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x [tokens, width]``, ``weight [width]`` -> the norm, in ``x``'s dtype, computed in fp32."""
    return _norm(x, None, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``residual += x``, in place, and the norm of the sum; all ``[tokens, width]``."""
    return _norm(x, residual, weight, eps)


def _norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width_pad = triton.next_power_of_2(x.shape[1])
    norm_kernel[(len(x),)](
        x, x if residual is None else residual, weight, out, eps,
        x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
        ADDS=residual is not None, WIDTH=x.shape[1], WIDTH_PAD=width_pad,
        num_warps=min(max(width_pad // 512, 1), 16),
    )  # fmt: skip
    return out

"""The MLP's gate: ``silu(gate) * up`` of the merged projection."""

import torch
import triton
import triton.language as tl

WIDTH = 1024


@triton.jit
def silu_mul_kernel(gate_up, out, inner, stride_in, stride_out, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    held = columns < inner
    at = gate_up + row * stride_in + columns
    gate = tl.load(at, mask=held, other=0.0).to(tl.float32)
    up = tl.load(at + inner, mask=held, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * stride_out + columns, result.to(out.dtype.element_ty), mask=held)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``gate_up [tokens, 2 * inner]``, gate first -> ``[tokens, inner]``, computed in fp32."""
    rows, inner = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty((rows, inner), dtype=gate_up.dtype, device=gate_up.device)
    silu_mul_kernel[(rows, triton.cdiv(inner, WIDTH))](
        gate_up, out, inner, gate_up.stride(0), out.stride(0), WIDTH=WIDTH, num_warps=4
    )
    return out

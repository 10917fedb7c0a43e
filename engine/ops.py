"""What lies between a model's products: one kernel each on a CPU and on a GPU; torch's operators where none fits."""

from types import ModuleType

import torch
import torch.nn.functional as F

INTERPRET = False
"""Set by tests that run the GPU's kernels on CPU tensors, in Triton's interpreter."""


def fused(x: torch.Tensor) -> bool:
    """Whether ``x`` is the kernels' business."""
    return x.is_cuda or INTERPRET


def _kernels(x: torch.Tensor, heads: bool = False) -> ModuleType | None:
    """The CPU's kernels, where they can take ``x``, or its last dimension as a head. Imported for CPUs only: they need
    numba."""
    if x.device.type != "cpu":
        return None
    from engine.cpu import elementwise

    return elementwise if elementwise.fits(x, elementwise.MAX_DIM if heads else elementwise.MAX_WIDTH) else None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019), computed in fp32; ``weight`` is fp32."""
    if fused(x) and x.dim() == 2:
        from engine.kernels.norm import rms_norm as kernel

        return kernel(x, weight, eps)
    if x.dim() == 2 and (kernels := _kernels(x)) is not None:
        made: torch.Tensor = kernels.rms_norm(x, weight, eps)
        return made
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    normed: torch.Tensor = wide * norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return normed.mul_(weight).to(x.dtype)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``residual += x``, in place, and the norm of the sum; both ``[tokens, hidden]``."""
    if fused(x):
        from engine.kernels.norm import add_rms_norm as kernel

        return kernel(x, residual, weight, eps)
    residual += x
    return rms_norm(residual, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``gate_up [tokens, gate | up]`` -> ``silu(gate) * up``; may overwrite the gate."""
    if fused(gate_up):
        from engine.kernels.activation import silu_mul as kernel

        return kernel(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


class Rope:
    """Rotary position embedding (Su et al. 2021): tables for every position up to the model's context."""

    def __init__(self, inverse_frequencies: torch.Tensor, max_positions: int, dtype: torch.dtype) -> None:
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse_frequencies)
        self.cos = torch.cat((angles.cos(), angles.cos()), -1).to(dtype)
        self.sin = torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
        if (kernels := _kernels(self.cos, heads=True)) is not None:
            kernels.compile_kernels()

    def at(self, positions: torch.Tensor) -> "Rotation":
        """``positions [tokens]``, int32 or int64."""
        return Rotation(self, positions)


class Rotation:
    """A step's rotation, the same in all layers."""

    def __init__(self, rope: Rope, positions: torch.Tensor) -> None:
        self._rope = rope
        self._positions = positions
        self._kernels = (
            None if fused(positions) or positions.dtype is not torch.int64 else _kernels(rope.cos, heads=True)
        )

    def apply_(
        self,
        qkv: torch.Tensor,
        heads: int,
        kv_heads: int,
        norms: tuple[torch.Tensor, torch.Tensor] | None = None,
        eps: float = 0.0,
    ) -> None:
        """Rotate queries and keys of ``qkv [tokens, heads + 2 * kv_heads, head_dim]`` in place, halves paired as in
        transformers; before that norm each head of them, if ``norms`` holds the weights ``[head_dim]`` for it."""
        if fused(qkv):
            from engine.kernels.rope import rope_

            half = qkv.shape[-1] // 2
            cos, sin = self._rope.cos[:, :half], self._rope.sin[:, half:]
            rope_(qkv, self._positions, cos, sin, heads, kv_heads, norms, eps)
            return
        if self._kernels is not None and qkv.stride()[1:] == (qkv.shape[2], 1):
            rope = self._rope
            self._kernels.rotate_(qkv, self._positions, rope.cos, rope.sin, heads, kv_heads, norms, eps)
            return
        cos, sin = self._rope.cos[self._positions].unsqueeze(1), self._rope.sin[self._positions].unsqueeze(1)
        if norms is not None:
            for part, weight in zip((qkv[:, :heads], qkv[:, heads : heads + kv_heads]), norms, strict=True):
                part.copy_(rms_norm(part, weight, eps))
        x = qkv[:, : heads + kv_heads]
        half = x.shape[-1] // 2
        swapped = torch.cat((x[..., half:], x[..., :half]), -1)
        x.mul_(cos).addcmul_(swapped, sin)

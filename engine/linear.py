"""Linear layers in the form in which this machine multiplies fastest."""

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F

from engine.ops import silu_mul


def _packer(weight: torch.Tensor) -> ModuleType | None:
    """Our own kernels, where they can multiply with ``weight``. Imported for CPUs only: they need numba."""
    if weight.device.type != "cpu" or weight.dtype is not torch.bfloat16:
        return None
    from engine.cpu import gemm

    if not gemm.can_pack(weight):
        return None
    gemm.compile_kernels()
    return gemm


class Linear:
    """``y = x @ weight.T + bias``: ``x [tokens, in]``, ``weight [out, in]``, ``y [tokens, out]``.

    In bf16 on a CPU with bf16 products the weight is packed for our own kernels (``engine.cpu.gemm``), which also do
    what follows a product while it is in registers; the plain copy is let go. Elsewhere torch's operators do the same.
    """

    __slots__ = ("_bias", "_columns", "_gemm", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._gemm = gemm = _packer(weight)
        self._columns = weight.shape[0]
        self._weight = weight if gemm is None else gemm.pack(weight)
        self._bias = bias if gemm is None or bias is None else bias.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._gemm is not None:
            y = x.new_empty(x.shape[0], self._columns)
            self._gemm.linear(x, self._weight, self._bias, y)
            return y
        return F.linear(x, self._weight, self._bias)

    def rows(self, places: torch.Tensor) -> torch.Tensor:
        """``places [n]`` -> those rows of the weight, ``[n, in]``: a tied embedding."""
        if self._gemm is not None:
            found: torch.Tensor = self._gemm.rows(self._weight, places)
            return found
        return F.embedding(places, self._weight)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """``residual += y``, in place."""
        if self._gemm is not None:
            self._gemm.linear(x, self._weight, self._bias, residual, self._gemm.ADD)
        elif residual.is_cuda and self._bias is None:
            residual.addmm_(x, self._weight.T)  # one launch
        else:
            residual += F.linear(x, self._weight, self._bias)

    def silu_mul(self, x: torch.Tensor) -> torch.Tensor:
        """``silu(gate) * up`` where y is ``[tokens, gate | up]``: the first step of a gated MLP."""
        half = self._columns // 2
        if self._gemm is not None and half % self._gemm.PANEL == 0:
            y = x.new_empty(x.shape[0], half)
            self._gemm.linear(x, self._weight, self._bias, y, self._gemm.SILU_MUL)
            return y
        return silu_mul(self(x))


MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], Linear]
"""Makes a layer of ``weight [out, in]`` and ``bias [out]``."""

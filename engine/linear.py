"""Linear layers in the form in which this machine multiplies fastest."""

import torch
import torch.nn.functional as F

_PACKED_FOR_ROWS = 64
"""oneDNN picks the weights' blocking for so many rows; measured as good for 1 as for 512 (benchmarks/engine.md)."""


def can_pack(dtype: torch.dtype, device: str) -> bool:
    """Whether oneDNN has a packed form for this dtype here."""
    return (
        device == "cpu"
        and dtype is torch.bfloat16
        and torch._C._has_mkldnn
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class Linear:
    """``y = x @ weight.T + bias``: ``x [tokens, in]``, ``weight [out, in]``, ``y [tokens, out]``.

    In bf16 on a CPU the weight is packed once for oneDNN's kernels, which ``F.linear`` does anew in each call; the
    plain copy is let go.
    """

    __slots__ = ("_bias", "_packed", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._packed = can_pack(weight.dtype, weight.device.type)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS) if self._packed else weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return y
        return F.linear(x, self._weight, self._bias)

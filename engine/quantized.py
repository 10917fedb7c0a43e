"""Linear layers whose weights are kept in one byte a value: int8 or fp8 (e4m3), with a scale for each output channel.

Weight-only: products are computed in the model's own dtype. Few rows of bf16 on a CPU go to torch's int8 kernel, which
reads the small weights as they are. Otherwise weights are widened tile by tile, into memory that a cache of the
processor holds, and multiplied from there: on a CPU about as fast as bf16 for a prompt's chunk, slower for few rows.
"""

import threading
from functools import partial

import torch
import torch.nn.functional as F

from engine.core.errors import ModelError
from engine.linear import Linear, MakeLinear
from engine.ops import silu_mul

MAKES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
TILE_BYTES = 4 << 20
"""Of widened weights at once; measured as best of 256 KiB to 4 MiB (benchmarks/quantized.md)."""
QUANTIZED_AT_ONCE = 1 << 18
"""Values, in fp32 and several copies: few, so that loading takes little memory."""
FEW_ROWS = 8
"""Up to this many, torch's int8 kernel is the faster way."""
_PACKS = 32
"""torch's int8 kernel reads beyond the end of rows that are no multiple of its vectors."""
_BITS = {torch.bfloat16: (torch.int16, 4, 2.0**120), torch.float32: (torch.int32, 20, 2.0**120)}
"""Of e4m3's bits in a wider float: integers of its size, how far the exponent lies to the left, what its bias lacks."""
_tiles = threading.local()


def linear_maker(quantization: str | None) -> MakeLinear:
    """What makes a model's linear layers; ``ModelError`` for an unknown method."""
    if quantization is None:
        return Linear
    if quantization not in MAKES:
        raise ModelError(f"quantization must be {' or '.join(MAKES)}, or not given; got {quantization!r}")
    return partial(QuantizedLinear, stored=MAKES[quantization])


class QuantizedLinear(Linear):
    """``y = x @ weight.T + bias``; ``weight`` is let go once it is quantised."""

    __slots__ = ("_dtype", "_quantized", "_scale")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, stored: torch.dtype) -> None:
        self._bias = bias
        self._dtype = weight.dtype
        self._quantized, self._scale = quantize(weight, stored)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self._multiply(x)
        return y if self._bias is None else y.add_(self._bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """``residual += y``, in place."""
        residual += self(x)

    def silu_mul(self, x: torch.Tensor) -> torch.Tensor:
        """``silu(gate) * up`` where y is ``[tokens, gate | up]``."""
        return silu_mul(self(x))

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        stored, scale = self._quantized, self._scale
        if x.is_cuda:
            return F.linear(x, stored.to(self._dtype).mul_(scale[:, None]))
        outputs, inputs = stored.shape
        packs = stored.dtype is torch.int8 and self._dtype is torch.bfloat16 and inputs % _PACKS == 0
        if packs and x.shape[0] <= FEW_ROWS:
            y: torch.Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), stored, scale)
            return y
        rows = min(outputs, max(16, TILE_BYTES // (inputs * self._dtype.itemsize)))
        tile = _tile(rows * inputs, self._dtype).view(rows, inputs)
        y = x.new_empty(x.shape[0], outputs)
        for first in range(0, outputs, rows):
            part = slice(first, min(first + rows, outputs))
            wide = tile[: part.stop - first]
            widen(stored[part], wide)
            if self._dtype is torch.float16:  # whose sums would overflow before they are scaled
                wide.mul_(scale[part, None])
            y[:, part] = F.linear(x, wide)
        return y if self._dtype is torch.float16 else y.mul_(scale)


def quantize(weight: torch.Tensor, stored: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight [out, in]`` -> values of dtype ``stored``, and scales ``[out]`` of the weight's dtype.

    ``weight ~ values * scales[:, None]``: symmetric, the largest of a row at the largest value.
    """
    values = torch.empty(weight.shape, dtype=stored, device=weight.device)
    largest = torch.maximum(weight.amax(1), -weight.amin(1)).float()
    # Rounded first, then used: so that rounding the scale costs nothing. A row of zeros has any scale.
    scales = torch.where(largest > 0, largest / LARGEST[stored], 1.0).to(weight.dtype)
    rows = max(1, QUANTIZED_AT_ONCE // weight.shape[1])
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        scaled = (weight[part].float() / scales[part, None].float()).clamp_(-LARGEST[stored], LARGEST[stored])
        values[part] = scaled.round_() if stored is torch.int8 else scaled
    return values, scales


def widen(stored: torch.Tensor, out: torch.Tensor) -> None:
    """``stored``, int8 or fp8, as numbers of ``out``'s dtype."""
    if stored.dtype is torch.int8 or out.dtype not in _BITS or out.is_cuda:
        out.copy_(stored)
        return
    # torch widens fp8 one by one on a CPU. All at once: sign, exponent and fraction are shifted to where the wider
    # float has them (the sign is extended over what lies between, and masked), then the exponent's bias is made up for.
    kind, shift, bias = _BITS[out.dtype]
    bits = out.view(kind)
    bits.copy_(stored.view(torch.int8))
    sign = -1 << (8 * kind.itemsize - 1)
    bits.bitwise_left_shift_(shift).bitwise_and_(sign | 0x7F << shift)
    out.mul_(bias)


def _tile(count: int, dtype: torch.dtype) -> torch.Tensor:
    """This thread's scratch memory: one piece for all layers."""
    tile: torch.Tensor | None = getattr(_tiles, "bytes", None)
    if tile is None or len(tile) < count * dtype.itemsize:
        tile = _tiles.bytes = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
    return tile[: count * dtype.itemsize].view(dtype)

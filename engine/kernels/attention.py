"""The attention of a step through the kernels: ``engine.models.interface.Attend`` over a paged cache on the GPU.

Rows with one token are decoded, with split keys; all others are prefilled in tiles. Either kernel writes its own rows'
tokens of the same result.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.core.step_input import StepInput
from engine.kernels.decode_attention import decode_attention, num_splits
from engine.kernels.kv_write import slot_spans, write_kv, write_kv_quantized
from engine.kernels.prefill_attention import prefill_attention, query_tiles, tokens_of_tile
from engine.kv_cache import KVCache

Ints = NDArray[np.int32]
_ALIGNED = 4
"""Arrays begin at multiples of so many int32: Triton compiles a kernel anew for pointers that are aligned otherwise."""


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Rows with one token; see ``decode_attention``."""

    tables: torch.Tensor
    query_rows: torch.Tensor
    lengths: torch.Tensor
    splits: int


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """All others; see ``prefill_attention``."""

    tables: torch.Tensor
    tiles: torch.Tensor
    starts: torch.Tensor
    num_computed: torch.Tensor


@dataclass(frozen=True, slots=True)
class KernelAttention:
    """One step's attention, for every layer."""

    data: list[torch.Tensor]
    """A view of the cache's values for each layer."""
    scales: list[torch.Tensor] | None
    slots: torch.Tensor
    """``[tokens]``, or for a quantised cache ``[spans, 4]``: where the step's keys and values go."""
    decode: DecodeRows | None
    prefill: PrefillRows | None

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """See ``engine.models.interface.Attend``."""
        data, scales = self.data[layer], None
        if self.scales is None:
            write_kv(key, value, data, self.slots)
        else:
            scales = self.scales[layer]
            write_kv_quantized(key, value, data, scales, self.slots)
        factor = query.shape[2] ** -0.5 if scale is None else scale
        out = query.new_empty((query.shape[0], query.shape[1] * query.shape[2]))
        if self.decode is not None:
            rows = self.decode
            decode_attention(
                query, data, scales, rows.tables, rows.query_rows, rows.lengths, out,
                scale=factor, window=window, softcap=softcap, splits=rows.splits,
            )  # fmt: skip
        if self.prefill is not None:
            chunks = self.prefill
            prefill_attention(
                query, data, scales, chunks.tables, chunks.tiles, chunks.starts, chunks.num_computed, out,
                scale=factor, window=window, softcap=softcap,
            )  # fmt: skip
        return out


class AttentionMaker:
    """Makes each step's attention over one rank's cache, of which it has ``num_heads`` query heads."""

    def __init__(self, kv_cache: KVCache, num_heads: int, compute_dtype: torch.dtype) -> None:
        layout = kv_cache.layout
        self.layout = layout
        self.num_heads = num_heads
        self.device = kv_cache.bytes.device
        self.data = [kv_cache.data[:, layer] for layer in range(layout.num_layers)]
        scales = kv_cache.scales
        self.scales = None if scales is None else [scales[:, layer] for layer in range(layout.num_layers)]
        self._tile = tokens_of_tile(num_heads // layout.num_kv_heads, compute_dtype, layout.head_dim)
        self._processors = 132
        if self.device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(self.device).multi_processor_count

    def splits(self, rows: int, longest: int) -> int:
        return num_splits(rows, self.layout.num_kv_heads, longest, self._processors)

    def prepare(self, step: StepInput, *more: Ints) -> tuple[KernelAttention, list[torch.Tensor]]:
        """A step's attention, and ``more`` arrays of it on the device: all in one copy."""
        lengths = step.num_computed + step.num_tokens
        single = np.flatnonzero(step.num_tokens == 1)
        others = np.flatnonzero(step.num_tokens != 1)
        tables = np.ascontiguousarray(step.block_tables)
        starts = step.starts.astype(np.int32)
        parts = [
            self.places(step),
            *(tables[single], starts[single], lengths[single]),
            *(tables, query_tiles(step.num_tokens, others, self._tile), starts, step.num_computed),
        ]
        if not len(others):
            parts[4] = tables[:0]  # prefill's tables would be decode's once more
        slots, own, query_rows, own_lengths, tables_there, tiles, starts_there, computed, *found = upload(
            self.device, [*parts, *more]
        )
        decode = prefill = None
        if len(single):
            splits = self.splits(len(single), int(lengths[single].max()))
            decode = DecodeRows(own, query_rows, own_lengths, splits)
        if len(others):
            prefill = PrefillRows(tables_there, tiles, starts_there, computed)
        return KernelAttention(self.data, self.scales, slots, decode, prefill), found

    def places(self, step: StepInput) -> Ints:
        """Where the step's keys and values go: slots, or the spans of a quantised cache."""
        size = self.layout.block_size
        positions = step.positions
        rows = np.repeat(np.arange(len(step.num_tokens)), step.num_tokens)
        slots = step.block_tables[rows, positions // size].astype(np.int64) * size + positions % size
        return slot_spans(slots, size) if self.layout.quantized else slots.astype(np.int32)


def upload(device: torch.device, arrays: list[Ints]) -> list[torch.Tensor]:
    """int32 arrays of any shapes on the device, in one copy."""
    ends = np.cumsum([-(-array.size // _ALIGNED) * _ALIGNED for array in arrays])
    packed = np.zeros(int(ends[-1]), np.int32)
    firsts = [0, *ends[:-1].tolist()]
    for first, array in zip(firsts, arrays, strict=True):
        packed[first : first + array.size] = array.ravel()
    there = torch.from_numpy(packed).to(device)
    return [there[first : first + array.size].view(array.shape) for first, array in zip(firsts, arrays, strict=True)]

"""The attention of CPUs: hands the rows of a step to kernels. ``engine.models.interface.Attend`` is its contract."""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from engine.core.step_input import StepInput
from engine.cpu import jit, paged_attention
from engine.cpu.elementwise import bits
from engine.cpu.kv import KINDS
from engine.cpu.paged_attention import ARGUMENTS, CHUNK, MAX_DIM
from engine.cpu.prompt_attention import PANEL, ROWS
from engine.cpu.simd import HAS_BF16_DOT
from engine.kv_cache import KVCache
from engine.models.interface import Attend

SHORT_QUERY = 16
"""A row of more tokens than this is a prompt's."""

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def unsupported(kv_cache: KVCache) -> str:
    """Why these kernels cannot serve a cache here; empty where they can."""
    if not jit.available:
        return "torch does not compute with libgomp here"
    if kv_cache.bytes.device.type != "cpu":
        return f"the cache is on {kv_cache.bytes.device}"
    if kv_cache.layout.head_dim % 16 or kv_cache.layout.head_dim > MAX_DIM:
        return f"head_dim is {kv_cache.layout.head_dim}, not a multiple of 16 up to {MAX_DIM}"
    return ""


class CpuStepAttention:
    """The attention of one step, for every layer."""

    def __init__(self, owner: "CpuAttention", step: StepInput) -> None:
        layout = owner.layout
        self._owner = owner
        self._arguments = arguments = np.zeros(len(ARGUMENTS), np.int64)
        self._layer_bytes = layout.layer_bytes
        self._base = owner.cache.bytes.data_ptr()
        counts = step.num_tokens.astype(np.int64)
        computed = step.num_computed.astype(np.int64)
        spans = _spans(counts, computed, layout.block_size)
        group = owner.num_heads // layout.num_kv_heads
        prompt = (counts > SHORT_QUERY) & owner.packs
        long, short = np.flatnonzero(prompt), np.flatnonzero(~prompt)
        chunks, room = _chunks(short, counts, computed, owner.num_heads * (layout.head_dim + 2))
        panels, prompts = _prompts(long, counts, computed, max(1, ROWS // group))
        self._partial = torch.empty(room, dtype=torch.float32)
        self._scales = torch.empty(2 * layout.num_kv_heads * len(panels) * PANEL if layout.quantized else 0)
        self._packed = owner.room(len(panels) * 2 * layout.num_kv_heads * PANEL * layout.head_dim)
        # Held here as long as kernels are given their addresses.
        tables, starts = np.ascontiguousarray(step.block_tables), step.starts
        before = np.ascontiguousarray(step.num_computed)
        self._held: list[NDArray[np.int32] | NDArray[np.int64]] = [
            tables,
            starts,
            before,
            spans,
            chunks,
            panels,
            prompts,
        ]
        # In the order of ARGUMENTS; the zeros are each layer's own.
        arguments[paged_attention.BLOCK_STRIDE : paged_attention.WINDOW] = (
            layout.block_bytes, layout.record_bytes, layout.block_size, layout.head_dim, layout.num_kv_heads, group,
            _address(tables), tables.shape[1], _address(starts), _address(before), _address(spans), len(spans),
            _address(chunks), len(chunks), self._partial.data_ptr(), _address(panels), len(panels), _address(prompts),
            len(prompts), self._packed.data_ptr(), self._scales.data_ptr(),
        )  # fmt: skip
        arguments[paged_attention.STORED] = KINDS[layout.dtype]
        self._pointer = _address(arguments)

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
        dim = query.shape[2]
        out = query.new_empty(query.shape[0], query.shape[1] * dim)
        size = query.element_size()
        a = self._arguments
        held = [_rows(each) for each in (query, key, value)]
        a[0], a[1] = held[0].data_ptr(), held[0].stride(0) * size
        a[2], a[3] = held[1].data_ptr(), held[1].stride(0) * size
        a[4], a[5] = held[2].data_ptr(), held[2].stride(0) * size
        a[6], a[7] = out.data_ptr(), out.stride(0) * size
        a[paged_attention.LAYER] = self._base + layer * self._layer_bytes
        a[paged_attention.WINDOW] = window or 0
        a[paged_attention.SCALE] = bits(dim**-0.5 if scale is None else scale)
        a[paged_attention.SOFTCAP] = bits(softcap or 0.0)
        a[paged_attention.GIVEN] = KINDS[_DTYPES[query.dtype]]
        self._owner.kernel.launch(self._pointer)
        return out


class Prompts(Protocol):
    """Another attention over the same cache."""

    def prepare(self, step: StepInput) -> Attend: ...


class CpuAttention:
    """One rank's KV cache and how to attend to it. ``computed``: the model's dtype.

    Rows of many tokens go through bf16 products where the model computes in bf16 and the processor has them; else
    through ``prompts``, where it is given.
    """

    def __init__(
        self, kv_cache: KVCache, num_heads: int, computed: torch.dtype, prompts: Prompts | None = None
    ) -> None:
        if reason := unsupported(kv_cache):
            raise ValueError(reason)
        self.cache = kv_cache
        self.layout = kv_cache.layout
        self.num_heads = num_heads
        group = num_heads // kv_cache.layout.num_kv_heads
        self.packs = HAS_BF16_DOT and computed is torch.bfloat16 and group <= ROWS
        self._prompts = prompts
        self._room = torch.empty(0, dtype=torch.bfloat16)
        self.kernel = paged_attention.attention()

    def room(self, values: int) -> torch.Tensor:
        """For so many bf16, the same in all layers and steps."""
        if len(self._room) < values:
            self._room = torch.empty(values, dtype=torch.bfloat16)
        return self._room

    def prepare(self, step: StepInput) -> Attend:
        """What all layers of a step have in common."""
        if not self.packs and self._prompts is not None and int(step.num_tokens.max()) > SHORT_QUERY:
            return self._prompts.prepare(step)
        return CpuStepAttention(self, step)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``[tokens, heads, dim]``, of which only the tokens may be apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _address(array: NDArray[np.int32] | NDArray[np.int64]) -> int:
    return int(array.__array_interface__["data"][0])


def _spans(counts: NDArray[np.int64], computed: NDArray[np.int64], block_size: int) -> NDArray[np.int32]:
    """``[n, 4]``: row, first position, tokens, 0: the step's tokens by the block that they go to."""
    first_block, last_block = computed // block_size, (computed + counts - 1) // block_size
    rows, place = _expand(last_block - first_block + 1)
    block = first_block[rows] + place
    begin = np.maximum(block * block_size, computed[rows])
    end = np.minimum((block + 1) * block_size, (computed + counts)[rows])
    return np.stack([rows, begin, end - begin, np.zeros_like(rows)], 1).astype(np.int32)


def _chunks(
    rows: NDArray[np.int64], counts: NDArray[np.int64], computed: NDArray[np.int64], floats: int
) -> tuple[NDArray[np.int64], int]:
    """``[n, 4]``: row, chunk, its first float in ``partial``, chunks of the row; and the floats needed. A token takes
    ``floats`` a chunk, of rows that have several chunks."""
    parts = -(-(computed + counts)[rows] // CHUNK)
    which, place = _expand(parts)
    each = np.where(parts > 1, counts[rows] * floats, 0)[which]
    ends = np.cumsum(each)
    return np.stack([rows[which], place, ends - each, parts[which]], 1), int(each.sum())


def _prompts(
    rows: NDArray[np.int64], counts: NDArray[np.int64], computed: NDArray[np.int64], queries: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``panels`` and ``prompts`` (see ``paged_attention``) of rows of many tokens, ``queries`` a ticket."""
    panels = -(-(computed + counts)[rows] // PANEL)
    first = np.cumsum(panels) - panels
    which, place = _expand(panels)
    tickets, turn = _expand(-(-counts[rows] // queries))
    begin = turn * queries
    count = np.minimum(queries, counts[rows][tickets] - begin)
    return (
        np.stack([rows[which], place * PANEL, first[which], panels[which]], 1),
        np.stack([rows[tickets], begin, count, first[tickets]], 1),
    )


def _expand(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row ``i`` ``counts[i]`` times, and each one's place among its row's."""
    rows = np.repeat(np.arange(len(counts)), counts)
    return rows, np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)

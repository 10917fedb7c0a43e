"""Attention over a paged KV cache on a CPU, batched: a step's sequences form a few rectangles, whatever their number.

The cache is ``[block, layer, k|v, kv_head, token, head_dim]``. Keys and values are written token by token, as rows of
``head_dim``, and gathered block by block, as rows of ``token * head_dim``. A row has the same number in every layer, so
a step's row numbers are computed once (numpy) and serve all layers: each layer is a view of the cache that begins at
its own first row.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from engine.core.errors import ModelError
from engine.core.step_input import StepInput
from engine.cpu.attention import CpuAttention, unsupported
from engine.kv_cache import KVCache
from engine.models.interface import Attend

log = logging.getLogger(__name__)

SHORT_QUERY = 16
"""Rows of up to this many tokens share a rectangle with rows of other lengths; longer ones only with equals."""
TILE = 128
"""Queries of a prompt are taken in tiles of this many, each against just the keys that it may see."""


class Attention(Protocol):
    """One rank's attention over its KV cache."""

    def prepare(self, step: StepInput) -> Attend:
        """What all layers of a step have in common."""


def make_attention(kv_cache: KVCache, num_heads: int, computed: torch.dtype) -> Attention:
    """The fastest attention that this machine and this cache allow; says so where it is torch's operators.
    ``computed``: the dtype of queries, keys and values.

    ``ModelError`` where there is none.
    """
    reason = unsupported(kv_cache)
    if not reason:
        prompts = PagedAttention(kv_cache, num_heads) if kv_cache.dtype is computed else None
        return CpuAttention(kv_cache, num_heads, computed, prompts)
    if kv_cache.dtype is not computed:
        raise ModelError(f"a KV cache of {kv_cache.layout.dtype} cannot be served: {reason}; set kv_dtype to auto")
    log.warning("attention runs as torch's operators: %s", reason)
    return PagedAttention(kv_cache, num_heads)


@dataclass(slots=True)
class _Rectangle:
    """Sequences of one step with the same number of query tokens. With a window, a sequence begins here at the first
    block that one of its queries sees."""

    batch: int
    query: int
    keys: int
    """Longest KV length, in whole blocks."""
    computed: int
    """Tokens before the queries; the same for all rows, or -1 where lengths differ and ``mask`` tells."""
    window: int | None
    rows: torch.Tensor
    """``[2 * batch * kv_heads * keys / block_size]``: the blocks' rows, keys first."""
    tokens: torch.Tensor
    """``[batch * query]``: where the queries stand in the step's flat batch."""
    mask: torch.Tensor | None
    """``[batch, 1, group * query, keys]``, added to the scores; 0 or -inf."""


class StepAttention:
    """The attention of one step, for every layer: made by ``PagedAttention.prepare``."""

    def __init__(
        self,
        cache: "PagedAttention",
        write_rows: torch.Tensor,
        longest: int,
        rectangles: Callable[[int | None], list[_Rectangle]],
    ) -> None:
        self._cache = cache
        self._write_rows = write_rows
        self._longest = longest
        self._make = rectangles
        self._rectangles: dict[int | None, list[_Rectangle]] = {}

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
        cache = self._cache
        scale = cache.head_dim**-0.5 if scale is None else scale
        window = None if window is None or window >= self._longest else window
        cache.tokens[layer].index_copy_(0, self._write_rows, torch.cat((key, value), 1).reshape(-1, cache.head_dim))
        if window not in self._rectangles:
            self._rectangles[window] = self._make(window)
        rectangles = self._rectangles[window]
        if len(rectangles) == 1:
            return cache.attend(rectangles[0], layer, query, scale, softcap)
        out = query.new_empty(query.shape[0], cache.num_heads * cache.head_dim)
        for rectangle in rectangles:
            part = cache.attend(rectangle, layer, query.index_select(0, rectangle.tokens), scale, softcap)
            out.index_copy_(0, rectangle.tokens, part)
        return out


class PagedAttention:
    """One rank's KV cache and how to attend to it."""

    def __init__(self, kv_cache: KVCache, num_heads: int) -> None:
        layout = kv_cache.layout
        self.num_heads = num_heads
        self.head_dim = layout.head_dim
        self._kv_heads = layout.num_kv_heads
        self._group = num_heads // layout.num_kv_heads
        self._block_size = layout.block_size
        layer_rows = 2 * layout.num_kv_heads
        self._block_rows = layout.num_layers * layer_rows
        blocks = kv_cache.data.view(-1, layout.block_size * layout.head_dim)
        self._blocks = [blocks[layer * layer_rows :] for layer in range(layout.num_layers)]
        self.tokens = [layer.view(-1, layout.head_dim) for layer in self._blocks]
        self._gathered = blocks.new_empty(0, blocks.shape[1])
        self._half = kv_cache.dtype is not torch.float32
        self._dtype = kv_cache.dtype
        # K, then V, of each KV head within one layer of a block.
        self._head_rows = np.arange(layer_rows, dtype=np.int64)
        causal = torch.full((TILE, TILE), float("-inf"), dtype=kv_cache.dtype).triu_(1)
        self._causal = causal.repeat(self._group, 1)

    def prepare(self, plan: StepInput) -> StepAttention:
        """What all layers of a step have in common."""
        positions, starts = plan.positions, plan.starts
        counts = plan.num_tokens.astype(np.int64)
        lengths = plan.num_computed.astype(np.int64) + counts
        tables = plan.block_tables.astype(np.int64)
        rows = np.repeat(np.arange(len(lengths)), counts)
        block_rows = tables[rows, positions // self._block_size] * self._block_rows
        token_rows = (block_rows[:, None] + self._head_rows) * self._block_size + (positions % self._block_size)[
            :, None
        ]
        write_rows = torch.from_numpy(token_rows.ravel())

        def rectangles(window: int | None) -> list[_Rectangle]:
            first = np.zeros_like(lengths)
            if window is not None:
                first = np.maximum(plan.num_computed + 1 - window, 0) // self._block_size
            seen = lengths - first * self._block_size
            return [
                self._rectangle(members, plan, tables, first, seen, starts, window)
                for members in _partition(counts, seen)
            ]

        return StepAttention(self, write_rows, int(lengths.max()), rectangles)

    def attend(
        self, rectangle: _Rectangle, layer: int, queries: torch.Tensor, scale: float, softcap: float | None
    ) -> torch.Tensor:
        """``queries [batch * query, heads, head_dim]`` -> the same, heads and head_dim joined."""
        batch, query, heads, dim = rectangle.batch, rectangle.query, self._kv_heads, self.head_dim
        gathered = self._gather(layer, rectangle.rows)
        keys, values = gathered.view(2, batch, heads, rectangle.keys, dim).unbind(0)
        grouped = queries.reshape(batch, query, heads, self._group, dim).permute(0, 2, 3, 1, 4)
        if rectangle.computed < 0 or query == 1:
            folded = grouped.reshape(batch, heads, self._group * query, dim)
            out = self._attend_masked(rectangle, folded, keys, values, scale, softcap)
        elif self._half or rectangle.window is not None or softcap is not None:
            out = self._attend_tiles(rectangle, grouped, keys, values, scale, softcap)
        else:
            out = self._attend_causal(rectangle, grouped, keys, values, scale)
        out = out.view(batch, heads, self._group, query, dim).permute(0, 3, 1, 2, 4)
        return out.reshape(batch * query, self.num_heads * dim)

    def _gather(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """The blocks' rows, in memory that every layer uses again: a cache of the processor keeps it."""
        if len(self._gathered) < len(rows):
            self._gathered = self._gathered.new_empty(len(rows), self._gathered.shape[1])
        return torch.index_select(self._blocks[layer], 0, rows, out=self._gathered[: len(rows)])

    def _attend_masked(
        self,
        rectangle: _Rectangle,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """Few queries a sequence. A fused kernel is faster for one sequence, plain products for many."""
        mask = rectangle.mask
        if rectangle.batch < 4 and softcap is None:
            expanded = None if mask is None else mask.expand(-1, -1, queries.shape[2], -1)
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=expanded, scale=scale)
        scores = _capped(torch.matmul(queries * scale, keys.transpose(-1, -2)), softcap)
        if mask is not None:
            scores += mask
        return torch.matmul(torch.softmax(scores, -1), values)

    def _attend_tiles(
        self,
        rectangle: _Rectangle,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """A prompt's chunk: plain products over tiles of queries, and over the keys that a tile sees."""
        batch, heads, group, query, dim = queries.shape
        window = rectangle.window
        out = torch.empty((batch, heads, group, query, dim), dtype=queries.dtype)
        for first in range(0, query, TILE):
            size = min(TILE, query - first)
            seen = rectangle.computed + first + size
            unseen = 0 if window is None else max(0, seen - size + 1 - window)
            tile = queries[:, :, :, first : first + size].reshape(batch, heads, group * size, dim) * scale
            scores = _capped(torch.matmul(tile, keys[:, :, unseen:seen].transpose(-1, -2)), softcap)
            causal = (
                self._causal if size == TILE else self._causal.view(group, TILE, TILE)[:, :size, :size].flatten(0, 1)
            )
            scores[..., seen - size - unseen :] += causal
            if window is not None and seen > window:
                # The tile's last query sees `window` keys, those before it as many fewer of the first ones.
                behind = torch.arange(seen - size, seen)[:, None] - torch.arange(unseen, seen) >= window
                scores.view(batch, heads, group, size, -1).masked_fill_(behind, float("-inf"))
            part = torch.matmul(torch.softmax(scores, -1), values[:, :, unseen:seen])
            out[:, :, :, first : first + size] = part.view(batch, heads, group, size, dim)
        return out

    def _attend_causal(
        self, rectangle: _Rectangle, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """A prompt's chunk in 32 bits: the fused kernel."""
        batch, heads, group, query, dim = queries.shape
        seen = rectangle.computed + query
        whole = rectangle.computed == 0
        mask = None
        if not whole:
            mask = torch.ones((query, seen), dtype=torch.bool).tril_(rectangle.computed)
        return F.scaled_dot_product_attention(
            queries.reshape(batch, heads * group, query, dim),
            keys[:, :, :seen],
            values[:, :, :seen],
            attn_mask=mask,
            is_causal=whole,
            scale=scale,
            enable_gqa=group > 1,
        )

    def _rectangle(
        self,
        members: NDArray[np.int64],
        plan: StepInput,
        tables: NDArray[np.int64],
        first: NDArray[np.int64],
        seen: NDArray[np.int64],
        starts: NDArray[np.int64],
        window: int | None,
    ) -> _Rectangle:
        """``first``: each row's first block that is looked at; ``seen``: its tokens from there on."""
        query = int(plan.num_tokens[members[0]])
        width = -(-int(seen[members].max()) // self._block_size)
        keys = width * self._block_size
        # A shorter row looks at some block of its own instead, which the mask hides.
        columns = np.minimum(first[members][:, None] + np.arange(width), tables.shape[1] - 1)
        block_rows = (tables[members[:, None], columns] * self._block_rows)[None, :, None, :]
        rows = block_rows + self._head_rows.reshape(2, 1, self._kv_heads, 1)
        computed = seen[members] - query
        alike = bool((computed == computed[0]).all())
        mask = None
        if query <= SHORT_QUERY and not (alike and query == 1 and int(seen[members[0]]) == keys and window is None):
            positions = (computed[:, None] + np.arange(query))[:, :, None]
            visible = np.arange(keys) <= positions
            if window is not None:
                visible &= np.arange(keys) > positions - window
            added = torch.zeros((len(members), 1, 1, query, keys), dtype=self._dtype)
            added.masked_fill_(torch.from_numpy(~visible)[:, None, None], float("-inf"))
            mask = added.expand(-1, -1, self._group, -1, -1).reshape(len(members), 1, self._group * query, keys)
        return _Rectangle(
            batch=len(members),
            query=query,
            keys=keys,
            computed=-1 if query <= SHORT_QUERY else int(computed[0]),
            window=window,
            rows=torch.from_numpy(rows.ravel()),
            tokens=torch.from_numpy((starts[members][:, None] + np.arange(query)).ravel()),
            mask=mask,
        )


def _capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _partition(counts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Rows of the plan that share a rectangle. A lone rectangle keeps the rows' order, so that nothing is gathered."""
    groups: dict[tuple[int, int], list[int]] = {}
    # Short rows: one rectangle for lengths within a factor of two. Long ones: only with the very same shape.
    buckets = np.ceil(np.log2(np.maximum(lengths, 64))).astype(np.int64)
    keys = np.where(counts <= SHORT_QUERY, buckets, -lengths)
    for row, key in enumerate(zip(counts.tolist(), keys.tolist(), strict=True)):
        groups.setdefault(key, []).append(row)
    return [np.array(rows, np.int64) for rows in groups.values()]

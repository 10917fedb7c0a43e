"""Promise: attention with a sliding window, a soft cap or a scale of its own equals the plain formula."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention import PagedAttention
from engine.core.kv_layout import KVLayout
from engine.core.step_input import StepInput
from engine.kv_cache import KVCache

BLOCK, DIM = 4, 8


def plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """``query [queries, heads, dim]`` at the end of ``key``, ``value [tokens, kv_heads, dim]``; in double precision."""
    queries, heads = query.shape[:2]
    key, value = (x.double().repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key) * (DIM**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    positions = torch.arange(len(key) - queries, len(key))[:, None]
    places = torch.arange(len(key))
    visible = places <= positions
    if window is not None:
        visible &= places > positions - window
    out = torch.einsum("hqk,khd->qhd", torch.softmax(scores.masked_fill(~visible, float("-inf")), -1), value)
    return out.reshape(queries, heads * DIM).float()


def step(counts: list[int], computed: list[int], tables: np.ndarray) -> StepInput:
    total = np.array(computed) + np.array(counts)
    width = int(-(-total.max() // BLOCK))
    own = np.arange(width) < -(-total // BLOCK)[:, None]
    return StepInput(
        tokens=np.zeros(sum(counts), np.int32),
        num_tokens=np.array(counts, np.int32),
        num_computed=np.array(computed, np.int32),
        block_tables=np.where(own, tables[:, :width], tables[:, :1]).astype(np.int32),
        logit_rows=np.zeros(1, np.int32),
        num_sampled=1,
    )


@settings(max_examples=80)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 90), st.sampled_from([1, 1, 1, 2, 7, 16, 17, 40, 150])), min_size=1, max_size=6
    ),
    window=st.sampled_from([None, 1, 2, 4, 5, 16, 33, 100, 5000]),
    softcap=st.sampled_from([None, None, 1.5]),
    scale=st.sampled_from([None, 0.7]),
    heads=st.sampled_from([(2, 2), (4, 2), (6, 1)]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 1000),
)
def test_a_step_of_any_rows_equals_the_plain_formula(
    rows: list[tuple[int, int]],
    window: int | None,
    softcap: float | None,
    scale: float | None,
    heads: tuple[int, int],
    dtype: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_heads, kv_heads = heads
    layout = KVLayout(2, kv_heads, DIM, BLOCK, dtype)
    width = 64
    tables = np.random.default_rng(seed).permutation(width * len(rows)).reshape(len(rows), width)
    cache = KVCache(layout, torch.zeros(tables.size * layout.block_bytes, dtype=torch.uint8))
    paged = PagedAttention(cache, num_heads)

    def made(tokens: int, count: int) -> torch.Tensor:
        return torch.randn(tokens, count, DIM, generator=generator).to(cache.dtype)

    keys = [made(computed + count, kv_heads) for computed, count in rows]
    values = [made(computed + count, kv_heads) for computed, count in rows]
    queries = [made(count, num_heads) for _, count in rows]
    before = [row for row, (computed, _) in enumerate(rows) if computed]
    if before:
        first = step([rows[row][0] for row in before], [0] * len(before), tables[before])
        parts = [torch.cat([x[row][: rows[row][0]] for row in before]) for x in (keys, values)]
        paged.prepare(first)(1, made(len(parts[0]), num_heads), *parts)
    now = step([count for _, count in rows], [computed for computed, _ in rows], tables)
    parts = [torch.cat([x[row][computed:] for row, (computed, _) in enumerate(rows)]) for x in (keys, values)]
    out = paged.prepare(now)(1, torch.cat(queries), *parts, window=window, scale=scale, softcap=softcap)
    expected = torch.cat([plain(*each, window, scale, softcap) for each in zip(queries, keys, values, strict=True)])
    bound = 1e-5 if dtype == "float32" else 0.06
    torch.testing.assert_close(out.float(), expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("window", [None, 16])
def test_what_a_window_has_left_behind_is_not_looked_at(window: int | None) -> None:
    """Blocks before the window may hold anything, even what is no number."""
    layout = KVLayout(1, 1, DIM, BLOCK, "float32")
    cache = KVCache(layout, torch.zeros(64 * layout.block_bytes, dtype=torch.uint8))
    cache.data[:16] = float("nan")  # the first 64 tokens
    one = torch.ones(20, 1, DIM)
    for counts in ([20], [1]):
        now = step(counts, [80], np.arange(64)[None])
        out = PagedAttention(cache, 1).prepare(now)(0, *[one[: counts[0]]] * 3, window=window)
        assert out.isfinite().all() == (window is not None)

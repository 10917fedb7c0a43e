"""The attention kernels against fp64, over heads, blocks, lengths and KV dtypes."""

import numpy as np
import pytest
import torch

from engine.kernels.decode_attention import decode_attention
from engine.kernels.prefill_attention import prefill_attention, query_tiles, tokens_of_tile
from tests.kernels.cases import DEVICE, Batch, assert_close, make_batch

SHAPES = [
    # heads, KV heads, head size, block size, dtype, KV dtype
    (4, 4, 64, 16, torch.float32, ""),
    (8, 2, 128, 32, torch.bfloat16, ""),
    (6, 2, 80, 16, torch.float16, ""),
    (8, 1, 96, 64, torch.float32, ""),
    (5, 1, 256, 128, torch.bfloat16, ""),
    (4, 2, 64, 24, torch.float32, "int8"),
    (8, 1, 128, 128, torch.bfloat16, "fp8"),
    (7, 1, 80, 16, torch.float16, "int8"),
    (3, 3, 96, 16, torch.float32, "fp8"),
]
IDS = ["-".join(map(str, shape)).replace("torch.", "") for shape in SHAPES]


def decode(batch: Batch, rows: list[int], splits: int, **options: float | int | None) -> torch.Tensor:
    out = torch.full(
        (len(batch.query), batch.query.shape[1] * batch.query.shape[2]), float("nan"), dtype=batch.query.dtype
    )
    out = out.to(DEVICE)
    lengths = (batch.num_computed + batch.num_tokens)[rows]
    tables = batch.tables[rows]
    query_rows = batch.starts[rows]
    decode_attention(batch.query, batch.data, batch.scales, tables, query_rows, lengths, out, splits=splits, **options)
    return out


def prefill(batch: Batch, rows: list[int], **options: float | int | None) -> torch.Tensor:
    heads, dim = batch.query.shape[1:]
    out = torch.full((len(batch.query), heads * dim), float("nan"), dtype=batch.query.dtype, device=DEVICE)
    tokens = tokens_of_tile(heads // batch.data.shape[2], batch.query.dtype, dim)
    tiles = query_tiles(batch.num_tokens.cpu().numpy(), torch.tensor(rows).numpy(), tokens)
    prefill_attention(
        batch.query, batch.data, batch.scales, batch.tables, torch.from_numpy(tiles).to(DEVICE), batch.starts,
        batch.num_computed, out, **options,
    )  # fmt: skip
    return out


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size", "dtype", "kv_dtype"), SHAPES, ids=IDS)
@pytest.mark.parametrize("splits", [1, 4])
def test_decode_attends_to_all_that_the_cache_holds(heads, kv_heads, dim, block_size, dtype, kv_dtype, splits):
    rows = [(0, 1), (block_size - 1, 1), (150, 1), (290, 1)]
    batch = make_batch(
        rows, heads=heads, kv_heads=kv_heads, dim=dim, block_size=block_size, dtype=dtype, kv_dtype=kv_dtype
    )
    out = decode(batch, [0, 1, 2, 3], splits, scale=dim**-0.5)
    assert_close(out, batch.expected(scale=dim**-0.5), dtype)


@pytest.mark.parametrize(
    ("window", "softcap", "splits"), [(None, 20.0, 1), (1, None, 2), (40, None, 1), (140, None, 2), (140, 20.0, 2)]
)
def test_decode_keeps_to_its_window_and_caps_its_scores(window, softcap, splits):
    batch = make_batch(
        [(30, 1), (299, 1)], heads=4, kv_heads=2, dim=64, block_size=16, dtype=torch.float32, kv_dtype="int8"
    )
    options = {"scale": 0.6, "window": window, "softcap": softcap}
    assert_close(decode(batch, [0, 1], splits, **options), batch.expected(**options), torch.float32)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_padded_decode_row_yields_zeros_and_disturbs_no_other(splits):
    batch = make_batch([(200, 1), (-1, 1)], heads=2, kv_heads=2, dim=64, block_size=16, dtype=torch.float32)
    out = decode(batch, [0, 1], splits, scale=0.1)
    batch.num_tokens[1] = 0
    assert_close(out, batch.expected(scale=0.1), torch.float32)
    assert bool((out[1] == 0).all())


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size", "dtype", "kv_dtype"), SHAPES, ids=IDS)
def test_prefill_attends_to_its_chunk_and_the_cached_prefix(heads, kv_heads, dim, block_size, dtype, kv_dtype):
    rows = [(0, 21), (70, 9), (131, 1), (64, 40)]
    batch = make_batch(
        rows, heads=heads, kv_heads=kv_heads, dim=dim, block_size=block_size, dtype=dtype, kv_dtype=kv_dtype
    )
    assert_close(prefill(batch, [0, 1, 2, 3], scale=dim**-0.5), batch.expected(scale=dim**-0.5), dtype)


@pytest.mark.parametrize(("window", "softcap"), [(None, 20.0), (5, None), (50, 20.0)])
def test_prefill_keeps_to_its_window_and_caps_its_scores(window, softcap):
    batch = make_batch(
        [(0, 70), (100, 30)], heads=4, kv_heads=2, dim=64, block_size=16, dtype=torch.float32, kv_dtype="fp8"
    )
    options = {"scale": 0.6, "window": window, "softcap": softcap}
    assert_close(prefill(batch, [0, 1], **options), batch.expected(**options), torch.float32)


@pytest.mark.parametrize("seed", range(8))
def test_random_shapes_and_lengths(seed):
    rng = np.random.default_rng(seed)
    dtype = [torch.float32, torch.bfloat16, torch.float16][seed % 3]
    kv_heads, group = int(rng.integers(1, 4)), int(rng.integers(1, 9))
    shape = {
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "dim": int(rng.choice([64, 72, 80, 96, 112, 128, 160, 192, 256])),
        "block_size": int(rng.choice([16, 32, 48, 64, 128])),
        "kv_dtype": str(rng.choice(["", "int8", "fp8"])),
    }
    options = {"scale": float(rng.uniform(0.05, 0.2))}
    if rng.random() < 0.5:
        options["window"] = int(rng.integers(1, 100))
    rows = [(int(computed), int(count)) for computed, count in rng.integers([0, 1], [150, 30], (2, 2))]
    chunks = make_batch(rows, dtype=dtype, seed=seed, **shape)
    assert_close(prefill(chunks, [0, 1], **options), chunks.expected(**options), dtype)
    single = make_batch([(int(rng.integers(0, 400)), 1) for _ in range(2)], dtype=dtype, seed=seed, **shape)
    assert_close(decode(single, [0, 1], 2, **options), single.expected(**options), dtype)


def test_a_mixed_step_is_prefill_for_some_rows_and_decode_for_the_others():
    batch = make_batch(
        [(0, 12), (99, 1), (40, 20), (5, 1)], heads=4, kv_heads=2, dim=64, block_size=16, dtype=torch.float32
    )
    expected = batch.expected(scale=0.125)
    chunks, single = prefill(batch, [0, 2], scale=0.125), decode(batch, [1, 3], 2, scale=0.125)
    tokens = torch.tensor([12, 33])
    assert bool(chunks[tokens].isnan().all()), "a kernel wrote to rows that are not its own"
    out = chunks.index_copy(0, tokens.to(DEVICE), single[tokens])
    assert_close(out, expected, torch.float32)

"""What a step writes into the cache, token by token against the reference."""

import numpy as np
import pytest
import torch

from engine.kernels import reference
from engine.kernels.kv_write import slot_spans, write_kv, write_kv_quantized
from engine.kv_cache import KVCache
from tests.kernels.cases import DEVICE, LAYER, empty_cache, random


def write(cache: KVCache, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, layer: int) -> None:
    if cache.scales is None:
        write_kv(key, value, cache.data[:, layer], slots)
    else:
        spans = torch.from_numpy(slot_spans(slots.cpu().numpy(), cache.layout.block_size)).to(DEVICE)
        write_kv_quantized(key, value, cache.data[:, layer], cache.scales[:, layer], spans)


def assert_same(found: KVCache, expected: KVCache) -> None:
    """Every value and scale, those that nobody wrote included; only 0 and -0 are one."""
    for a, b in ((found.data, expected.data), (found.scales, expected.scales)):
        if a is not None and b is not None:
            torch.testing.assert_close(a.float(), b.float(), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("heads", "dim", "block_size", "dtype", "kv_dtype"),
    [
        (3, 64, 16, torch.bfloat16, "bfloat16"),
        (1, 80, 16, torch.float16, "float16"),
        (2, 256, 32, torch.float32, "float32"),
        (2, 64, 16, torch.bfloat16, "int8"),
        (1, 96, 128, torch.float32, "int8"),
        (3, 80, 16, torch.float32, "fp8"),
        (1, 256, 24, torch.bfloat16, "fp8"),
    ],
)
def test_chunks_and_then_single_tokens_are_stored_as_the_reference_stores_them(heads, dim, block_size, dtype, kv_dtype):
    rng = torch.Generator().manual_seed(1)
    cache, expected = (empty_cache(heads, dim, block_size, kv_dtype, 7) for _ in range(2))
    # Two sequences: one begins with a chunk over three blocks, one with a few tokens; both go on, ever louder.
    tables, lengths = ([5, 0, 3], [2, 6]), [0, 0]
    for loudness, counts in enumerate([(2 * block_size + 3, 5), (1, 1), (3, 1), (0, block_size), (1, 0)]):
        slots = [
            table[p // block_size] * block_size + p % block_size
            for table, length, count in zip(tables, lengths, counts, strict=True)
            for p in range(length, length + count)
        ]
        lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
        place = torch.tensor([*slots, -1], device=DEVICE)  # and a padded row, which goes nowhere
        key, value = (random((len(place), heads, dim), dtype, rng, views=2) * (1 + loudness) for _ in "kv")
        write(cache, key, value, place, LAYER)
        scales = None if expected.scales is None else expected.scales[:, LAYER]
        reference.write_kv(expected.data[:, LAYER], scales, key, value, place)
        assert_same(cache, expected)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_louder_token_rescales_what_its_record_already_holds(kv_dtype):
    cache = empty_cache(1, 64, 16, kv_dtype, 1)
    assert cache.scales is not None
    quiet, loud = torch.full((1, 1, 64), 1.0, device=DEVICE), torch.full((1, 1, 64), 8.0, device=DEVICE)
    write(cache, quiet, quiet, torch.tensor([0], device=DEVICE), 0)
    before = float(cache.scales[0, 0, 0, 0])
    write(cache, loud, quiet, torch.tensor([1], device=DEVICE), 0)
    values = reference.dequantize(cache.data[:, 0], cache.scales[:, 0])
    assert float(cache.scales[0, 0, 0, 0]) == pytest.approx(8 * before)
    assert values[0, 0, 0, 0, 0].item() == pytest.approx(1.0, abs=8 / 127 / 2)
    assert values[0, 0, 0, 1, 0].item() == pytest.approx(8.0)
    assert float(cache.scales[0, 0, 1, 0]) == before, "the values' record did not grow"


def test_zeros_are_stored_with_scale_zero():
    cache = empty_cache(1, 64, 16, "int8", 1)
    zeros = torch.zeros((2, 1, 64), device=DEVICE)
    write(cache, zeros, zeros, torch.tensor([0, 1], device=DEVICE), 0)
    assert not bool(cache.data[:, 0].any())
    assert cache.scales is not None and not bool(cache.scales[:, 0].any())


def test_spans_break_at_blocks_at_padding_and_between_sequences():
    spans = slot_spans(np.array([6, 7, 8, -1, 9, 20, 21]), 4)
    assert spans.tolist() == [[1, 2, 2, 0], [2, 0, 1, 2], [2, 1, 1, 4], [5, 0, 2, 5]]
    assert slot_spans(np.array([-1, -1]), 4).shape == (0, 4)

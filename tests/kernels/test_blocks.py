"""Blocks on their way to another worker."""

import pytest
import torch

from engine.core.kv_layout import KVLayout
from engine.kernels import reference
from engine.kernels.blocks import copy_blocks, gather_blocks, quantize_blocks, records_of, scatter_blocks
from engine.kv_cache import KVCache
from tests.kernels.cases import DEVICE


def filled(layout: KVLayout, num_blocks: int) -> KVCache:
    rng = torch.Generator().manual_seed(3)
    memory = torch.randint(0, 256, (num_blocks * layout.block_bytes,), generator=rng, dtype=torch.uint8)
    return KVCache(layout, memory.to(DEVICE))


@pytest.mark.parametrize(
    "layout",
    [
        KVLayout(3, 4, 64, 16, "bfloat16"),
        KVLayout(2, 4, 80, 16, "int8"),
        KVLayout(2, 4, 128, 128, "fp8"),
        KVLayout(1, 4, 3, 5, "float16"),  # records of no whole number of words
    ],
)
@pytest.mark.parametrize(("layers", "heads"), [(slice(None), slice(None)), (slice(0, 1), slice(1, 3))])
def test_chosen_blocks_travel_through_a_staging_buffer_and_nothing_else_changes(layout, layers, heads):
    sender, receiver = (
        filled(layout, 9),
        KVCache(layout, torch.zeros(7 * layout.block_bytes, dtype=torch.uint8, device=DEVICE)),
    )
    source, target = records_of(sender)[:, layers, :, heads], records_of(receiver)[:, layers, :, heads]
    chosen, places = torch.tensor([7, 0, 4], device=DEVICE), torch.tensor([1, 6, 2], device=DEVICE)
    staging = torch.empty((3, *source.shape[1:]), dtype=torch.uint8, device=DEVICE)
    gather_blocks(source, chosen, staging)
    assert torch.equal(staging, source[chosen])
    expected = records_of(receiver).clone()
    expected[:, layers, :, heads][places] = staging
    scatter_blocks(staging, target, places)
    assert torch.equal(records_of(receiver), expected)


def test_copied_blocks_are_whole():
    cache = filled(KVLayout(2, 2, 64, 16, "int8"), 6)
    expected = cache.bytes.clone()
    expected[torch.tensor([1, 3])] = expected[torch.tensor([0, 5])]
    copy_blocks(records_of(cache), torch.tensor([0, 5], device=DEVICE), torch.tensor([1, 3], device=DEVICE))
    assert torch.equal(cache.bytes, expected)


def test_records_that_do_not_match_are_refused():
    small, large = (
        records_of(filled(KVLayout(1, 1, 64, 16, "int8"), 1)),
        records_of(filled(KVLayout(1, 2, 64, 16, "int8"), 1)),
    )
    with pytest.raises(ValueError, match="do not match"):
        scatter_blocks(small, large, torch.tensor([0], device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_blocks_quantised_on_the_way_are_what_the_reference_makes_of_them(dtype, kv_dtype):
    rng = torch.Generator().manual_seed(5)
    source = torch.randn((5, 2, 2, 4, 16, 80), generator=rng).to(DEVICE, dtype)
    source[2, :, :, :, 9:] = float("nan")  # behind the sequence's end: a former owner's
    layout = KVLayout(2, 2, 80, 16, kv_dtype)
    found, expected = (
        KVCache(layout, torch.zeros(2 * layout.block_bytes, dtype=torch.uint8, device=DEVICE)) for _ in "ab"
    )
    blocks, counts = torch.tensor([4, 2], device=DEVICE), torch.tensor([16, 9], dtype=torch.int32, device=DEVICE)
    heads = source[:, :, :, 1:3]
    quantize_blocks(heads, blocks, counts, found.data, found.scales)
    reference.quantize_blocks(heads, blocks, counts, expected.data, expected.scales)
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.data.float(), expected.data.float())
    half = 0.5 if kv_dtype == "int8" else 16  # of the step between stored numbers, next to the largest
    error = (reference.dequantize(found.data, found.scales)[0] - heads[4].double()).abs()
    assert bool((error <= half * 1.001 * found.scales[0, ..., None, None]).all())

"""Every kernel against its reference: attention and what is computed in fp64, what is stored bit by bit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from engine.core.kv_layout import KVLayout
from engine.kernels import reference
from engine.kernels.activation import silu_mul
from engine.kernels.blocks import gather_blocks, quantize_blocks, records_of, scatter_blocks
from engine.kernels.decode_attention import decode_attention
from engine.kernels.kv_write import slot_spans, write_kv, write_kv_quantized
from engine.kernels.norm import add_rms_norm, rms_norm
from engine.kernels.prefill_attention import prefill_attention, query_tiles, tokens_of_tile
from engine.kernels.rope import rope_
from engine.kernels.sampling import sample
from engine.kv_cache import KVCache

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of results whose size is about one. fp32 products are exact here (no TF32)."""


@dataclass(frozen=True)
class Check:
    """``error`` is the largest difference from the reference; of what must be equal, the share that is not."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int
    block_size: int
    dtype: torch.dtype
    kv_dtype: str
    window: int | None = None
    softcap: float | None = None

    @property
    def name(self) -> str:
        extras = [f"window {self.window}"] if self.window else []
        extras += [f"cap {self.softcap:g}"] if self.softcap else []
        dtype = str(self.dtype).removeprefix("torch.")
        heads = f"{self.heads}/{self.kv_heads} heads of {self.dim}"
        return ", ".join([f"{dtype} over {self.kv_dtype}", heads, f"blocks of {self.block_size}", *extras])


SHAPES = [
    Shape(32, 8, 128, 16, torch.bfloat16, "bfloat16"),
    Shape(32, 8, 128, 16, torch.bfloat16, "int8"),
    Shape(64, 8, 128, 32, torch.float16, "fp8"),
    Shape(16, 8, 256, 64, torch.bfloat16, "bfloat16", window=50, softcap=50.0),
    Shape(12, 12, 80, 16, torch.float16, "float16"),
    Shape(6, 1, 96, 128, torch.float32, "float32", window=17),
    Shape(9, 3, 64, 16, torch.float32, "int8"),
]
TINY_SHAPES = [
    Shape(4, 2, 64, 16, torch.bfloat16, "bfloat16"),
    Shape(3, 1, 80, 16, torch.float32, "fp8", window=9),
    Shape(2, 2, 64, 32, torch.float16, "int8", softcap=20.0),
]


def all_checks(device: torch.device, tiny: bool) -> Iterator[Check]:
    """``tiny``: of sizes for Triton's interpreter."""
    generator = torch.Generator().manual_seed(0)
    # Each (tokens computed before, tokens of the step).
    chunks = [(0, 20), (33, 7)] if tiny else [(0, 700), (4096, 300), (130, 1), (15, 513)]
    singles = [(0, 1), (140, 1)] if tiny else [(0, 1), (16, 1), (4095, 1), (1000, 1), (130, 1)]
    for shape in TINY_SHAPES if tiny else SHAPES:
        for splits in (1, 2) if tiny else (1, 8, 32):
            yield _attention(shape, singles, splits, device, generator)
        yield _attention(shape, chunks, 0, device, generator)
        yield _kv_write(shape, device, generator)
        if shape.kv_dtype in ("int8", "fp8"):
            yield _quantized_blocks(shape, device, generator)
    yield _moved_blocks(device, generator)
    for dtype in (torch.float32, torch.bfloat16):
        yield from _fused(dtype, device, generator, tiny)
    yield _sampling(device, 500 if tiny else 128_256, 3 if tiny else 16)


def make_cache(layout: KVLayout, num_blocks: int, device: torch.device) -> KVCache:
    """A cache of random values; of a quantised dtype also of random scales."""
    cache = KVCache(layout, torch.zeros(num_blocks * layout.block_bytes, dtype=torch.uint8, device=device))
    for block in range(0, num_blocks, 64):  # by parts: random numbers take more room than what is stored
        part = cache.data[block : block + 64]
        values = torch.randn(part.shape, device=device)
        part.copy_((values * 40).round().clamp(-127, 127) if layout.quantized else values)
        if cache.scales is not None:
            scales = cache.scales[block : block + 64]
            scales.copy_(torch.rand(scales.shape, device=device) / 40)
    return cache


def _tables(rows: list[tuple[int, int]], block_size: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """A block table for each row, of scattered blocks, and how many blocks there are."""
    counts = [-(-(computed + count) // block_size) for computed, count in rows]
    order = torch.randperm(sum(counts), generator=generator).tolist()
    tables = torch.zeros((len(rows), max(counts)), dtype=torch.int32)
    for row, count in enumerate(counts):
        tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])
    return tables, sum(counts)


def _attention(
    shape: Shape, rows: list[tuple[int, int]], splits: int, device: torch.device, generator: torch.Generator
) -> Check:
    """Decode with ``splits``, or prefill where that is 0."""
    tables, num_blocks = _tables(rows, shape.block_size, generator)
    cache = make_cache(KVLayout(2, shape.kv_heads, shape.dim, shape.block_size, shape.kv_dtype), num_blocks, device)
    data, scales = cache.data[:, 1], None if cache.scales is None else cache.scales[:, 1]
    computed, counts = (torch.tensor(column, dtype=torch.int32) for column in zip(*rows, strict=True))
    starts = torch.cat((torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)))
    query = torch.randn((int(starts[-1]), shape.heads, shape.dim), generator=generator).to(device, shape.dtype)
    out = torch.full((len(query), shape.heads * shape.dim), float("nan"), dtype=shape.dtype, device=device)
    options = {"scale": shape.dim**-0.5, "window": shape.window, "softcap": shape.softcap}
    there = [tensor.to(device) for tensor in (tables, starts, computed, computed + counts)]
    if splits:
        decode_attention(query, data, scales, there[0], there[1][:-1], there[3], out, splits=splits, **options)
    else:
        tokens = tokens_of_tile(shape.heads // shape.kv_heads, shape.dtype, shape.dim)
        tiles = torch.from_numpy(query_tiles(counts.numpy(), np.arange(len(rows)), tokens)).to(device)
        prefill_attention(query, data, scales, there[0], tiles, there[1], there[2], out, **options)
    expected = reference.paged_attention(query, data, scales, there[0], counts.to(device), there[2], **options)
    kind = f"decode attention, {splits} splits" if splits else "prefill attention"
    return Check(f"{kind}: {shape.name}", _difference(out, expected), TOLERANCE[shape.dtype])


def _kv_write(shape: Shape, device: torch.device, generator: torch.Generator) -> Check:
    """A chunk over several blocks, and then single tokens, each louder than the last."""
    size = shape.block_size
    layout = KVLayout(1, shape.kv_heads, shape.dim, size, shape.kv_dtype)
    memory = torch.full((4 * layout.block_bytes,), 0xFF, dtype=torch.uint8, device=device)
    cache, expected = KVCache(layout, memory), KVCache(layout, memory.clone())
    table, length = [2, 0, 3], 0
    for loudness, count in enumerate([2 * size + 3, 1, 1], 1):
        places = np.array([table[p // size] * size + p % size for p in range(length, length + count)])
        length += count
        key, value = (
            (torch.randn((count, shape.kv_heads, shape.dim), generator=generator) * loudness).to(device, shape.dtype)
            for _ in "kv"
        )
        slots = torch.from_numpy(places).to(device)
        if cache.scales is None:
            write_kv(key, value, cache.data[:, 0], slots)
        else:
            spans = torch.from_numpy(slot_spans(places, size)).to(device)
            write_kv_quantized(key, value, cache.data[:, 0], cache.scales[:, 0], spans)
        scales = None if expected.scales is None else expected.scales[:, 0]
        reference.write_kv(expected.data[:, 0], scales, key, value, slots)
    return Check(f"KV write: {shape.name}", _unequal(cache, expected), 0.0)


def _quantized_blocks(shape: Shape, device: torch.device, generator: torch.Generator) -> Check:
    source = torch.randn((6, 2, 2, shape.kv_heads, shape.block_size, shape.dim), generator=generator)
    source = source.to(device, shape.dtype)
    layout = KVLayout(2, shape.kv_heads, shape.dim, shape.block_size, shape.kv_dtype)
    found, expected = (
        KVCache(layout, torch.zeros(3 * layout.block_bytes, dtype=torch.uint8, device=device)) for _ in "ab"
    )
    blocks = torch.tensor([5, 0, 2], device=device)
    counts = torch.tensor([shape.block_size, 1, shape.block_size - 3], dtype=torch.int32, device=device)
    assert found.scales is not None and expected.scales is not None
    quantize_blocks(source, blocks, counts, found.data, found.scales)
    reference.quantize_blocks(source, blocks, counts, expected.data, expected.scales)
    return Check(f"blocks quantised on the way: {shape.name}", _unequal(found, expected), 0.0)


def _moved_blocks(device: torch.device, generator: torch.Generator) -> Check:
    layout = KVLayout(2, 4, 64, 16, "int8")
    memory = torch.randint(0, 256, (9 * layout.block_bytes,), generator=generator, dtype=torch.uint8).to(device)
    records = records_of(KVCache(layout, memory))[:, :, :, 1:3]
    target = records_of(KVCache(layout, torch.zeros_like(memory)))[:, :, :, 1:3]
    chosen, places = torch.tensor([8, 3, 0], device=device), torch.tensor([1, 7, 4], device=device)
    staging = torch.empty((3, *records.shape[1:]), dtype=torch.uint8, device=device)
    gather_blocks(records, chosen, staging)
    scatter_blocks(staging, target, places)
    return Check("blocks gathered and scattered", float((target[places] != records[chosen]).double().mean()), 0.0)


def _fused(dtype: torch.dtype, device: torch.device, generator: torch.Generator, tiny: bool) -> Iterator[Check]:
    tokens, width = (3, 192) if tiny else (257, 4096)
    name, tolerance = str(dtype).removeprefix("torch."), TOLERANCE[dtype]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, residual, weight = random(tokens, width), random(tokens, width), random(width).float()
    expected = reference.rms_norm(x, weight, 1e-5)
    # Of values that may be several times one: relative to them.
    yield Check(f"RMSNorm, {name}", _difference(rms_norm(x, weight, 1e-5), expected, relative=True), tolerance)
    kept = residual.clone()
    expected = reference.add_rms_norm(x, kept, weight, 1e-5)
    found = add_rms_norm(x, residual, weight, 1e-5)
    error = max(_difference(found, expected, relative=True), _difference(residual, kept, relative=True))
    yield Check(f"RMSNorm of a sum, {name}", error, tolerance)
    qkv, angles = random(tokens, 12, 64), torch.rand((99, 32), generator=generator).to(device) * 6
    positions = torch.arange(tokens, device=device) % 99
    rotated = reference.rope(qkv[:, :10], angles.cos(), angles.sin(), positions)
    rope_(qkv, positions, angles.cos(), angles.sin(), 8, 2)
    yield Check(f"RoPE, {name}", _difference(qkv[:, :10], rotated, relative=True), tolerance)
    gate_up = random(tokens, 2 * width)
    error = _difference(silu_mul(gate_up), reference.silu_mul(gate_up), relative=True)
    yield Check(f"SiLU-mul, {name}", error, tolerance)


def _sampling(device: torch.device, vocab: int, rows: int) -> Check:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(rows, vocab)).astype(np.float32) * 3).to(device)
    settings = [(0.0, 0, 1.0, 0.0), (0.8, 50, 0.9, 0.0), (1.0, 0, 0.95, 0.0), (1.2, 0, 1.0, 0.05), (1.0, 7, 1.0, 0.0)]
    chosen = [settings[row % len(settings)] for row in range(rows)]
    numbers = rng.random(rows)
    columns = [torch.tensor(column) for column in zip(*chosen, strict=True)]
    dtypes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        torch.Tensor.float, torch.Tensor.int, torch.Tensor.double, torch.Tensor.float,
    ]  # fmt: skip
    there = [convert(column).to(device) for convert, column in zip(dtypes, columns, strict=True)]
    found = sample(logits, torch.from_numpy(numbers).to(device), *there).tolist()
    expected = [
        reference.sample_row(row, number, *setting)
        for row, number, setting in zip(logits.cpu(), numbers.tolist(), chosen, strict=True)
    ]
    wrong = sum(a != b for a, b in zip(found, expected, strict=True))
    return Check(f"sampling, {rows} rows of {vocab}", wrong / rows, 0.0)


def _difference(found: torch.Tensor, expected: torch.Tensor, relative: bool = False) -> float:
    difference = (found.double() - expected.double()).abs()
    return float((difference / expected.double().abs().clamp(min=1.0) if relative else difference).max())


def _unequal(found: KVCache, expected: KVCache) -> float:
    """Share of the values and scales that are not equal; 0 is -0, and what is not a number is itself."""
    pairs = [(found.data, expected.data)]
    if found.scales is not None and expected.scales is not None:
        pairs.append((found.scales, expected.scales))
    return max(
        float((a.float().nan_to_num(nan=1e30) != b.float().nan_to_num(nan=1e30)).double().mean()) for a, b in pairs
    )

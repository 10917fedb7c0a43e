"""Each kernel's time on the shapes of Llama 3.1 8B, with the bytes it must move or the operations it must make."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gpu_checks import make_cache
from engine.core.kv_layout import KVLayout
from engine.kernels.activation import silu_mul
from engine.kernels.blocks import gather_blocks, quantize_blocks, records_of
from engine.kernels.decode_attention import decode_attention, num_splits
from engine.kernels.kv_write import slot_spans, write_kv, write_kv_quantized
from engine.kernels.norm import add_rms_norm
from engine.kernels.prefill_attention import prefill_attention, query_tiles, tokens_of_tile
from engine.kernels.rope import rope_
from engine.kernels.sampling import sample
from engine.kv_cache import KVCache

Seconds = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Rate:
    name: str
    seconds: float
    bytes: float = 0
    flops: float = 0


@dataclass(frozen=True)
class Sizes:
    """Of one layer. Large enough that no cache of the card holds what is read, but for batch 1."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    hidden: int = 4096
    inner: int = 14_336
    vocab: int = 128_256
    batches: tuple[int, ...] = (1, 16, 64)
    context: int = 8192
    prompt: int = 8192
    blocks: int = 512
    layers: int = 32
    """Of the blocks that are gathered."""


def kernel_rates(device: torch.device, seconds: Seconds, sizes: Sizes | None = None) -> Iterator[Rate]:
    sizes = sizes or Sizes()
    for kv_dtype in ("bfloat16", "int8", "fp8"):
        for batch in sizes.batches:
            yield _decode(device, seconds, sizes, kv_dtype, batch)
        yield _prefill(device, seconds, sizes, kv_dtype)
        yield _write(device, seconds, sizes, kv_dtype)
    yield from _blocks(device, seconds, sizes)
    yield from _fused(device, seconds, sizes)
    yield from _sampling(device, seconds, sizes)


def _layer(device: torch.device, sizes: Sizes, kv_dtype: str, tokens: int) -> KVCache:
    layout = KVLayout(1, sizes.kv_heads, sizes.dim, 16, kv_dtype)
    return make_cache(layout, layout.blocks_for(tokens), device)


def _scales(cache: KVCache) -> torch.Tensor | None:
    return None if cache.scales is None else cache.scales[:, 0]


def _ints(values: object, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=device)


def _decode(device: torch.device, seconds: Seconds, sizes: Sizes, kv_dtype: str, batch: int) -> Rate:
    cache = _layer(device, sizes, kv_dtype, batch * sizes.context)
    query = torch.randn((batch, sizes.heads, sizes.dim), device=device, dtype=torch.bfloat16)
    out = torch.empty((batch, sizes.heads * sizes.dim), device=device, dtype=torch.bfloat16)
    tables = _ints(np.random.default_rng(0).permutation(cache.num_blocks).reshape(batch, -1), device)
    rows, lengths = _ints(np.arange(batch), device), _ints([sizes.context] * batch, device)
    splits = num_splits(batch, sizes.kv_heads, sizes.context)
    taken = seconds(
        lambda: decode_attention(
            query, cache.data[:, 0], _scales(cache), tables, rows, lengths, out, scale=sizes.dim**-0.5, splits=splits
        )
    )
    read = cache.layout.block_bytes * cache.num_blocks
    return Rate(f"decode attention, batch {batch}, context {sizes.context}, {kv_dtype}", taken, bytes=read)


def _prefill(device: torch.device, seconds: Seconds, sizes: Sizes, kv_dtype: str) -> Rate:
    cache = _layer(device, sizes, kv_dtype, sizes.prompt)
    query = torch.randn((sizes.prompt, sizes.heads, sizes.dim), device=device, dtype=torch.bfloat16)
    out = torch.empty((sizes.prompt, sizes.heads * sizes.dim), device=device, dtype=torch.bfloat16)
    tokens = tokens_of_tile(sizes.heads // sizes.kv_heads, query.dtype, sizes.dim)
    tiles = _ints(query_tiles(np.array([sizes.prompt], np.int32), np.arange(1), tokens), device)
    tables = _ints(np.arange(cache.num_blocks)[None], device)
    starts, computed = _ints([0, sizes.prompt], device), _ints([0], device)
    taken = seconds(
        lambda: prefill_attention(
            query, cache.data[:, 0], _scales(cache), tables, tiles, starts, computed, out, scale=sizes.dim**-0.5
        )
    )
    flops = 2 * sizes.heads * sizes.dim * sizes.prompt**2
    return Rate(f"prefill attention, prompt of {sizes.prompt}, {kv_dtype}", taken, flops=flops)


def _write(device: torch.device, seconds: Seconds, sizes: Sizes, kv_dtype: str) -> Rate:
    cache = _layer(device, sizes, kv_dtype, sizes.prompt)
    key, value = (
        torch.randn((sizes.prompt, sizes.kv_heads, sizes.dim), device=device, dtype=torch.bfloat16) for _ in "kv"
    )
    slots = np.arange(sizes.prompt)
    if cache.scales is None:
        places = _ints(slots, device)
        taken = seconds(lambda: write_kv(key, value, cache.data[:, 0], places))
    else:
        scales, spans = cache.scales[:, 0], torch.from_numpy(slot_spans(slots, 16)).to(device)
        taken = seconds(lambda: write_kv_quantized(key, value, cache.data[:, 0], scales, spans))
    moved = 2 * key.numel() * (key.element_size() + cache.layout.item_bytes)
    return Rate(f"KV write, {sizes.prompt} tokens, {kv_dtype}", taken, bytes=moved)


def _blocks(device: torch.device, seconds: Seconds, sizes: Sizes) -> Iterator[Rate]:
    layout = KVLayout(sizes.layers, sizes.kv_heads, sizes.dim, 16, "bfloat16")
    cache = make_cache(layout, sizes.blocks, device)
    chosen = torch.from_numpy(np.random.default_rng(0).permutation(sizes.blocks)).to(device)
    records = records_of(cache)
    half = records[:, :, :, : max(sizes.kv_heads // 2, 1)]
    for name, part in (("whole blocks", records), ("half of the heads", half)):
        staging = torch.empty((sizes.blocks, *part.shape[1:]), dtype=torch.uint8, device=device)
        taken = seconds(lambda part=part, staging=staging: gather_blocks(part, chosen, staging))
        yield Rate(f"gather of {sizes.blocks} blocks, {name}", taken, bytes=2 * staging.numel())
    smaller = KVLayout(sizes.layers, sizes.kv_heads, sizes.dim, 16, "int8")
    target = KVCache(smaller, torch.empty(sizes.blocks * smaller.block_bytes, dtype=torch.uint8, device=device))
    counts = _ints([16] * sizes.blocks, device)
    assert target.scales is not None
    scales = target.scales
    taken = seconds(lambda: quantize_blocks(cache.data, chosen, counts, target.data, scales))
    moved = sizes.blocks * (layout.block_bytes + smaller.block_bytes)
    yield Rate(f"gather of {sizes.blocks} blocks, bfloat16 to int8", taken, bytes=moved)


def _fused(device: torch.device, seconds: Seconds, sizes: Sizes) -> Iterator[Rate]:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    tokens = sizes.prompt
    x, residual, weight = random(tokens, sizes.hidden), random(tokens, sizes.hidden), random(sizes.hidden).float()
    taken = seconds(lambda: add_rms_norm(x, residual, weight, 1e-5))
    yield Rate(f"RMSNorm of a sum, {tokens} tokens", taken, bytes=4 * x.numel() * 2)
    both = sizes.heads + sizes.kv_heads
    qkv, table = random(tokens, both + sizes.kv_heads, sizes.dim), random(tokens, sizes.dim // 2)
    positions = _ints(np.arange(tokens), device)
    taken = seconds(lambda: rope_(qkv, positions, table, table, sizes.heads, sizes.kv_heads))
    yield Rate(f"RoPE, {tokens} tokens", taken, bytes=2 * tokens * both * sizes.dim * 2)
    gate_up = random(tokens, 2 * sizes.inner)
    taken = seconds(lambda: silu_mul(gate_up))
    yield Rate(f"SiLU-mul, {tokens} tokens", taken, bytes=3 * tokens * sizes.inner * 2)


def _sampling(device: torch.device, seconds: Seconds, sizes: Sizes) -> Iterator[Rate]:
    """Of the largest batch. The bytes are those of reading the logits once, which a draw does several times."""
    rows = sizes.batches[-1]
    logits = torch.randn((rows, sizes.vocab), device=device) * 3
    numbers = torch.rand(rows, dtype=torch.float64, device=device)
    kinds = [
        ("greedy", 0.0, 0, 1.0), ("drawn from all", 1.0, 0, 1.0), ("top-p 0.9", 1.0, 0, 0.9),
        ("top-k 50", 1.0, 50, 1.0),
    ]  # fmt: skip
    for name, temperature, top_k, top_p in kinds:
        settings = [
            torch.full((rows,), temperature, device=device),
            torch.full((rows,), top_k, dtype=torch.int32, device=device),
            torch.full((rows,), top_p, dtype=torch.float64, device=device),
            torch.zeros(rows, device=device),
        ]
        taken = seconds(lambda settings=settings: sample(logits, numbers, *settings))
        yield Rate(f"sampling, {rows} rows, {name}", taken, bytes=logits.numel() * 4)

"""Random cases for the kernels: on the GPU where there is one, else small enough for the interpreter."""

from dataclasses import dataclass

import numpy as np
import torch

from engine.core.kv_layout import KVLayout
from engine.kernels import reference
from engine.kv_cache import KVCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LAYER = 1
"""Of two, so that a kernel that ignores where a layer begins is found out."""


@dataclass
class Batch:
    """Rows of a step over a cache that already holds all their tokens' keys and values."""

    query: torch.Tensor
    cache: KVCache
    tables: torch.Tensor
    num_tokens: torch.Tensor
    num_computed: torch.Tensor

    @property
    def data(self) -> torch.Tensor:
        return self.cache.data[:, LAYER]

    @property
    def scales(self) -> torch.Tensor | None:
        return None if self.cache.scales is None else self.cache.scales[:, LAYER]

    @property
    def starts(self) -> torch.Tensor:
        return torch.cat((torch.zeros(1), self.num_tokens.cpu().cumsum(0))).to(DEVICE, torch.int32)

    def expected(self, **options: float | int | None) -> torch.Tensor:
        return reference.paged_attention(
            self.query, self.data, self.scales, self.tables, self.num_tokens, self.num_computed, **options
        )


def empty_cache(kv_heads: int, dim: int, block_size: int, dtype: str, num_blocks: int) -> KVCache:
    layout = KVLayout(2, kv_heads, dim, block_size, dtype)
    # What is in a block that nobody has written must not matter: 0xff is NaN in fp8 and in the float dtypes.
    return KVCache(layout, torch.full((num_blocks * layout.block_bytes,), 0xFF, dtype=torch.uint8, device=DEVICE))


def make_batch(
    rows: list[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    kv_dtype: str = "",
    seed: int = 0,
) -> Batch:
    """``rows`` of (tokens computed before, tokens of the step), in blocks scattered over the cache."""
    rng = torch.Generator().manual_seed(seed)
    lengths = [computed + count for computed, count in rows]
    counts = [-(-length // block_size) for length in lengths]
    cache = empty_cache(kv_heads, dim, block_size, kv_dtype or str(dtype).removeprefix("torch."), sum(counts) + 1)
    order = torch.randperm(sum(counts) + 1, generator=rng).tolist()
    tables = np.zeros((len(rows), max(counts)), np.int32)
    batch = Batch(
        query=random((sum(count for _, count in rows), heads, dim), dtype, rng, views=3),
        cache=cache,
        tables=torch.empty(0),
        num_tokens=ints([count for _, count in rows]),
        num_computed=ints([computed for computed, _ in rows]),
    )
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        blocks = [order.pop() for _ in range(count)]
        tables[row, :count] = blocks
        tables[row, count:] = blocks[0] if blocks else 0
        slots = torch.tensor([blocks[p // block_size] * block_size + p % block_size for p in range(length)])
        for layer in range(2):
            key, value = (random((length, kv_heads, dim), dtype, rng) * (layer + 1) for _ in "kv")
            scales = None if cache.scales is None else cache.scales[:, layer]
            reference.write_kv(cache.data[:, layer], scales, key, value, slots.to(DEVICE))
    batch.tables = torch.from_numpy(tables).to(DEVICE)
    return batch


def random(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator, views: int = 1) -> torch.Tensor:
    """Normal numbers; with ``views``, a strided part of a tensor with that many times the heads."""
    whole = torch.randn((shape[0], shape[1] * views, *shape[2:]), generator=rng).to(DEVICE, dtype)
    return whole[:, shape[1] * (views - 1) :] if views > 1 else whole


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])

"""The CPU kernels equal their references, over random shapes: see ``engine.kernels.reference``."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from engine import ops
from engine.core.kv_layout import KVLayout
from engine.core.step_input import StepInput
from engine.cpu import elementwise, gemm, jit
from engine.cpu.attention import CpuAttention
from engine.kernels import reference
from engine.kv_cache import KVCache

pytestmark = pytest.mark.skipif(not jit.available, reason="torch does not compute with libgomp here")
QUANTIZED = ("int8", "fp8")
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Case:
    """A step over a cache with a history, in which what belongs to no sequence is not a number."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
        torch.manual_seed(seed)
        self.dtype: str = pick("float32", "bfloat16", "float16")
        stored = pick(self.dtype, self.dtype, *QUANTIZED)
        self.dim, heads, size = pick(16, 32, 64, 80, 96, 128, 256), pick(1, 2, 3), pick(1, 4, 16, 24, 32, 128)
        self.group = pick(1, 2, 3, 4, 5, 8, 9)
        self.window, self.softcap, self.scale = pick(None, None, 1, 20, 200), pick(None, None, 5.0), pick(None, 0.3)
        rows = int(rng.integers(1, 7))
        counts = rng.choice([1, 1, 1, 2, 7, 16, 17, 40, 130], rows).astype(np.int32)
        computed = rng.choice([0, 0, 5, 100, 127, 128, 300, 700], rows).astype(np.int32)
        needed = -(-(counts + computed) // size)
        blocks = rng.permutation(int(needed.sum()) + 3).astype(np.int32)
        tables = np.zeros((rows, int(needed.max()) + 1), np.int32)
        for row, end in enumerate(np.cumsum(needed)):
            tables[row] = blocks[end - needed[row]]
            tables[row, : needed[row]] = blocks[end - needed[row] : end]
        layout = KVLayout(2, heads, self.dim, size, stored)
        memory = torch.zeros(len(blocks) * layout.block_bytes, dtype=torch.uint8)
        self.cache = KVCache(layout, memory if layout.quantized else memory.fill_(0xFF))
        for row in range(rows):
            self._write(tables[row], np.arange(computed[row]))
        none = np.empty(0, np.int32)
        self.step = StepInput(np.zeros(counts.sum(), np.int32), counts, computed, tables, none, 0)
        kind, self.magnitude = getattr(torch, self.dtype), pick(1, 1, 3)
        qkv = torch.randn(int(counts.sum()), (self.group + 2) * heads, self.dim).mul_(self.magnitude).to(kind)
        self.qkv = torch.split(qkv, [self.group * heads, heads, heads], 1)

    def _slots(self, tables: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """``tables [blocks]`` of one sequence, or ``[blocks, tokens]`` with each token's own."""
        size = self.cache.layout.block_size
        places = (positions // size,) if tables.ndim == 1 else (positions // size, np.arange(len(positions)))
        return torch.from_numpy(tables[places].astype(np.int64) * size + positions % size)

    def _write(self, table: np.ndarray, positions: np.ndarray) -> None:
        shape, kind = (len(positions), self.cache.layout.num_kv_heads, self.dim), getattr(torch, self.dtype)
        if len(positions):
            data, scales = layer_of(self.cache)
            values = torch.randn(2, *shape).to(kind)
            reference.write_kv(data, scales, values[0], values[1], self._slots(table, positions))

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The cache's bytes and what attention gives, both by the reference."""
        cache = KVCache(self.cache.layout, self.cache.bytes.flatten().clone())
        data, scales = layer_of(cache)
        rows = np.repeat(np.arange(len(self.step.num_tokens)), self.step.num_tokens)
        slots = self._slots(self.step.block_tables[rows].T, self.step.positions)
        reference.write_kv(data, scales, self.qkv[1], self.qkv[2], slots)
        out = reference.paged_attention(
            self.qkv[0],
            data if scales is not None else torch.nan_to_num(data.float()),
            scales,
            *(torch.from_numpy(a) for a in (self.step.block_tables, self.step.num_tokens, self.step.num_computed)),
            scale=self.scale or self.dim**-0.5,
            window=self.window,
            softcap=self.softcap,
        )
        return cache.bytes, out


def layer_of(cache: KVCache) -> tuple[torch.Tensor, torch.Tensor | None]:
    return cache.data[:, 1], None if cache.scales is None else cache.scales[:, 1]


@pytest.mark.parametrize("seed", range(60))
def test_attention_writes_and_answers_what_the_reference_does(seed: int, threads: int) -> None:
    case = Case(seed)
    written, expected = case.expected()
    attend = CpuAttention(case.cache, case.qkv[0].shape[1], case.qkv[0].dtype).prepare(case.step)
    out = attend(1, *case.qkv, window=case.window, scale=case.scale, softcap=case.softcap)
    assert torch.equal(case.cache.bytes, written)
    bound = TOLERANCE[case.dtype]
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound * case.magnitude / 2)


@pytest.mark.parametrize(
    ("columns", "depth"), [(960, 576), (100, 50), (128, 64), (1000, 30), (64, 2)], ids=lambda x: str(x)
)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 16, 95, 96, 97, 130])
@pytest.mark.skipif(not gemm.can_pack(torch.empty(2, 2, dtype=torch.bfloat16)), reason="no bf16 products here")
def test_products_equal_those_in_fp64(columns: int, depth: int, rows: int, threads: int) -> None:
    torch.manual_seed(rows)
    weight, x = torch.randn(columns, depth).bfloat16(), torch.randn(rows, depth + 2).bfloat16()[:, :depth]
    bias, residual = torch.randn(columns), torch.randn(rows, columns).bfloat16()
    packed, exact = gemm.pack(weight), x.double() @ weight.double().T + bias.double()
    bounds = {"rtol": 1e-2, "atol": 2e-3 * depth**0.5}
    places = torch.randint(0, columns, (rows,))
    assert torch.equal(gemm.rows(packed, places), weight[places])
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    gemm.linear(x, packed, bias, out)
    torch.testing.assert_close(out.double(), exact, **bounds)
    alone = torch.empty(1, columns, dtype=torch.bfloat16)
    gemm.linear(x[-1:], packed, bias, alone)
    assert torch.equal(alone, out[-1:])  # a row's result depends on no other row
    total = residual.clone()
    gemm.linear(x, packed, bias, total, gemm.ADD)
    torch.testing.assert_close(total.double(), exact + residual.double(), **bounds)
    if columns % 128 == 0:
        gated = torch.empty(rows, columns // 2, dtype=torch.bfloat16)
        gemm.linear(x, packed, bias, gated, gemm.SILU_MUL)
        gate, up = exact.chunk(2, 1)
        torch.testing.assert_close(gated.double(), gate * torch.sigmoid(gate) * up, rtol=2e-2, atol=4e-3 * depth**0.5)


KINDS = pytest.mark.parametrize(
    ("kind", "bound"), [(torch.float32, 3e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)


@KINDS
@pytest.mark.parametrize(("tokens", "width"), [(1, 576), (7, 100), (130, 4096)])
def test_norms_equal_the_reference(kind: torch.dtype, bound: float, tokens: int, width: int, threads: int) -> None:
    torch.manual_seed(width)
    x, weight = torch.randn(tokens, width + 3).to(kind)[:, :width], torch.randn(width)
    assert elementwise.fits(x)
    torch.testing.assert_close(
        ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), rtol=bound, atol=bound
    )


@KINDS
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "q and k normed"])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "dim"), [(1, 9, 3, 64), (133, 4, 2, 128), (5, 2, 1, 80)])
def test_rotation_equals_the_reference(
    kind: torch.dtype, bound: float, normed: bool, tokens: int, heads: int, kv_heads: int, dim: int, threads: int
) -> None:
    torch.manual_seed(dim)
    rope = ops.Rope(1e4 ** -(torch.arange(0, dim, 2) / dim), 500, kind)
    positions, qkv = torch.randint(0, 500, (tokens,)), torch.randn(tokens, heads + 2 * kv_heads, dim).to(kind)
    norms = (torch.rand(dim) + 0.5, torch.rand(dim) + 0.5) if normed else None
    expected = qkv.double()
    if norms is not None:
        for part, weight in zip(expected.split([heads, kv_heads, kv_heads], 1)[:2], norms, strict=True):
            part.copy_(reference.rms_norm(part, weight, 1e-6))
    rotated = expected[:, : heads + kv_heads]
    rotated.copy_(reference.rope(rotated, rope.cos[:, : dim // 2], rope.sin[:, dim // 2 :], positions))
    rope.at(positions).apply_(qkv, heads, kv_heads, norms, 1e-6)
    torch.testing.assert_close(qkv.double(), expected, rtol=bound, atol=bound * 2)

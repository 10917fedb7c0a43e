"""The small kernels between the matrix products."""

import pytest
import torch

from engine.kernels import reference
from engine.kernels.activation import silu_mul
from engine.kernels.norm import add_rms_norm, rms_norm
from engine.kernels.rope import rope_
from tests.kernels.cases import DEVICE, assert_close, random

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 576, 1000])
def test_the_norm_is_that_of_the_sum_which_the_residual_keeps(dtype, width):
    rng = torch.Generator().manual_seed(width)
    x, residual = random((3, width), dtype, rng, views=2), random((3, width), dtype, rng)
    weight = torch.rand(width, generator=rng).to(DEVICE) + 0.5
    assert_close(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), dtype)
    kept = residual.clone()
    expected = reference.add_rms_norm(x, kept, weight, 1e-5)
    assert_close(add_rms_norm(x, residual, weight, 1e-5), expected, dtype)
    assert_close(residual, kept, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 1, 80), (8, 8, 256)])
@pytest.mark.parametrize("normed", [False, True])
def test_queries_and_keys_are_rotated_in_place_and_values_left_alone(dtype, heads, kv_heads, dim, normed):
    rng = torch.Generator().manual_seed(dim)
    qkv = random((5, heads + 2 * kv_heads, dim), dtype, rng)
    angles = torch.rand((40, dim // 2), generator=rng).to(DEVICE) * 6
    # As the model keeps them: the halves side by side, so that one half is a strided view.
    cos, sin = (torch.cat((table, table), 1)[:, : dim // 2] for table in (angles.cos(), angles.sin()))
    positions = torch.tensor([0, 39, 7, 7, 21], device=DEVICE)
    weights = tuple(torch.rand(dim, generator=rng).to(DEVICE) + 0.5 for _ in "qk") if normed else None
    expected = qkv.clone()
    both = expected[:, : heads + kv_heads]
    if weights is not None:
        each = torch.cat((weights[0].expand(heads, dim), weights[1].expand(kv_heads, dim)))
        both.copy_((both.double() * (both.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * each).to(dtype))
    both.copy_(reference.rope(both, cos, sin, positions))
    rope_(qkv, positions, cos, sin, heads, kv_heads, weights, 1e-6)
    assert_close(qkv, expected, dtype)
    assert torch.equal(qkv[:, heads + kv_heads :], expected[:, heads + kv_heads :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [64, 1500])
def test_the_gate_is_applied(dtype, inner):
    gate_up = random((3, 2 * inner), dtype, torch.Generator().manual_seed(inner)) * 3
    assert_close(silu_mul(gate_up), reference.silu_mul(gate_up), dtype)

"""Rotary position embedding of a step's queries and keys, in place; with Qwen 3's norm of each head before it."""

import torch
import triton
import triton.language as tl


@triton.jit
def rope_kernel(
    qkv, positions, cos, sin, q_weight, k_weight, eps, stride_token, stride_head, stride_cos, stride_sin,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    NORMED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64)
    heads, dims = tl.arange(0, HEADS_PAD)[:, None], tl.arange(0, HALF_PAD)[None, :]
    inside = dims < HALF
    held = (heads < HEADS + KV_HEADS) & inside
    at = qkv + token * stride_token + heads * stride_head + dims
    first = tl.load(at, mask=held, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=held, other=0.0).to(tl.float32)
    if NORMED:
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[:, None]
        is_query = heads < HEADS
        weight = tl.where(is_query, tl.load(q_weight + dims, mask=inside), tl.load(k_weight + dims, mask=inside))
        first = first * scale * weight.to(tl.float32)
        weight = tl.where(
            is_query, tl.load(q_weight + HALF + dims, mask=inside), tl.load(k_weight + HALF + dims, mask=inside)
        )
        second = second * scale * weight.to(tl.float32)
    c = tl.load(cos + position * stride_cos + dims, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + position * stride_sin + dims, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = qkv.dtype.element_ty
    tl.store(at, (first * c - second * s).to(dtype), mask=held)
    tl.store(at + HALF, (second * c + first * s).to(dtype), mask=held)


def rope_(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    kv_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate the queries and keys of ``qkv [tokens, heads + 2 * kv_heads, head_dim]`` in place, halves paired.

    ``positions [tokens]``; ``cos``, ``sin [positions, head_dim / 2]``, possibly strided. ``norms``: weights
    ``[head_dim]`` of the queries' and the keys' RMS norm, which then comes first.
    """
    half = qkv.shape[2] // 2
    q_weight, k_weight = norms if norms is not None else (cos, cos)
    heads_pad, half_pad = triton.next_power_of_2(heads + kv_heads), triton.next_power_of_2(half)
    rope_kernel[(len(qkv),)](
        qkv, positions, cos, sin, q_weight, k_weight, eps,
        qkv.stride(0), qkv.stride(1), cos.stride(0), sin.stride(0),
        HEADS=heads, KV_HEADS=kv_heads, HEADS_PAD=heads_pad, HALF=half, HALF_PAD=half_pad, NORMED=norms is not None,
        num_warps=min(max(heads_pad * half_pad // 512, 1), 8),
    )  # fmt: skip

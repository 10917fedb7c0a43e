"""A step's keys and values into the paged cache. ``reference.write_kv`` says what is stored.

Plain dtypes: one program a token. Quantised ones: one program a record (one head's K or V in one block), since a
record's tokens share a scale; the program reads the record's old values only where that scale grew.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from engine.kernels.common import divide, to_stored
from engine.kernels.reference import QUANTIZED_MAX

TOKENS = 16
"""Tokens of a record that a program holds at a time."""


@triton.jit
def write_kernel(
    key, value, data, slots,
    stride_key_token, stride_key_head, stride_value_token, stride_value_head, stride_block, stride_kv, stride_head,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    heads, dims = tl.arange(0, HEADS_PAD)[:, None], tl.arange(0, DIM_PAD)[None, :]
    held = (heads < HEADS) & (dims < DIM)
    to = data + slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * DIM + heads * stride_head + dims
    k = tl.load(key + token * stride_key_token + heads * stride_key_head + dims, mask=held)
    v = tl.load(value + token * stride_value_token + heads * stride_value_head + dims, mask=held)
    tl.store(to, k.to(data.dtype.element_ty), mask=held)
    tl.store(to + stride_kv, v.to(data.dtype.element_ty), mask=held)


@triton.jit
def _write_record(
    source, stride_token, record, scale_at, first, count,
    LARGEST: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """``count`` tokens of ``source`` into one record, from its token ``first`` on."""
    dtype: tl.constexpr = record.dtype.element_ty
    tokens, dims = tl.arange(0, TOKENS)[:, None], tl.arange(0, DIM_PAD)[None, :]
    largest = tl.zeros((TOKENS, DIM_PAD), tl.float32)
    for at in range(0, count, TOKENS):
        held = (at + tokens < count) & (dims < DIM)
        new = tl.load(source + (at + tokens) * stride_token + dims, mask=held, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(new))
    old = tl.load(scale_at)
    if first == 0:
        old = 0.0
    scale = tl.maximum(old, tl.div_rn(tl.max(tl.max(largest, 1), 0), LARGEST))
    if (scale > old) & (first > 0):
        ratio = tl.div_rn(old, scale)
        for at in range(0, first, TOKENS):
            held = (at + tokens < first) & (dims < DIM)
            place = record + (at + tokens) * DIM + dims
            stored = tl.load(place, mask=held, other=0.0).to(tl.float32)
            tl.store(place, to_stored(stored * ratio, dtype, LARGEST), mask=held)
    for at in range(0, count, TOKENS):
        held = (at + tokens < count) & (dims < DIM)
        new = tl.load(source + (at + tokens) * stride_token + dims, mask=held, other=0.0).to(tl.float32)
        tl.store(record + (first + at + tokens) * DIM + dims, to_stored(divide(new, scale), dtype, LARGEST), mask=held)
    if first == 0:
        for at in range(count, BLOCK_SIZE, TOKENS):
            held = (at + tokens < BLOCK_SIZE) & (dims < DIM)
            tl.store(record + (at + tokens) * DIM + dims, tl.zeros((TOKENS, DIM_PAD), tl.float32).to(dtype), mask=held)
    tl.store(scale_at, scale)


@triton.jit
def write_quantized_kernel(
    key, value, data, scales, spans,
    stride_key_token, stride_key_head, stride_value_token, stride_value_head, stride_block, stride_kv, stride_head,
    stride_scale_block, stride_scale_kv, stride_scale_head,
    LARGEST: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    span, head = tl.program_id(0), tl.program_id(1)
    block = tl.load(spans + 4 * span).to(tl.int64)
    first = tl.load(spans + 4 * span + 1)
    count = tl.load(spans + 4 * span + 2)
    token = tl.load(spans + 4 * span + 3).to(tl.int64)
    if count == 0:
        return
    record = data + block * stride_block + head * stride_head
    scale_at = scales + block * stride_scale_block + head * stride_scale_head
    _write_record(
        key + token * stride_key_token + head * stride_key_head, stride_key_token, record, scale_at, first, count,
        LARGEST, DIM, DIM_PAD, BLOCK_SIZE, TOKENS,
    )  # fmt: skip
    _write_record(
        value + token * stride_value_token + head * stride_value_head, stride_value_token, record + stride_kv,
        scale_at + stride_scale_kv, first, count, LARGEST, DIM, DIM_PAD, BLOCK_SIZE, TOKENS,
    )  # fmt: skip


def slot_spans(slots: NDArray[np.int64], block_size: int) -> NDArray[np.int32]:
    """``slots [tokens]`` -> ``[spans, 4]``: (block, its first token written, tokens written, first token of the step).

    A sequence's tokens follow each other in the step and in their block; no block is written by two sequences.
    """
    tokens = np.flatnonzero(slots >= 0)
    slots = slots[tokens]
    follows = (np.diff(slots) == 1) & (slots[1:] % block_size != 0) & (np.diff(tokens) == 1)
    begins = np.concatenate([[True], ~follows])[: len(slots)]
    first = np.flatnonzero(begins)
    counts = np.diff(np.append(first, len(slots)))
    spans = np.stack([slots[first] // block_size, slots[first] % block_size, counts, tokens[first]], axis=1)
    return np.ascontiguousarray(spans.astype(np.int32))


def write_kv(key: torch.Tensor, value: torch.Tensor, data: torch.Tensor, slots: torch.Tensor) -> None:
    """``key``, ``value [tokens, kv_heads, head_dim]`` into ``slots [tokens]`` (int64; below 0: nowhere) of one layer's
    ``data [block, k|v, kv_head, token, head_dim]``."""
    heads, block_size, dim = data.shape[2:]
    write_kernel[(len(slots),)](
        key, value, data, slots,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), data.stride(0), data.stride(1), data.stride(2),
        HEADS=heads, HEADS_PAD=triton.next_power_of_2(heads), DIM=dim, DIM_PAD=triton.next_power_of_2(dim),
        BLOCK_SIZE=block_size, num_warps=4,
    )  # fmt: skip


def write_kv_quantized(
    key: torch.Tensor, value: torch.Tensor, data: torch.Tensor, scales: torch.Tensor, spans: torch.Tensor
) -> None:
    """The same into a layer of a quantised cache; ``spans [spans, 4]`` as ``slot_spans`` makes them, int32, where a
    span of no tokens is skipped."""
    heads, block_size, dim = data.shape[2:]
    write_quantized_kernel[(len(spans), heads)](
        key, value, data, scales, spans,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), data.stride(0), data.stride(1), data.stride(2),
        scales.stride(0), scales.stride(1), scales.stride(2),
        LARGEST=QUANTIZED_MAX[data.dtype], DIM=dim, DIM_PAD=triton.next_power_of_2(dim), BLOCK_SIZE=block_size,
        TOKENS=TOKENS, num_warps=4,
    )  # fmt: skip

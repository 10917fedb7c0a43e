"""The step that both attention kernels are made of: a tile of queries meets a tile of one sequence's cached keys."""

import triton
import triton.language as tl

from engine.kernels.common import dot, from_stored, soft_cap

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_tile(
    q, positions, seen, last, acc, peak, mass,
    data, scales, table, factor, window, softcap,
    stride_block, stride_kv, stride_scale_block, stride_scale_kv,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    QUANTIZED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax (Milakov and Gimelshein 2018; Dao 2023), in base 2.

    ``q [rows, DIM_PAD]`` of queries at ``positions [rows]``; ``factor`` scales scores (in base 2 unless ``CAPPED``);
    ``seen [keys]`` positions in the sequence, below ``last``, of the KV head that ``data`` and ``scales`` point at.
    ``acc [rows, DIM_PAD]``, ``peak [rows]``, ``mass [rows]`` -> the same. Not ``MASKED``: every query sees every key.
    A key's scale is applied to its score and a value's to its weight: the records are only ever converted.
    """
    dims = tl.arange(0, DIM_PAD)
    inside = seen < last
    block = tl.load(table + seen // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    offsets = (block * stride_block + (seen % BLOCK_SIZE) * DIM)[:, None] + dims[None, :]
    loaded = inside[:, None] & (dims[None, :] < DIM)
    k = from_stored(tl.load(data + offsets, mask=loaded, other=0.0), q.dtype)
    scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], seen.shape[0]), tl.float32))
    if QUANTIZED:
        scale = tl.load(scales + block * stride_scale_block, mask=inside, other=0.0)
        scores = scores * (scale * factor)[None, :]
    else:
        scores = scores * factor
    if CAPPED:
        scores = soft_cap(scores, softcap) * LOG2_E
    if MASKED:
        visible = inside[None, :] & (seen[None, :] <= positions[:, None])
        if WINDOWED:
            visible = visible & (seen[None, :] > positions[:, None] - window)
        scores = tl.where(visible, scores, -float("inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    # A row that has seen nothing yet keeps -inf as its peak; -inf minus -inf is not a number.
    base = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    mass = mass * shrink + tl.sum(weights, 1)
    v = from_stored(tl.load(data + stride_kv + offsets, mask=loaded, other=0.0), q.dtype)
    if QUANTIZED:
        # Relative to the tile's largest, so that small scales do not make weights underflow in 16 bits.
        scale = tl.load(scales + stride_scale_kv + block * stride_scale_block, mask=inside, other=0.0)
        largest = tl.max(scale, 0)
        weights = weights * (scale / tl.where(largest > 0, largest, 1.0))[None, :]
        fresh = dot(weights.to(q.dtype), v, tl.zeros(acc.shape, tl.float32))
        acc = acc * shrink[:, None] + fresh * largest
    else:
        acc = dot(weights.to(q.dtype), v, acc * shrink[:, None])
    return acc, higher, mass

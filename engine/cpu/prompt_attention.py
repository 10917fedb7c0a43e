"""Attention of many queries of one sequence, as a prompt's chunk has them; called by ``engine.cpu.paged_attention``.

Keys and values of a sequence are first put, once for all its queries, into the order in which bf16 products take them:
64 keys as ``[dim / 2, 64, 2]``, 64 values as ``[32, dim, 2]``. Then a ticket is one (sequence, KV head, some queries):
up to 48 rows of queries, which share the KV head, pass over the keys that they may see, 128 at a time, with a running
softmax (Dao et al. 2022, FlashAttention). Products are bf16 with fp32 sums, as are weights that meet values.
"""

import numpy as np
from numba import njit

from engine.cpu.kv import BF16, narrow, widen
from engine.cpu.simd import (
    exp,
    exp_minus,
    f32_at,
    panel_product,
    scratch,
    soft_cap,
    store_bf16,
    u16_at,
    vector_max,
)

PANEL = 64
"""Tokens that are put in order together."""
KEYS = 2 * PANEL
"""Keys between two looks at the softmax."""
ROWS = 48
"""Most rows (queries times heads that share a KV head) of a ticket."""
MAX_DIM = 256

_INFINITY = np.float32(np.inf)
_product = panel_product((6,), (1, 2, 4))
_query_room = scratch(ROWS * MAX_DIM * 2)
_score_room = scratch(ROWS * KEYS * 4)
_weight_room = scratch(ROWS * KEYS * 2)
_sum_room = scratch(ROWS * (MAX_DIM + 2) * 4)
_pair_room = scratch(2 * MAX_DIM * 2 + MAX_DIM * 4)


@njit(fastmath={"contract"})
def _as_bf16(stored, place, dim, room, wide):
    """Address of ``dim`` stored values as bf16, without their scale: where they are, or in ``room``."""
    if stored == BF16:
        return place
    widen(stored, place, dim, np.float32(1.0), wide)
    narrow(BF16, wide, dim, room)
    return room


@njit(fastmath={"contract"})
def pack_tokens(stored, item_bytes, dim, keys, values, first, offset, count, key_panel, value_panel):
    """``count`` tokens from ``first`` on of two records go into the panels from place ``offset`` on. What is stored in
    8 bits is exact in bf16; scales stay apart, with the scores and the weights."""
    room = _pair_room()
    wide = room + 2 * MAX_DIM * 2
    to_keys, to_values = u16_at(key_panel), u16_at(value_panel)
    for i in range(count):
        token = offset + i
        key = u16_at(_as_bf16(stored, keys + (first + i) * dim * item_bytes, dim, room, wide))
        for d in range(0, dim, 2):
            to_keys[d * PANEL + token * 2] = key[d]
            to_keys[d * PANEL + token * 2 + 1] = key[d + 1]
        value = u16_at(_as_bf16(stored, values + (first + i) * dim * item_bytes, dim, room, wide))
        base = token // 2 * dim * 2 + token % 2
        for d in range(dim):
            to_values[base + 2 * d] = value[d]


@njit(fastmath={"contract"})
def clear_tokens(dim, offset, key_panel, value_panel):
    """Zero the places of the panels from ``offset`` on, which no token fills."""
    to_keys, to_values = u16_at(key_panel), u16_at(value_panel)
    for token in range(offset, PANEL):
        for d in range(0, dim, 2):
            to_keys[d * PANEL + token * 2] = np.uint16(0)
            to_keys[d * PANEL + token * 2 + 1] = np.uint16(0)
        for d in range(dim):
            to_values[token // 2 * dim * 2 + token % 2 + 2 * d] = np.uint16(0)


@njit(fastmath={"contract"})
def _multiply(rows, columns, x, x_stride, w, w_stride, pairs, out, out_stride, add):
    """``columns`` are a multiple of 16. Rows are taken by six; what is behind the last is room, and what it gets nobody
    reads."""
    for row in range(0, rows, 6):
        done = np.int64(0)
        while done < columns:
            left = columns - done
            vectors = 4 if left >= 64 else 2 if left >= 32 else 1
            to = out + row * out_stride + done * 4
            _product(48 + vectors, x + row * x_stride, x_stride, w + done * 4, w_stride, pairs, to, out_stride, add)
            done += 16 * vectors


@njit(fastmath={"contract"})
def shape_scores(scores, columns, first, last, scale, cap):
    """Products -> scores of the keys from ``first`` to ``last``; of others -inf. ``columns`` are a multiple of 16."""
    p = f32_at(scores)
    if cap > np.float32(0.0):
        soft_cap(scores, columns // 16, scale, cap)
    else:
        for i in range(columns):
            p[i] *= scale
    for i in range(first):
        p[i] = -_INFINITY
    for i in range(last, columns):
        p[i] = -_INFINITY


@njit(fastmath={"contract"})
def _weigh(scores, weights, sums, totals, dim, columns, first, last, scale, cap, key_scales, value_scales):
    """One row's scores of ``columns`` keys, of which ``first`` to ``last`` are seen -> weights in bf16; its sums so far
    and ``totals`` (largest score, sum of weights) follow the largest score."""
    p, total, out = f32_at(scores), f32_at(totals), f32_at(sums)
    if key_scales != 0:
        each = f32_at(key_scales)
        for i in range(columns):
            p[i] *= each[i]
    shape_scores(scores, columns, first, last, scale, cap)
    before = total[0]
    largest = vector_max(scores, columns // 16)
    largest = before if before > largest else largest
    if largest == -_INFINITY:
        largest = np.float32(0.0)
    seen = exp_minus(scores, columns // 16, largest)
    if value_scales != 0:
        each = f32_at(value_scales)
        for i in range(columns):
            p[i] *= each[i]
    store_bf16(scores, columns // 16, weights)
    if largest != before:
        fade = exp(before - largest)
        total[0] = largest
        total[1] *= fade
        for d in range(dim):
            out[d] *= fade
    total[1] += seen


@njit(fastmath={"contract"})
def attend(
    query, query_stride, tokens, group, dim, position, window, scale, cap,
    key_panels, value_panels, key_scales, value_scales, out, out_stride,
):  # fmt: skip
    """``tokens`` queries from ``position`` on, of ``group`` heads each (bf16), over a sequence's panels -> ``out``.
    Scales are one fp32 a token, or 0 where there are none."""
    rows = tokens * group
    x, scores, weights, sums = _query_room(), _score_room(), _weight_room(), _sum_room()
    totals = sums + ROWS * MAX_DIM * 4
    to, total, made = u16_at(x), f32_at(totals), f32_at(sums)
    for j in range(tokens):
        given = u16_at(query + j * query_stride)
        for i in range(group * dim):
            to[j * group * dim + i] = given[i]
    for row in range(rows):
        total[2 * row], total[2 * row + 1] = -_INFINITY, np.float32(0.0)
    for i in range(rows * dim):
        made[i] = np.float32(0.0)
    begin = np.int64(0)
    if window > 0:
        begin = max(np.int64(0), position - window + 1) // PANEL * PANEL
    end = position + tokens
    panel_bytes = PANEL * dim * 2
    while begin < end:
        columns = min(KEYS, (end - begin + PANEL - 1) // PANEL * PANEL)
        for part in range(columns // PANEL):
            keys = key_panels + (begin // PANEL + part) * panel_bytes
            _multiply(rows, PANEL, x, dim * 2, keys, PANEL * 4, dim // 2, scores + part * PANEL * 4, KEYS * 4, 0)
        for row in range(rows):
            at = position + row // group
            first = max(np.int64(0), at - window + 1 - begin) if window > 0 else np.int64(0)
            last = min(columns, at + 1 - begin)
            _weigh(
                scores + row * KEYS * 4, weights + row * KEYS * 2, sums + row * dim * 4, totals + row * 8, dim, columns,
                min(first, columns), max(last, np.int64(0)), scale, cap,
                key_scales + begin * 4 if key_scales != 0 else key_scales,
                value_scales + begin * 4 if value_scales != 0 else value_scales,
            )  # fmt: skip
        values = value_panels + begin // PANEL * panel_bytes
        _multiply(rows, dim, weights, KEYS * 2, values, dim * 4, columns // 2, sums, dim * 4, 1)
        begin += columns
    for row in range(rows):
        for d in range(dim):
            made[row * dim + d] /= total[2 * row + 1]
        narrow(BF16, sums + row * dim * 4, dim, out + row // group * out_stride + row % group * dim * 2)

"""Attention over a paged KV cache where it lies: nothing is gathered, and each sequence costs what its length costs.

One parallel region a layer:

1. The step's keys and values are written into their records.
2. A ticket is one (sequence, chunk of 128 tokens, KV head). Whoever draws it computes all scores of the chunk for the
   queries that share the KV head, their softmax within the chunk, and the weighted sum of the values.
3. What the chunks of a longer sequence came to is put together by their largest scores and sums (as in Flash-Decoding,
   Dao et al. 2023).

Chunks begin at multiples of 128 tokens, so the result of a sequence depends on neither its neighbours nor on threads.
Scores and sums are in fp32; ``engine.kernels.reference.paged_attention`` is what this must equal.
"""

import numpy as np
from numba import njit

from engine.cpu.jit import barrier, kernel, thread, threads
from engine.cpu.kv import BF16, F32, INT8, narrow, widen, write_record
from engine.cpu.simd import (
    address_of,
    as_float,
    exp,
    f32_at,
    i32_at,
    i64_at,
    scratch,
    take_ticket,
    token_scores,
    vector_max,
    vector_sum,
    weighted_sum,
)

CHUNK = 128
"""Tokens of a ticket."""
MAX_DIM = 256
QUERIES = 8
"""Queries that share a KV head and are taken together."""
TILE = 16
"""Tokens whose scores are made at once."""

ARGUMENTS = [
    "query", "query_stride", "key", "key_stride", "value", "value_stride", "out", "out_stride",
    "layer", "block_stride", "record_bytes", "block_size", "dim", "kv_heads", "group",
    "tables", "table_width", "starts", "computed", "spans", "num_spans", "chunks", "num_chunks", "partial",
    "window", "scale", "softcap", "given", "stored", "ticket",
]  # fmt: skip
(
    QUERY, QUERY_STRIDE, KEY, KEY_STRIDE, VALUE, VALUE_STRIDE, OUT, OUT_STRIDE,
    LAYER, BLOCK_STRIDE, RECORD_BYTES, BLOCK_SIZE, DIM, KV_HEADS, GROUP,
    TABLES, TABLE_WIDTH, STARTS, COMPUTED, SPANS, NUM_SPANS, CHUNKS, NUM_CHUNKS, PARTIAL,
    WINDOW, SCALE, SOFTCAP, GIVEN, STORED, TICKET,
) = range(len(ARGUMENTS))  # fmt: skip
"""Places of the arguments. Strides are in bytes; scale and softcap are the bits of fp32, softcap 0 for none.

``spans [num_spans, 4]`` int32: row, first position, tokens: tokens of a row that lie in one record, to be written.
``chunks [num_chunks, 4]`` int64: row, chunk, its first float in ``partial``, chunks of the row.
"""

_INFINITY = np.float32(np.inf)

_scores_f32 = token_scores(False)
_scores_bf16 = token_scores(True)
_weigh_f32 = weighted_sum(4, False)
_weigh_bf16 = weighted_sum(4, True)

_score_room = scratch(QUERIES * CHUNK * 4)
_sum_room = scratch(QUERIES * MAX_DIM * 4 + QUERIES * 8)
_query_room = scratch(QUERIES * MAX_DIM * 4)
_tile_room = scratch(TILE * MAX_DIM * 4)
_row_room = scratch(MAX_DIM * 4)


@njit(fastmath={"contract"})
def _record(a, row, token, head, side):
    """Address of the record that holds a row's token."""
    table = i32_at(a[TABLES] + 4 * row * a[TABLE_WIDTH])
    block = np.int64(table[token // a[BLOCK_SIZE]])
    return a[LAYER] + block * a[BLOCK_STRIDE] + (side * a[KV_HEADS] + head) * a[RECORD_BYTES]


@njit(fastmath={"contract"})
def _write_spans(a):
    heads, dim, size = a[KV_HEADS], a[DIM], a[BLOCK_SIZE]
    spans, starts, computed = i32_at(a[SPANS]), i64_at(a[STARTS]), i32_at(a[COMPUTED])
    wide = _row_room()
    items = a[NUM_SPANS] * 2 * heads
    me, all_ = np.int64(thread()), np.int64(threads())
    item_bytes = np.int64(4 if a[GIVEN] == F32 else 2)
    for item in range(items * me // all_, items * (me + 1) // all_):
        head = item % heads
        side = item // heads % 2
        span = item // heads // 2 * 4
        row, first, count = np.int64(spans[span]), np.int64(spans[span + 1]), np.int64(spans[span + 2])
        base, stride = (a[VALUE], a[VALUE_STRIDE]) if side == 1 else (a[KEY], a[KEY_STRIDE])
        token = starts[row] + first - np.int64(computed[row])
        source = base + token * stride + head * dim * item_bytes
        record = _record(a, row, first, head, side)
        write_record(a[STORED], a[GIVEN], source, stride, dim, record, size, first % size, count, wide)


@njit(fastmath={"contract"})
def _tile(a, row, head, side, first, count, direct, out):
    """Address of ``count`` <= 16 tokens' keys or values: in the cache itself, or else widened into ``out``."""
    dim, size, stored = a[DIM], a[BLOCK_SIZE], a[STORED]
    item = np.int64(4 if stored == F32 else 1 if stored >= INT8 else 2)
    if direct:
        return _record(a, row, first, head, side) + first % size * dim * item
    done = np.int64(0)
    while done < count:
        token = first + done
        some = min(count - done, size - token % size)  # in one record
        record = _record(a, row, token, head, side)
        scale = f32_at(record + size * dim)[0] if stored >= INT8 else np.float32(1.0)
        widen(stored, record + token % size * dim * item, some * dim, scale, out + done * dim * 4)
        done += some
    return out


@njit(fastmath={"contract"})
def _softmax(a, scores, tiles, first, last, totals):
    """Scores of ``16 * tiles`` tokens -> weights, relative to the largest, of those from ``first`` to ``last``; else 0.

    ``totals`` gets the largest score and the sum of the weights.
    """
    scale, cap = as_float(np.uint32(a[SCALE])), as_float(np.uint32(a[SOFTCAP]))
    p = f32_at(scores)
    count = tiles * TILE
    for i in range(count):
        p[i] *= scale
    if cap > np.float32(0.0):
        for i in range(count):
            # tanh(x) = 1 - 2 / (e^2x + 1)
            p[i] = cap * (np.float32(1.0) - np.float32(2.0) / (exp(np.float32(2.0) * p[i] / cap) + np.float32(1.0)))
    for i in range(first):
        p[i] = -_INFINITY
    for i in range(last, count):
        p[i] = -_INFINITY
    largest = vector_max(scores, tiles)
    if largest == -_INFINITY:  # each score is -inf, or no number
        largest = np.float32(0.0)
    for i in range(count):
        p[i] = exp(p[i] - largest)
    to = f32_at(totals)
    to[0] = largest
    to[1] = vector_sum(scores, tiles)


@njit(fastmath={"contract"})
def _add_values(weights, queries, values, tokens, dim, bf16, out):
    """Values of up to 16 tokens, weighted, to each query's sums."""
    for q in range(0, queries, 4):
        rows = min(4, queries - q)
        p = weights + q * CHUNK * 4
        done = np.int64(0)
        while done < dim:
            left = dim - done
            vectors = 4 if left >= 64 else 2 if left >= 32 else 1
            shape = 8 * rows + vectors
            to = out + (q * MAX_DIM + done) * 4
            if bf16:
                _weigh_bf16(shape, p, CHUNK * 4, values + done * 2, dim * 2, tokens, to, MAX_DIM * 4)
            else:
                _weigh_f32(shape, p, CHUNK * 4, values + done * 4, dim * 4, tokens, to, MAX_DIM * 4)
            done += 16 * vectors


@njit(fastmath={"contract"})
def _attend(a, row, chunk, head, first_query, queries, query, wide_query, out):
    """``queries`` <= 8 of one token of ``row`` over one chunk -> their sums ``out [8, MAX_DIM]``, and behind that
    the largest score and the sum of weights of each."""
    dim, stored = a[DIM], a[STORED]
    position = np.int64(i32_at(a[COMPUTED])[row]) + first_query
    first, last = chunk * CHUNK, min(chunk * CHUNK + CHUNK, position + 1)
    if a[WINDOW] > 0:
        first = max(first, position - a[WINDOW] + 1)
    totals = out + QUERIES * MAX_DIM * 4
    sums, seen = f32_at(out), f32_at(totals)
    for q in range(queries):
        seen[2 * q], seen[2 * q + 1] = -_INFINITY, np.float32(0.0)
        for i in range(dim):
            sums[q * MAX_DIM + i] = np.float32(0.0)
    if first >= last:
        return
    paged = a[BLOCK_SIZE] % TILE == 0
    bf16 = paged and stored == BF16 and a[GIVEN] == BF16 and dim % 32 == 0
    direct = bf16 or (paged and stored == F32)
    begin = first // TILE * TILE
    tiles = (last - begin + TILE - 1) // TILE
    scores, room = _score_room(), _tile_room()
    for tile in range(tiles):
        start = begin + tile * TILE
        keys = _tile(a, row, head, 0, start, min(TILE, last - start), direct, room)
        for q in range(queries):
            place = scores + (q * CHUNK + tile * TILE) * 4
            if bf16:
                _scores_bf16(query + q * dim * 2, keys, dim * 2, dim // 32, place)
            else:
                _scores_f32(wide_query + q * dim * 4, keys, dim * 4, dim // 16, place)
    for q in range(queries):
        _softmax(a, scores + q * CHUNK * 4, tiles, first - begin, last - begin, totals + 8 * q)
    for tile in range(tiles):
        start = max(first, begin + tile * TILE)
        end = min(last, begin + tile * TILE + TILE)
        values = _tile(a, row, head, 1, start, end - start, direct, room)
        _add_values(scores + (start - begin) * 4, queries, values, end - start, dim, bf16, out)


@njit(fastmath={"contract"})
def _chunk(a, item, head):
    """All queries of a row over one of its chunks: into the result, or into ``partial`` where there are others."""
    chunks, starts = i64_at(a[CHUNKS] + item * 32), i64_at(a[STARTS])
    row, chunk, place, parts = chunks[0], chunks[1], chunks[2], chunks[3]
    dim, group, given = a[DIM], a[GROUP], a[GIVEN]
    item_bytes = np.int64(4 if given == F32 else 2)
    tokens = starts[row + 1] - starts[row]
    out, wide = _sum_room(), _query_room()
    sums, seen = f32_at(out), f32_at(out + QUERIES * MAX_DIM * 4)
    for j in range(tokens):
        for first in range(0, group, QUERIES):
            queries = min(QUERIES, group - first)
            offset = (head * group + first) * dim
            query = a[QUERY] + (starts[row] + j) * a[QUERY_STRIDE] + offset * item_bytes
            widen(given, query, queries * dim, np.float32(1.0), wide)
            _attend(a, row, chunk, head, j, queries, query, wide, out)
            for q in range(queries):
                if parts == 1:
                    for i in range(dim):
                        sums[q * MAX_DIM + i] /= seen[2 * q + 1]
                    to = a[OUT] + (starts[row] + j) * a[OUT_STRIDE] + (offset + q * dim) * item_bytes
                    narrow(given, out + q * MAX_DIM * 4, dim, to)
                else:
                    slot = place + ((j * a[KV_HEADS] + head) * group + first + q) * (dim + 2)
                    part = f32_at(a[PARTIAL] + slot * 4)
                    for i in range(dim):
                        part[i] = sums[q * MAX_DIM + i]
                    part[dim], part[dim + 1] = seen[2 * q], seen[2 * q + 1]


@njit(fastmath={"contract"})
def _combine(a, item, head):
    """What the chunks of a row came to, at its first chunk."""
    chunks, starts = i64_at(a[CHUNKS] + item * 32), i64_at(a[STARTS])
    row, chunk, place, parts = chunks[0], chunks[1], chunks[2], chunks[3]
    if chunk > 0 or parts == 1:
        return
    dim, group, given = a[DIM], a[GROUP], a[GIVEN]
    item_bytes = np.int64(4 if given == F32 else 2)
    tokens = starts[row + 1] - starts[row]
    stride = tokens * a[KV_HEADS] * group * (dim + 2)
    room = _row_room()
    sums = f32_at(room)
    for j in range(tokens):
        for q in range(group):
            slot = place + ((j * a[KV_HEADS] + head) * group + q) * (dim + 2)
            largest = -_INFINITY
            for part in range(parts):
                largest = max(largest, f32_at(a[PARTIAL] + (slot + part * stride + dim) * 4)[0])
            total = np.float32(0.0)
            for i in range(dim):
                sums[i] = np.float32(0.0)
            for part in range(parts):
                made = f32_at(a[PARTIAL] + (slot + part * stride) * 4)
                if made[dim + 1] == np.float32(0.0):  # none of it is seen
                    continue
                weight = exp(made[dim] - largest)
                total += weight * made[dim + 1]
                for i in range(dim):
                    sums[i] += weight * made[i]
            for i in range(dim):
                sums[i] /= total
            to = a[OUT] + (starts[row] + j) * a[OUT_STRIDE] + (head * group + q) * dim * item_bytes
            narrow(given, room, dim, to)


@kernel(len(ARGUMENTS))
def attention(a):
    """See the module and ``ARGUMENTS``."""
    _write_spans(a)
    barrier()
    heads = a[KV_HEADS]
    items = a[NUM_CHUNKS] * heads
    ticket = address_of(a) + 8 * TICKET
    item = take_ticket(ticket)
    while item < items:
        _chunk(a, item // heads, item % heads)
        item = take_ticket(ticket)
    barrier()
    me, all_ = np.int64(thread()), np.int64(threads())
    if me == 0:
        a[TICKET] = 0
    for item in range(items * me // all_, items * (me + 1) // all_):
        _combine(a, item // heads, item % heads)

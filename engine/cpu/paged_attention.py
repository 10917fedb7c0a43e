"""Attention over a paged KV cache where it lies: nothing is gathered, and each sequence costs what its length costs.

One parallel region a layer:

1. The step's keys and values are written into their records.
2. A ticket is one (sequence, chunk of 128 tokens, KV head). Whoever draws it computes all scores of the chunk for the
   queries that share the KV head, their softmax within the chunk, and the weighted sum of the values.
3. What the chunks of a longer sequence came to is put together by their largest scores and sums (as in Flash-Decoding,
   Dao et al. 2023).

Rows of many tokens, as a prompt has them, are ``prompt_attention``'s: their tokens are put in order between 1 and 2,
and their tickets come first.

Chunks begin at multiples of 128 tokens, so the result of a sequence depends on neither its neighbours nor on threads.
Scores and sums are in fp32; ``engine.kernels.reference.paged_attention`` is what this must equal.
"""

import numpy as np
from numba import njit

from engine.cpu.jit import barrier, kernel, thread, threads
from engine.cpu.kv import BF16, F32, INT8, narrow, widen, write_record
from engine.cpu.prompt_attention import PANEL, clear_tokens, pack_tokens, shape_scores
from engine.cpu.prompt_attention import attend as attend_prompt
from engine.cpu.simd import (
    address_of,
    as_float,
    exp,
    exp_minus,
    f32_at,
    i32_at,
    i64_at,
    prefetch,
    scratch,
    take_ticket,
    token_scores,
    vector_max,
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
    "panels", "num_panels", "prompts", "num_prompts", "packed", "scales",
    "window", "scale", "softcap", "given", "stored", "ticket",
]  # fmt: skip
(
    QUERY, QUERY_STRIDE, KEY, KEY_STRIDE, VALUE, VALUE_STRIDE, OUT, OUT_STRIDE,
    LAYER, BLOCK_STRIDE, RECORD_BYTES, BLOCK_SIZE, DIM, KV_HEADS, GROUP,
    TABLES, TABLE_WIDTH, STARTS, COMPUTED, SPANS, NUM_SPANS, CHUNKS, NUM_CHUNKS, PARTIAL,
    PANELS, NUM_PANELS, PROMPTS, NUM_PROMPTS, PACKED, SCALES, WINDOW, SCALE, SOFTCAP, GIVEN, STORED, TICKET,
) = range(len(ARGUMENTS))  # fmt: skip
"""Places of the arguments. Strides are in bytes; scale and softcap are the bits of fp32, softcap 0 for none.

``spans [num_spans, 4]`` int32: row, first position, tokens: tokens of a row that lie in one record, to be written.
``chunks [num_chunks, 4]`` int64: row, chunk, its first float in ``partial``, chunks of the row.
``panels [num_panels, 4]`` int64: row, first token, the row's first panel of all, the row's panels.
``prompts [num_prompts, 4]`` int64: row, first query, queries, the row's first panel of all.
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
    shape_scores(scores, tiles * TILE, first, last, scale, cap)
    largest = vector_max(scores, tiles)
    if largest == -_INFINITY:  # each score is -inf, or no number
        largest = np.float32(0.0)
    to = f32_at(totals)
    to[0] = largest
    to[1] = exp_minus(scores, tiles, largest)


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
    tile_bytes = TILE * dim * (4 if stored == F32 else 2)
    for tile in range(tiles):
        start = begin + tile * TILE
        if direct and head + 1 < a[KV_HEADS]:  # which this thread takes next
            for side in range(2):
                prefetch(_tile(a, row, head + 1, side, start, TILE, direct, room), tile_bytes)
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


@njit(fastmath={"contract"})
def _panel_at(a, side, row_first, row_panels, head):
    """Address of a row's panels of one head: keys of all rows come before values."""
    heads = a[KV_HEADS]
    place = (side * a[NUM_PANELS] + row_first) * heads + head * row_panels
    return a[PACKED] + place * PANEL * a[DIM] * 2


@njit(fastmath={"contract"})
def _scales_at(a, side, row_first, row_panels, head):
    """Address of the scales of a row's tokens, one fp32 each; 0 where there are none."""
    if a[STORED] < INT8:
        return np.int64(0)
    place = (side * a[NUM_PANELS] + row_first) * a[KV_HEADS] + head * row_panels
    return a[SCALES] + place * PANEL * 4


@njit(fastmath={"contract"})
def _pack_panels(a):
    heads, dim, size, stored = a[KV_HEADS], a[DIM], a[BLOCK_SIZE], a[STORED]
    item_bytes = np.int64(4 if stored == F32 else 1 if stored >= INT8 else 2)
    starts, computed = i64_at(a[STARTS]), i32_at(a[COMPUTED])
    items = a[NUM_PANELS] * heads
    me, all_ = np.int64(thread()), np.int64(threads())
    for item in range(items * me // all_, items * (me + 1) // all_):
        head = item % heads
        panel = i64_at(a[PANELS] + item // heads * 32)
        row, first = panel[0], panel[1]
        before = np.int64(computed[row])
        if a[WINDOW] > 0 and first + PANEL <= before - a[WINDOW] + 1:  # no query of the step sees it
            continue
        last = min(first + PANEL, before + starts[row + 1] - starts[row])
        offset = first // PANEL * PANEL * dim * 2
        keys = _panel_at(a, 0, panel[2], panel[3], head) + offset
        values = _panel_at(a, 1, panel[2], panel[3], head) + offset
        token = first
        while token < last:
            some = min(last - token, size - token % size)
            record, other = _record(a, row, token, head, 0), _record(a, row, token, head, 1)
            pack_tokens(stored, item_bytes, dim, record, other, token % size, token - first, some, keys, values)
            if stored >= INT8:
                key_scales = f32_at(_scales_at(a, 0, panel[2], panel[3], head) + token * 4)
                value_scales = f32_at(_scales_at(a, 1, panel[2], panel[3], head) + token * 4)
                for i in range(some):
                    key_scales[i] = f32_at(record + size * dim)[0]
                    value_scales[i] = f32_at(other + size * dim)[0]
            token += some
        clear_tokens(dim, last - first, keys, values)
        if stored >= INT8:
            key_scales = f32_at(_scales_at(a, 0, panel[2], panel[3], head))
            value_scales = f32_at(_scales_at(a, 1, panel[2], panel[3], head))
            for i in range(last, first + PANEL):
                key_scales[i] = value_scales[i] = np.float32(0.0)


@njit(fastmath={"contract"})
def _prompt(a, item, head):
    """Some queries of a row over all that they see."""
    prompt = i64_at(a[PROMPTS] + item * 32)
    row, first, count = prompt[0], prompt[1], prompt[2]
    panel = i64_at(a[PANELS] + prompt[3] * 32)
    starts, dim, group = i64_at(a[STARTS]), a[DIM], a[GROUP]
    token = starts[row] + first
    offset = head * group * dim * 2
    attend_prompt(
        a[QUERY] + token * a[QUERY_STRIDE] + offset, a[QUERY_STRIDE], count, group, dim,
        np.int64(i32_at(a[COMPUTED])[row]) + first, a[WINDOW], as_float(np.uint32(a[SCALE])),
        as_float(np.uint32(a[SOFTCAP])), _panel_at(a, 0, panel[2], panel[3], head),
        _panel_at(a, 1, panel[2], panel[3], head), _scales_at(a, 0, panel[2], panel[3], head),
        _scales_at(a, 1, panel[2], panel[3], head), a[OUT] + token * a[OUT_STRIDE] + offset, a[OUT_STRIDE],
    )  # fmt: skip


@kernel(len(ARGUMENTS))
def attention(a):
    """See the module and ``ARGUMENTS``."""
    _write_spans(a)
    barrier()
    if a[NUM_PANELS] > 0:
        _pack_panels(a)
        barrier()
    heads = a[KV_HEADS]
    prompts = a[NUM_PROMPTS] * heads
    # One thread takes a chunk's heads one after the other, for they lie side by side; but all threads have some.
    share = heads if a[NUM_CHUNKS] >= 8 * threads() else np.int64(1)
    items = prompts + a[NUM_CHUNKS] * heads // share
    ticket = address_of(a) + 8 * TICKET
    item = take_ticket(ticket)
    while item < items:
        if item < prompts:
            last = prompts - 1 - item  # a prompt's later queries see more: longest first
            _prompt(a, last // heads, last % heads)
        else:
            first = (item - prompts) * share
            for place in range(first, first + share):
                _chunk(a, place // heads, place % heads)
        item = take_ticket(ticket)
    barrier()
    items = a[NUM_CHUNKS] * heads
    me, all_ = np.int64(thread()), np.int64(threads())
    if me == 0:
        a[TICKET] = 0
    for item in range(items * me // all_, items * (me + 1) // all_):
        _combine(a, item // heads, item % heads)

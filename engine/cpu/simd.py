"""What numba lacks for kernels that work on vectors: raw memory, bit casts, bf16 products, atomics.

Addresses are int64. Vectors have 16 fp32 lanes; LLVM splits them where a machine's are shorter. A product of bf16 pairs
is one instruction on processors with AVX512-BF16, and two fused multiplications elsewhere.
"""

import inspect
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
VECTOR = ir.VectorType(ir.FloatType(), LANES)
WORDS = ir.VectorType(ir.IntType(32), LANES)
HAS_BF16_DOT = bool(llvm.get_host_cpu_features().get("avx512bf16"))

_i8, _i16, _i32, _i64, _f32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc]  # llvmlite knows half, float and double only
    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()
_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


def pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType())


def load(builder: Any, address: Any, kind: Any, align: int = 4) -> Any:
    return builder.load(pointer(builder, address), align=align, typ=kind)


def store(builder: Any, value: Any, address: Any, align: int = 4) -> Any:
    return builder.store(value, pointer(builder, address), align=align)


def at(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, ir.Constant(_i64, offset)) if offset else address


def splat(builder: Any, value: Any, kind: Any) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_i32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(WORDS, [0] * LANES))


def call(builder: Any, name: str, kind: Any, values: list[Any]) -> Any:
    """One of LLVM's functions."""
    made = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [v.type for v in values]), name)
    return builder.call(made, values)


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call(builder, "llvm.fma.v16f32", VECTOR, [a, b, c])


def dot_pairs(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """``total [16] fp32 + a [16, 2] . b [16, 2]``; a and b bf16 as 16 words."""
    if HAS_BF16_DOT:
        pairs = [builder.bitcast(a, _PAIRS), builder.bitcast(b, _PAIRS)]
        return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", VECTOR, [total, *pairs])
    high, shift = ir.Constant(WORDS, [0xFFFF0000] * LANES), ir.Constant(WORDS, [16] * LANES)
    for part in (lambda x: builder.and_(x, high), lambda x: builder.shl(x, shift)):
        total = fma(builder, builder.bitcast(part(a), VECTOR), builder.bitcast(part(b), VECTOR), total)
    return total


def counted_loop(
    builder: Any, count: Any, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """``for i in range(count): carried = body(i, carried)``, with ``carried`` in registers."""
    before = builder.block
    head = builder.append_basic_block("loop.head")
    inside = builder.append_basic_block("loop.body")
    after = builder.append_basic_block("loop.end")
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(_i64)
    index.add_incoming(ir.Constant(_i64, 0), before)
    values = []
    for value in carried:
        phi = builder.phi(value.type)
        phi.add_incoming(value, before)
        values.append(phi)
    builder.cbranch(builder.icmp_signed("<", index, count), inside, after)
    builder.position_at_end(inside)
    made = body(index, values)
    last = builder.block
    index.add_incoming(builder.add(index, ir.Constant(_i64, 1)), last)
    for phi, value in zip(values, made, strict=True):
        phi.add_incoming(value, last)
    builder.branch(head)
    builder.position_at_end(after)
    return values


def operation(result: Any, *arguments: Any) -> Callable[[Any], Any]:
    """An intrinsic of fixed types from a function ``(builder, values) -> value``."""

    def decorate(emit: Callable[[Any, tuple[Any, ...]], Any]) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            made = emit(builder, values)
            return context.get_dummy_value() if made is None else made

        def typing(context: Any, *given: Any) -> Any:
            return result(*arguments), codegen

        typing.__name__ = emit.__name__
        # numba matches a call with the names that it finds here.
        names = ["context", *(f"a{i}" for i in range(len(arguments)))]
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        typing.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return intrinsic(typing)

    return decorate


def choice(arguments: int, variants: dict[int, Callable[[Any, tuple[Any, ...]], None]]) -> Any:
    """An operation ``(which, *arguments int64)`` that does what ``variants[which]`` emits, and nothing for others."""

    @operation(types.void, *[types.int64] * (arguments + 1))
    def chosen(builder: Any, values: Any) -> None:
        end = builder.append_basic_block("choice.end")
        switch = builder.switch(values[0], end)
        for number, emit in variants.items():
            block = builder.append_basic_block(f"choice.{number}")
            switch.add_case(ir.Constant(_i64, number), block)
            builder.position_at_end(block)
            emit(builder, tuple(values[1:]))
            builder.branch(end)
        builder.position_at_end(end)

    return chosen


I64 = types.int64


@operation(types.float32, types.uint32)
def as_float(builder: Any, values: Any) -> Any:
    return builder.bitcast(values[0], _f32)


@operation(types.uint32, types.float32)
def as_bits(builder: Any, values: Any) -> Any:
    return builder.bitcast(values[0], _i32)


@operation(types.CPointer(types.float32), I64)
def f32_at(builder: Any, values: Any) -> Any:
    return builder.inttoptr(values[0], _f32.as_pointer())


@operation(types.CPointer(types.uint16), I64)
def u16_at(builder: Any, values: Any) -> Any:
    return builder.inttoptr(values[0], _i16.as_pointer())


@operation(types.CPointer(types.int32), I64)
def i32_at(builder: Any, values: Any) -> Any:
    return builder.inttoptr(values[0], _i32.as_pointer())


@operation(types.CPointer(types.int64), I64)
def i64_at(builder: Any, values: Any) -> Any:
    return builder.inttoptr(values[0], _i64.as_pointer())


@operation(types.CPointer(types.uint8), I64)
def u8_at(builder: Any, values: Any) -> Any:
    return builder.inttoptr(values[0], _i8.as_pointer())


@operation(I64, I64)
def take_ticket(builder: Any, values: Any) -> Any:
    """Adds 1 to the int64 at an address; what it was before."""
    return builder.atomic_rmw("add", pointer(builder, values[0]), ir.Constant(_i64, 1), "monotonic")


@operation(types.void, I64, I64)
def prefetch(builder: Any, values: Any) -> None:
    """Ask for ``num_bytes`` from an address on, which will be read once."""
    address, num_bytes = values
    function = ir.FunctionType(ir.VoidType(), [ir.PointerType(), _i32, _i32, _i32])
    made = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")

    def body(index: Any, _: list[Any]) -> list[Any]:
        place = pointer(builder, builder.add(address, builder.shl(index, ir.Constant(_i64, 6))))
        builder.call(made, [place, ir.Constant(_i32, 0), ir.Constant(_i32, 2), ir.Constant(_i32, 1)])
        return []

    counted_loop(builder, builder.lshr(builder.add(num_bytes, ir.Constant(_i64, 63)), ir.Constant(_i64, 6)), [], body)


def scratch(num_bytes: int) -> Any:
    """An operation without arguments: the address of so many bytes on the thread's stack, the same for each call."""

    @operation(I64)
    def allocate(builder: Any, values: Any) -> Any:
        with builder.goto_entry_block():
            place = builder.alloca(ir.ArrayType(_i8, num_bytes))
        place.align = 64
        return builder.ptrtoint(place, _i64)

    return allocate


@njit(fastmath={"contract"})
def to_bf16(x):
    """Bits of the nearest bf16, ties to even."""
    bits = as_bits(x)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(fastmath={"contract"})
def from_bf16(bits):
    return as_float(np.uint32(bits) << np.uint32(16))


@operation(I64, types.CPointer(types.int64))
def address_of(builder: Any, values: Any) -> Any:
    return builder.ptrtoint(values[0], _i64)


@operation(types.float32, types.uint16)
def from_half(builder: Any, values: Any) -> Any:
    return builder.fpext(builder.bitcast(values[0], ir.HalfType()), _f32)


@operation(types.uint16, types.float32)
def to_half(builder: Any, values: Any) -> Any:
    return builder.bitcast(builder.fptrunc(values[0], ir.HalfType()), _i16)


def _lanes(chosen: list[int]) -> Any:
    return ir.Constant(WORDS, chosen)


def _sum_lanes(builder: Any, vectors: list[Any]) -> Any:
    """16 vectors -> one, whose lane i is the sum of the i-th's lanes."""
    width = 1
    while len(vectors) > 1:
        # A tree of sums of neighbours: lanes with bit `width` clear are a pair's first, the others its second.
        same = [lane + (LANES if lane & width else 0) for lane in range(LANES)]
        other = [(lane ^ width) + (LANES if lane & width else 0) for lane in range(LANES)]
        vectors = [
            builder.fadd(
                builder.shuffle_vector(first, second, _lanes(same)),
                builder.shuffle_vector(first, second, _lanes(other)),
            )
            for first, second in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        width *= 2
    return vectors[0]


def _across(builder: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """All lanes combined, in a fixed order."""
    width = LANES // 2
    while width:
        moved = builder.shuffle_vector(vector, vector, _lanes([lane ^ width for lane in range(LANES)]))
        vector = combine(vector, moved)
        width //= 2
    return builder.extract_element(vector, ir.Constant(_i32, 0))


@operation(types.float32, I64, I64)
def vector_max(builder: Any, values: Any) -> Any:
    """The largest of ``16 * count`` fp32 from an address on; NaN is passed over."""
    address, count = values

    def largest(a: Any, b: Any) -> Any:
        return call(builder, "llvm.maxnum.v16f32", VECTOR, [a, b])

    def body(index: Any, carried: list[Any]) -> list[Any]:
        place = builder.add(address, builder.shl(index, ir.Constant(_i64, 6)))
        return [largest(carried[0], load(builder, place, VECTOR))]

    start = ir.Constant(VECTOR, [float("-inf")] * LANES)
    return _across(builder, counted_loop(builder, count, [start], body)[0], largest)


@operation(types.float32, I64, I64)
def vector_sum(builder: Any, values: Any) -> Any:
    """The sum of ``16 * count`` fp32 from an address on."""
    address, count = values

    def body(index: Any, carried: list[Any]) -> list[Any]:
        place = builder.add(address, builder.shl(index, ir.Constant(_i64, 6)))
        return [builder.fadd(carried[0], load(builder, place, VECTOR))]

    start = ir.Constant(VECTOR, [0.0] * LANES)
    return _across(builder, counted_loop(builder, count, [start], body)[0], builder.fadd)


def _constant(number: float) -> Any:
    return ir.Constant(VECTOR, [float(np.float32(number))] * LANES)


_SHIFT = 12582912.0  # 1.5 * 2^23: a sum with it has the integer in its low bits


def _exp(builder: Any, x: Any) -> Any:
    """Of 16 lanes, to 2 units in the last place; 0 below -87, and above 88 what it is there; NaN stays. Cephes'
    polynomial (Moshier 1992). Vectors from the first: of loops over a scalar function LLVM made none."""
    below = builder.fcmp_ordered("<", x, _constant(-87.0))
    clamped = builder.select(below, _constant(-87.0), x)
    clamped = builder.select(builder.fcmp_ordered(">", clamped, _constant(88.0)), _constant(88.0), clamped)
    shifted = fma(builder, clamped, _constant(1.4426950408889634), _constant(_SHIFT))
    whole = builder.fsub(shifted, _constant(_SHIFT))
    r = fma(builder, whole, _constant(-0.693359375), clamped)
    r = fma(builder, whole, _constant(2.12194440e-4), r)
    p = _constant(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(builder, p, r, _constant(factor))
    p = fma(builder, p, builder.fmul(r, r), builder.fadd(r, _constant(1.0)))
    power = builder.shl(builder.bitcast(shifted, WORDS), ir.Constant(WORDS, [23] * LANES))
    power = builder.add(power, ir.Constant(WORDS, [0x3F800000] * LANES))
    return builder.select(below, _constant(0.0), builder.fmul(p, builder.bitcast(power, VECTOR)))


_HALVES = ir.VectorType(_i16, LANES)


def _widened(builder: Any, address: Any) -> Any:
    """16 values of bf16."""
    words = builder.zext(load(builder, address, _HALVES, align=2), WORDS)
    return builder.bitcast(builder.shl(words, ir.Constant(WORDS, [16] * LANES)), VECTOR)


def _store_bf16(builder: Any, value: Any, address: Any) -> None:
    """The nearest bf16 of 16 lanes, ties to even."""
    if HAS_BF16_DOT:
        kind = ir.VectorType(_BFloat(), LANES)
        store(builder, call(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", kind, [value]), address, align=2)
        return
    words, shift = builder.bitcast(value, WORDS), ir.Constant(WORDS, [16] * LANES)
    odd = builder.and_(builder.lshr(words, shift), ir.Constant(WORDS, [1] * LANES))
    words = builder.add(builder.add(words, ir.Constant(WORDS, [0x7FFF] * LANES)), odd)
    store(builder, builder.trunc(builder.lshr(words, shift), _HALVES), address, align=2)


def _each(builder: Any, count: Any, body: Callable[[Any], None]) -> None:
    """``body(i)`` for each of ``count`` vectors."""

    def once(index: Any, _: list[Any]) -> list[Any]:
        body(index)
        return []

    counted_loop(builder, count, [], once)


def _place(builder: Any, address: Any, index: Any, num_bytes: int) -> Any:
    """Of the ``index``-th vector of values of ``num_bytes``."""
    return builder.add(address, builder.mul(index, ir.Constant(_i64, LANES * num_bytes)))


@operation(types.float32, types.float32)
def exp(builder: Any, values: Any) -> Any:
    """Of one fp32."""
    return builder.extract_element(_exp(builder, splat(builder, values[0], VECTOR)), ir.Constant(_i32, 0))


@operation(types.void, I64, I64, types.float32, types.float32)
def soft_cap(builder: Any, values: Any) -> None:
    """``cap * tanh(scale * x / cap)``, in place, of ``16 * count`` fp32."""
    address, count, scale, cap = values
    caps = splat(builder, cap, VECTOR)
    twice = splat(builder, builder.fdiv(builder.fmul(scale, ir.Constant(_f32, 2.0)), cap), VECTOR)

    def body(index: Any) -> None:
        place = _place(builder, address, index, 4)
        bottom = builder.fadd(_exp(builder, builder.fmul(load(builder, place, VECTOR), twice)), _constant(1.0))
        # tanh(x) = 1 - 2 / (e^2x + 1)
        made = builder.fsub(_constant(1.0), builder.fdiv(_constant(2.0), bottom))
        store(builder, builder.fmul(caps, made), place)

    _each(builder, count, body)


@operation(types.float32, I64, I64, types.float32)
def exp_minus(builder: Any, values: Any) -> Any:
    """``exp(x - largest)``, in place, of ``16 * count`` fp32; and their sum."""
    address, count, largest = values
    taken = splat(builder, largest, VECTOR)

    def body(index: Any, carried: list[Any]) -> list[Any]:
        place = _place(builder, address, index, 4)
        made = _exp(builder, builder.fsub(load(builder, place, VECTOR), taken))
        store(builder, made, place)
        return [builder.fadd(carried[0], made)]

    return _across(builder, counted_loop(builder, count, [_constant(0.0)], body)[0], builder.fadd)


@operation(types.void, I64, I64, I64)
def store_bf16(builder: Any, values: Any) -> None:
    """``16 * count`` fp32 from ``source`` on, rounded to ``out``."""
    source, count, out = values

    def body(index: Any) -> None:
        made = load(builder, _place(builder, source, index, 4), VECTOR)
        _store_bf16(builder, made, _place(builder, out, index, 2))

    _each(builder, count, body)


@operation(types.void, I64, I64, I64)
def add_bf16(builder: Any, values: Any) -> None:
    """``16 * count`` fp32 from ``source`` on are added to the bf16 at ``out``."""
    source, count, out = values

    def body(index: Any) -> None:
        to = _place(builder, out, index, 2)
        made = load(builder, _place(builder, source, index, 4), VECTOR)
        _store_bf16(builder, builder.fadd(_widened(builder, to), made), to)

    _each(builder, count, body)


@operation(types.void, I64, I64, I64, I64)
def silu_mul_bf16(builder: Any, values: Any) -> None:
    """``silu(gate) * up`` of ``16 * count`` fp32 each, rounded to ``out``."""
    gates, ups, count, out = values

    def body(index: Any) -> None:
        gate = load(builder, _place(builder, gates, index, 4), VECTOR)
        up = load(builder, _place(builder, ups, index, 4), VECTOR)
        bottom = builder.fadd(_constant(1.0), _exp(builder, builder.fneg(gate)))
        made = builder.fmul(builder.fdiv(gate, bottom), up)
        _store_bf16(builder, made, _place(builder, out, index, 2))

    _each(builder, count, body)


@operation(types.float32, I64, I64, I64)
def widen_bf16(builder: Any, values: Any) -> Any:
    """``16 * count`` bf16 from ``source`` on as fp32 to ``out``; and the sum of their squares."""
    source, count, out = values

    def body(index: Any, carried: list[Any]) -> list[Any]:
        value = _widened(builder, _place(builder, source, index, 2))
        store(builder, value, _place(builder, out, index, 4))
        return [fma(builder, value, value, carried[0])]

    return _across(builder, counted_loop(builder, count, [_constant(0.0)], body)[0], builder.fadd)


@operation(types.void, I64, I64, types.float32, I64, I64)
def scale_bf16(builder: Any, values: Any) -> None:
    """``x * factor * weight`` of ``16 * count`` fp32, rounded to ``out``."""
    source, count, factor, weights, out = values
    factors = splat(builder, factor, VECTOR)

    def body(index: Any) -> None:
        made = builder.fmul(load(builder, _place(builder, source, index, 4), VECTOR), factors)
        made = builder.fmul(made, load(builder, _place(builder, weights, index, 4), VECTOR))
        _store_bf16(builder, made, _place(builder, out, index, 2))

    _each(builder, count, body)


def token_scores(bf16: bool) -> Any:
    """``out[t] = q . k[t]`` for 16 tokens t, ``k_stride`` bytes apart. fp32, or bf16 in whole words of pairs; the head
    dimension is ``16 * steps`` values of fp32 or ``32 * steps`` of bf16."""

    @operation(types.void, I64, I64, I64, I64, I64)
    def scores(builder: Any, values: Any) -> None:
        q, k, k_stride, steps, out = values
        rows = [builder.add(k, builder.mul(k_stride, ir.Constant(_i64, t))) for t in range(LANES)]
        kind = WORDS if bf16 else VECTOR

        def body(index: Any, totals: list[Any]) -> list[Any]:
            offset = builder.shl(index, ir.Constant(_i64, 6))
            part = load(builder, builder.add(q, offset), kind)
            made = []
            for total, row in zip(totals, rows, strict=True):
                other = load(builder, builder.add(row, offset), kind, align=2)
                made.append(dot_pairs(builder, total, part, other) if bf16 else fma(builder, part, other, total))
            return made

        zero = ir.Constant(VECTOR, [0.0] * LANES)
        store(builder, _sum_lanes(builder, counted_loop(builder, steps, [zero] * LANES, body)), out)

    return scores


def _emit_weighted_sum(rows: int, vectors: int, bf16: bool) -> Callable[[Any, tuple[Any, ...]], None]:
    def weighted(builder: Any, values: tuple[Any, ...]) -> None:
        p, p_stride, v, v_stride, tokens, out, out_stride = values
        p_rows = [builder.add(p, builder.mul(p_stride, ir.Constant(_i64, r))) for r in range(rows)]
        out_rows = [builder.add(out, builder.mul(out_stride, ir.Constant(_i64, r))) for r in range(rows)]
        places = [at(builder, row, 64 * n) for row in out_rows for n in range(vectors)]

        def value(address: Any) -> Any:
            return _widened(builder, address) if bf16 else load(builder, address, VECTOR)

        def body(index: Any, totals: list[Any]) -> list[Any]:
            base = builder.add(v, builder.mul(index, v_stride))
            parts = [value(at(builder, base, (32 if bf16 else 64) * n)) for n in range(vectors)]
            offset = builder.shl(index, ir.Constant(_i64, 2))
            made = []
            for r in range(rows):
                weight = splat(builder, load(builder, builder.add(p_rows[r], offset), _f32), VECTOR)
                made += [fma(builder, weight, parts[n], totals[r * vectors + n]) for n in range(vectors)]
            return made

        start = [load(builder, place, VECTOR) for place in places]
        for total, place in zip(counted_loop(builder, tokens, start, body), places, strict=True):
            store(builder, total, place)

    return weighted


def weighted_sum(max_rows: int, bf16: bool) -> Any:
    """``(8 * rows + vectors, p, p_stride, v, v_stride, tokens, out, out_stride)``: ``out[r] += sum_t p[r, t] * v[t]``
    for ``rows`` rows and 1, 2 or 4 ``vectors`` of 16 values of v, which is fp32 or bf16; p and out are fp32."""
    return choice(7, {8 * r + v: _emit_weighted_sum(r, v, bf16) for r in range(1, max_rows + 1) for v in (1, 2, 4)})


def _emit_panel_product(rows: int, vectors: int) -> Callable[[Any, tuple[Any, ...]], None]:
    def panel(builder: Any, values: tuple[Any, ...]) -> None:
        x, x_stride, w, w_stride, pairs, out, out_stride, add = values
        x_rows = [builder.add(x, builder.mul(x_stride, ir.Constant(_i64, r))) for r in range(rows)]
        out_rows = [builder.add(out, builder.mul(out_stride, ir.Constant(_i64, r))) for r in range(rows)]
        zero = ir.Constant(VECTOR, [0.0] * LANES)
        places = [at(builder, row, 64 * v) for row in out_rows for v in range(vectors)]
        kept = builder.icmp_signed("!=", add, ir.Constant(_i64, 0))
        start = []
        with builder.if_else(kept) as (then, otherwise):
            with then:
                loaded = [load(builder, place, VECTOR) for place in places]
                then_block = builder.block
            with otherwise:
                else_block = builder.block
        for value in loaded:
            phi = builder.phi(VECTOR)
            phi.add_incoming(value, then_block)
            phi.add_incoming(zero, else_block)
            start.append(phi)

        def body(index: Any, totals: list[Any]) -> list[Any]:
            base = builder.add(w, builder.mul(index, w_stride))
            weights = [load(builder, at(builder, base, 64 * v), WORDS) for v in range(vectors)]
            offset = builder.shl(index, ir.Constant(_i64, 2))
            made = []
            for r in range(rows):
                word = splat(builder, load(builder, builder.add(x_rows[r], offset), _i32), WORDS)
                made += [dot_pairs(builder, totals[r * vectors + v], word, weights[v]) for v in range(vectors)]
            return made

        for value, place in zip(counted_loop(builder, pairs, start, body), places, strict=True):
            store(builder, value, place)

    return panel


def panel_product(rows: tuple[int, ...], vectors: tuple[int, ...]) -> Any:
    """``(8 * rows + vectors, x, x_stride, w, w_stride, pairs, out, out_stride, add)``: ``out[r, n] = sum_k x[r, k] *
    w[k, n]`` for so many rows and 16 times so many vectors' columns, in registers.

    x is bf16, a pair of k a word; w is ``[pairs, columns, 2]`` bf16; out is fp32, added to where ``add`` is not 0.
    Strides, between rows and between pairs, are in bytes.
    """
    return choice(8, {8 * r + v: _emit_panel_product(r, v) for r in rows for v in vectors})

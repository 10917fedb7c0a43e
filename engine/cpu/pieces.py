"""Many pieces of memory copied in one call, without the GIL: blocks of a KV pool, or ranges of their layers or heads.

A large copy goes past the cache (non-temporal stores): it is read again late if at all, and a store that goes to the
cache first reads the line that it is going to overwrite. A small one is libc's ``memcpy``, and stays in the cache.
"""

import ctypes
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numpy.typing import NDArray

from engine.cpu.jit import kernel
from engine.cpu.simd import I64, WORDS, at, counted_loop, i32_at, i64_at, load, operation, pointer, store

STREAM_FROM = 256 << 10
"""Bytes of one call from which on it goes past the cache."""
_LINE, _UNROLLED, _PAGE = 64, 4, 4096
_PAGES, _SHORT = 4, 32 << 10
_i1, _i32, _i64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)


def _stream_lines(builder: Any, to: Any, of: Any, rows: int) -> None:
    """``_UNROLLED`` lines of each of ``rows`` pages; ``to`` is aligned to a line."""
    once = builder.module.add_metadata([ir.Constant(_i32, 1)])
    for row in range(rows):
        places = [row * _PAGE + _LINE * line for line in range(_UNROLLED)]
        lines = [load(builder, at(builder, of, place), WORDS, align=1) for place in places]
        for line, place in zip(lines, places, strict=True):
            store(builder, line, at(builder, to, place), align=_LINE).set_metadata("nontemporal", once)


def _stream(rows: int) -> Any:
    """``(to, of, count)``: groups of ``rows`` pages past the cache, or of ``_UNROLLED`` lines where ``rows`` is 1."""

    @operation(types.void, I64, I64, I64)
    def streamed(builder: Any, values: Any) -> None:
        to, of, count = values

        def lines(index: Any, _: list[Any]) -> list[Any]:
            place = builder.mul(index, ir.Constant(_i64, _LINE * _UNROLLED))
            _stream_lines(builder, builder.add(to, place), builder.add(of, place), rows)
            return []

        if rows == 1:
            counted_loop(builder, count, [], lines)
            return
        first_to, first_of = to, of

        def pages(index: Any, _: list[Any]) -> list[Any]:
            nonlocal to, of
            place = builder.mul(index, ir.Constant(_i64, rows * _PAGE))
            to, of = builder.add(first_to, place), builder.add(first_of, place)
            counted_loop(builder, ir.Constant(_i64, _PAGE // (_LINE * _UNROLLED)), [], lines)
            return []

        counted_loop(builder, count, [], pages)

    return streamed


_stream_one, _stream_pages = _stream(1), _stream(_PAGES)


@operation(types.void, I64, I64, I64)
def _plain(builder: Any, values: Any) -> None:
    """``(to, of, num_bytes)``."""
    to, of, num_bytes = values
    bytes_ = ir.PointerType()
    kind = ir.FunctionType(ir.VoidType(), [bytes_, bytes_, _i64, _i1])
    copy = builder.module.declare_intrinsic("llvm.memcpy.p0.p0.i64", (), kind)
    builder.call(copy, [pointer(builder, to), pointer(builder, of), num_bytes, ir.Constant(_i1, 0)])


@operation(types.void)
def _fence(builder: Any, values: Any) -> None:
    """What went past the cache is visible before what is stored from now on."""
    builder.fence("seq_cst")


@njit
def _stream_piece(to, of, size):
    """``size`` bytes past the cache: by pages at once where a piece is too short for the processor to read it ahead."""
    lead = min(-to & (_LINE - 1), size)
    _plain(to, of, lead)
    done = lead
    if size <= _SHORT:
        groups = (size - done) // (_PAGES * _PAGE)
        _stream_pages(to + done, of + done, groups)
        done += groups * _PAGES * _PAGE
    steps = (size - done) // (_LINE * _UNROLLED)
    _stream_one(to + done, of + done, steps)
    done += steps * _LINE * _UNROLLED
    _plain(to + done, of + done, size - done)


@kernel(15)
def _copy(a: Any) -> None:
    """into, its blocks, block and piece stride, targets (int32); out of, its blocks, strides, sources (int32); blocks
    to copy, pieces of a block, bytes of a piece, whether they go past the cache; where to put the first place whose
    block is not there, in which case nothing is copied. Strides in bytes.
    """
    into, into_blocks, into_block, into_piece, targets = a[0], a[1], a[2], a[3], i32_at(a[4])
    out_of, out_of_blocks, out_of_block, out_of_piece, sources = a[5], a[6], a[7], a[8], i32_at(a[9])
    blocks, pieces, size, streamed = a[10], a[11], a[12], a[13]
    for place in range(blocks):
        if not (0 <= targets[place] < into_blocks and 0 <= sources[place] < out_of_blocks):
            i64_at(a[14])[0] = place
            return
    for place in range(blocks):
        to, of = into + targets[place] * into_block, out_of + sources[place] * out_of_block
        for _ in range(pieces):
            if streamed:
                _stream_piece(to, of, size)
            else:
                _plain(to, of, size)
            to += into_piece
            of += out_of_piece
    if streamed:
        _fence()


def copy_blocks(
    into: NDArray[np.uint8], target: NDArray[np.int32], out_of: NDArray[np.uint8], source: NDArray[np.int32]
) -> None:
    """``into[target[i]] = out_of[source[i]]`` for all i, on this thread, which lets go of the GIL meanwhile.

    Arrays of bytes, ``[block, ...]``, of the same shape but for the number of blocks, whose memory does not overlap.
    What a block of each keeps together is copied as one piece; pieces must be evenly apart, as in a range of the layers
    or of the heads of ``[block, layer, head, byte]``. Raises ``IndexError``, and copies nothing, where a block is in
    neither; ``ValueError`` where the arrays cannot be copied so.
    """
    if into.shape[1:] != out_of.shape[1:] or len(target) != len(source):
        raise ValueError(f"{len(source)} of {out_of.shape} cannot be copied to {len(target)} of {into.shape}")
    if not into.flags.writeable:
        raise ValueError("the array to copy to is read-only")
    pieces, into_piece, out_of_piece, size = _pieces(into, out_of)
    target, source = np.ascontiguousarray(target, np.int32), np.ascontiguousarray(source, np.int32)
    wrong = ctypes.c_int64(-1)
    _copy()(
        into.ctypes.data, len(into), into.strides[0], into_piece, target.ctypes.data,
        out_of.ctypes.data, len(out_of), out_of.strides[0], out_of_piece, source.ctypes.data,
        len(target), pieces, size, len(target) * pieces * size >= STREAM_FROM, ctypes.addressof(wrong), alone=True,
    )  # fmt: skip
    if (place := wrong.value) >= 0:
        raise IndexError(
            f"block {source[place]} of {len(out_of)} cannot be copied to block {target[place]} of {len(into)}"
        )


def prepare() -> None:
    """Compile or load what ``copy_blocks`` needs, so that the first copy need not wait for it."""
    _copy()


def _pieces(into: NDArray[np.uint8], out_of: NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """Pieces of a block, bytes from one to the next in either array, and bytes of each."""
    dims = [dim for dim in zip(into.shape[1:], into.strides[1:], out_of.strides[1:], strict=True) if dim[0] != 1]
    size = 1
    while dims and dims[-1][1] == dims[-1][2] == size:
        size *= dims.pop()[0]
    if not dims:
        return 1, 0, 0, size
    pieces, *steps = dims.pop()
    while dims and (steps[0] * pieces, steps[1] * pieces) == dims[-1][1:]:
        pieces *= dims.pop()[0]
    if dims:
        raise ValueError(f"pieces of {into.shape} are not evenly apart")
    return pieces, *steps, size

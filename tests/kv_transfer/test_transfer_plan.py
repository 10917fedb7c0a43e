"""Promise: blocks move in as few copies as their places allow, each exactly once, in order."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.core.plan import plan


def reference(source: list[int], target: list[int], max_blocks: int) -> list[tuple[int, int, int]]:
    """Block by block: lengthen the last piece, or begin another."""
    pieces: list[tuple[int, int, int]] = []
    for here, there in zip(source, target, strict=True):
        if pieces:
            start, to, length = pieces[-1]
            if (start + length, to + length) == (here, there) and length < max_blocks:
                pieces[-1] = (start, to, length + 1)
                continue
        pieces.append((here, there, 1))
    return pieces


def pieces_of(source: list[int], target: list[int], max_blocks: int) -> list[tuple[int, int, int]]:
    pieces = plan(np.array(source, np.int32), np.array(target, np.int32), max_blocks)
    assert all(column.dtype == np.int32 for column in pieces)
    return list(zip(*(column.tolist() for column in pieces), strict=True))


@st.composite
def block_lists(draw: Any) -> tuple[list[int], list[int]]:
    """Runs here and there, so that consecutive blocks are common."""
    runs = draw(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(1, 6)), max_size=8))
    source = [start + place for start, _, length in runs for place in range(length)]
    target = [to + place for _, to, length in runs for place in range(length)]
    return source, target


@given(block_lists(), st.integers(1, 5))
def test_a_plan_is_that_of_the_slow_reference(blocks: tuple[list[int], list[int]], max_blocks: int) -> None:
    source, target = blocks
    assert pieces_of(source, target, max_blocks) == reference(source, target, max_blocks)


def test_consecutive_blocks_are_one_piece() -> None:
    assert pieces_of([3, 4, 5, 9], [0, 1, 2, 3], 100) == [(3, 0, 3), (9, 3, 1)]
    assert pieces_of([3, 4, 5], [2, 1, 0], 100) == [(3, 2, 1), (4, 1, 1), (5, 0, 1)]


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 source blocks for 1"):
        pieces_of([1, 2], [1], 1)

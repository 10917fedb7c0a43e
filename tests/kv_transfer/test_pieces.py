"""Promise: the compiled copy moves what numpy would move, and nothing else, or says what it cannot copy."""

import numpy as np
import pytest

from engine.cpu import pieces
from engine.cpu.pieces import copy_blocks


def arrays(rng: np.random.Generator, blocks: int, shape: tuple[int, ...], lead: int):  # type: ignore[no-untyped-def]
    """Random ``[blocks, *shape]``, from an address that is ``lead`` past a line on."""
    size = blocks * int(np.prod(shape))
    memory = rng.integers(0, 256, size + 128, np.uint8)
    start = -memory.ctypes.data % 64 + lead
    return memory[start : start + size].reshape(blocks, *shape)


def moved(into, target, out_of, source):  # type: ignore[no-untyped-def]
    """The slow, obvious way."""
    made = into.copy()
    for to, of in zip(target, source, strict=True):
        made[to] = out_of[of]
    return made


@pytest.mark.parametrize("shape", [(1,), (63,), (4096,), (5, 3, 40), (6, 4, 4096), (6, 4, 4100), (2, 3, 70001)])
@pytest.mark.parametrize("streamed", [False, True])
def test_blocks_and_ranges_of_them_are_copied_as_numpy_would(
    shape: tuple[int, ...], streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "STREAM_FROM", 0 if streamed else 1 << 40)
    rng = np.random.default_rng(int(np.prod(shape)) + streamed)
    views = [np.s_[:]]
    if len(shape) == 3:
        views += [np.s_[:, 1:2], np.s_[:, : shape[0] // 2, :], np.s_[:, :, : max(1, shape[1] // 2)]]
        views += [np.s_[:, :, 2:3]] if shape[1] > 2 else []
    for view in views:
        into, out_of = (arrays(rng, 7, shape, int(lead)) for lead in rng.integers(0, 64, 2))
        target, source = (rng.permutation(7)[:5].astype(np.int32) for _ in range(2))
        expected = into.copy()
        expected[view] = moved(into[view], target, out_of[view], source)
        copy_blocks(into[view], target, out_of[view], source)
        assert np.array_equal(into, expected)


def test_a_range_of_a_wide_block_lands_in_narrower_ones() -> None:
    rng = np.random.default_rng(1)
    wide, narrow = arrays(rng, 9, (8, 6, 500), 0), arrays(rng, 9, (8, 2, 500), 3)
    blocks = np.arange(9, dtype=np.int32)
    copy_blocks(narrow, blocks, wide[:, :, 3:5], blocks[::-1])
    assert np.array_equal(narrow, wide[::-1, :, 3:5])
    sides = wide.reshape(9, 4, 2, 6, 500)[:, 1:3, :, 3:5]
    copy_blocks(narrow.reshape(9, 4, 2, 2, 500)[:, :2], blocks, sides, blocks)
    assert np.array_equal(narrow[:, :4], wide[:, 2:6, 3:5])


@pytest.mark.parametrize(("target", "source"), [([0, 4], [0, 1]), ([0, 1], [0, -1]), ([0, -1], [0, 1]), ([1], [9])])
def test_a_block_that_is_not_there_is_named_and_nothing_is_copied(target: list[int], source: list[int]) -> None:
    into, out_of = np.zeros((4, 100), np.uint8), np.ones((9, 100), np.uint8)
    with pytest.raises(IndexError, match=f"block {source[-1]} of 9 cannot be copied to block {target[-1]} of 4"):
        copy_blocks(into, np.array(target, np.int32), out_of, np.array(source, np.int32))
    assert not into.any()


def test_what_cannot_be_copied_so_is_refused() -> None:
    one = np.zeros(1, np.int32)
    whole = np.zeros((2, 4, 6, 10), np.uint8)
    with pytest.raises(ValueError, match="cannot be copied to"):
        copy_blocks(whole, one, whole[:, :3], one)
    with pytest.raises(ValueError, match="evenly apart"):
        copy_blocks(np.zeros((2, 4, 3, 5), np.uint8), one, whole[:, :, 1:4, :5], one)
    read_only = np.zeros((2, 8), np.uint8)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        copy_blocks(read_only, one, np.zeros((2, 8), np.uint8), one)

"""Promise: a digest fits one content, in one place of one attempt's sequence."""

import random

import numpy as np
import pytest

from kv_transfer.core.digest import DIGEST_BYTES, ONE_HEAD, ONE_LAYER, digests, mismatches
from kv_transfer.core.lanes import Heads, Layers
from tests.kv_transfer.kv_pair import key, scattered

POOL = np.random.default_rng(0).integers(0, 256, (64, 512), np.uint8)
BLOCKS = scattered(1, 20)
RIGHT = digests(POOL, BLOCKS, key(), 3)


def test_equal_blocks_in_other_rows_have_equal_digests() -> None:
    there = np.zeros_like(POOL)
    rows = scattered(2, 20)
    there[rows] = POOL[BLOCKS]
    taken = digests(there, rows, key(), 3)
    assert len(taken) == len(BLOCKS) * DIGEST_BYTES
    assert taken == RIGHT
    assert not len(mismatches(RIGHT, taken))


def test_digests_of_parts_join_to_those_of_the_whole() -> None:
    assert digests(POOL, BLOCKS[:7], key(), 3) + digests(POOL, BLOCKS[7:], key(), 10) == RIGHT


def test_any_flipped_bit_is_found() -> None:
    rng = random.Random(0)
    pool = POOL.copy()
    for _ in range(2000):
        place, byte, bit = rng.randrange(20), rng.randrange(512), 1 << rng.randrange(8)
        pool[BLOCKS[place], byte] ^= bit
        assert mismatches(RIGHT, digests(pool, BLOCKS, key(), 3)).tolist() == [place]
        pool[BLOCKS[place], byte] ^= bit


def test_swapped_blocks_are_found() -> None:
    swapped = BLOCKS.copy()
    swapped[[4, 11]] = swapped[[11, 4]]
    assert mismatches(RIGHT, digests(POOL, swapped, key(), 3)).tolist() == [4, 11]


@pytest.mark.parametrize("other", [key(2), key(1, attempt=2)])
def test_a_right_block_of_another_request_or_attempt_is_found(other: object) -> None:
    assert len(mismatches(RIGHT, digests(POOL, BLOCKS, other, 3))) == len(BLOCKS)  # type: ignore[arg-type]


@pytest.mark.parametrize("other", [(Layers(0, 2), ONE_HEAD), (Layers(1, 2), ONE_HEAD), (ONE_LAYER, Heads(1, 1))])
def test_a_right_block_of_other_layers_or_heads_is_found(other: tuple[Layers, Heads]) -> None:
    assert len(mismatches(RIGHT, digests(POOL, BLOCKS, key(), 3, *other))) == len(BLOCKS)


def test_a_block_at_another_place_of_the_sequence_is_found() -> None:
    assert len(mismatches(RIGHT, digests(POOL, BLOCKS, key(), 4))) == len(BLOCKS)


def test_the_same_content_has_another_digest_at_every_place() -> None:
    same = np.zeros(5000, np.int32)
    taken = np.frombuffer(digests(POOL, same, key(), 0), "<u8")
    assert len(np.unique(taken)) == 5000

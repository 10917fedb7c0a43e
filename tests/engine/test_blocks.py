"""Promise: a block is free, held or cached; cached content is found until the room is needed, oldest first."""

from hashlib import sha256

import numpy as np
import pytest

from engine.core.blocks import BlockPool
from engine.core.growth import peak_growth
from engine.core.host_tier import HostTier
from engine.core.prefix import BlockHashes, root_hash


def names(count: int, salt: bytes = b"") -> list[bytes]:
    return [*BlockHashes(salt, 1).extend(np.arange(count, dtype=np.int32))]


def filled(pool: BlockPool, count: int, salt: bytes = b"") -> list[bytes]:
    """``count`` blocks of content, held by nobody."""
    made = names(count, salt)
    blocks = pool.allocate(count)
    assert blocks is not None
    for block, name in zip(blocks.tolist(), made, strict=True):
        pool.register(block, name)
    pool.free(blocks)
    return made


def counts(pool: BlockPool) -> tuple[int, int, int]:
    pool.check_integrity()
    seen = pool.counts()
    return seen.free, seen.held, seen.cached


def test_a_block_is_cached_when_its_last_owner_lets_go_and_found_again() -> None:
    pool = BlockPool(8, 1)
    known = filled(pool, 3)
    assert counts(pool) == (5, 0, 3) and pool.num_free == 8
    found = pool.match([*known, b"unknown"])
    assert len(found) == 3 and pool.num_unheld(found) == 3
    pool.share(found)
    pool.share(found[:1])
    assert counts(pool) == (5, 3, 0) and pool.num_references == 4
    assert pool.final(int(found[1])), "it is registered"
    pool.free(found)
    assert counts(pool) == (5, 1, 2)
    pool.free(found[:1])
    assert counts(pool) == (5, 0, 3)


def test_what_was_used_last_is_evicted_last_and_ends_before_beginnings() -> None:
    pool = BlockPool(6, 1)
    first, second = filled(pool, 3, b"a"), filled(pool, 3, b"b")
    again = pool.match(first)
    pool.share(again)
    pool.free(again)
    gone: list[bytes] = []
    taken = [pool.allocate(1, lambda _, name: gone.append(name)) for _ in range(4)]
    assert gone == [*second[::-1], first[2]]
    assert len(pool.match(first)) == 2 and len(pool.match(second)) == 0
    assert pool.allocate(3) is None and all(blocks is not None for blocks in taken)
    assert counts(pool) == (0, 4, 2)


def test_free_blocks_are_taken_before_content_is_lost() -> None:
    pool = BlockPool(6, 1)
    known = filled(pool, 3)
    assert pool.allocate(3) is not None
    assert len(pool.match(known)) == 3


def test_of_two_blocks_with_one_content_the_first_is_found_and_the_other_is_free_afterwards() -> None:
    pool = BlockPool(4, 1)
    blocks = pool.allocate(2)
    assert blocks is not None
    for block in blocks.tolist():
        pool.register(block, b"name")
    assert pool.match([b"name"]).tolist() == [blocks[0]]
    pool.free(blocks)
    assert counts(pool) == (3, 0, 1)


def test_what_is_discarded_is_not_found_whoever_holds_it() -> None:
    pool = BlockPool(4, 1)
    known = filled(pool, 2)
    held = pool.match(known[:1])
    pool.share(held)
    for name in [*known, b"unknown"]:
        pool.discard(name)
    assert len(pool.match(known)) == 0 and counts(pool) == (3, 1, 0)
    pool.free(held)
    assert counts(pool) == (4, 0, 0)


def test_without_caching_nothing_outlives_its_owner() -> None:
    pool = BlockPool(4, 1, caching=False)
    assert len(pool.match(filled(pool, 2))) == 0
    assert counts(pool) == (4, 0, 0)


@pytest.mark.parametrize("twice", [np.array([0, 0], np.int32), np.array([3], np.int32)])
def test_a_block_that_is_freed_too_often_is_noticed(twice: np.ndarray) -> None:
    pool = BlockPool(4, 4)
    assert pool.allocate(1) is not None
    with pytest.raises(AssertionError):
        pool.free(twice)
        pool.check_integrity()


def test_the_name_of_a_block_covers_all_tokens_up_to_its_end_and_the_salt() -> None:
    tokens = np.arange(40, dtype=np.int32)
    made = BlockHashes(b"salt", 16).extend(tokens)
    first = sha256(root_hash(b"salt") + tokens[:16].tobytes()).digest()
    assert made == [first, sha256(first + tokens[16:32].tobytes()).digest()]
    grown = BlockHashes(b"salt", 16)
    for length in range(41):
        assert grown.extend(tokens[:length]) == made[: length // 16]
    other = tokens.copy()
    other[0] += 1
    assert not {*made} & {*BlockHashes(b"salt", 16).extend(other), *BlockHashes(b"", 16).extend(tokens)}


def test_the_host_tier_gives_and_takes_nothing_before_the_step_has_run() -> None:
    host = HostTier(3, 1)
    known = names(3)
    blocks = np.array([5, 6], np.int32)
    host.offload(7, known[2])
    slots = host.save(blocks, known[:1])
    assert slots is not None and len(host.pool.match(known)) == 0
    out, into = host.take()
    assert out.tolist() == [[7, 0], [5, slots[0]], [6, slots[1]]] and len(into) == 0
    host.offload(8, b"no room")  # nor is anything given up that is to be written
    assert len(host.take()[0]) == 0
    host.done(3, 0)
    assert len(host.pool.match(known[:1])) == 1 and host.pool.lookup(known[2]) is not None
    assert host.pool.counts().held == 2, "what a sequence has saved stays"
    assert host.save(np.array([9, 10], np.int32), []) is None, "one slot is left, which is cached"
    host.load(slots, np.array([1, 2], np.int32))
    assert host.take()[1].tolist() == [[slots[0], 1], [slots[1], 2]]
    assert host.pool.counts().held == 2, "it is still to be read"
    host.done(0, 2)
    assert host.pool.counts().held == 0 == host.num_lent


def test_what_a_failed_step_was_to_save_is_not_on_the_host() -> None:
    host = HostTier(4, 1)
    host.offload(7, b"name")
    host.failed()
    assert host.pool.counts().free == 4 and host.pool.lookup(b"name") is None


def by_simulation(remaining: list[int], missing: list[int], owned: list[int], size: int) -> int:
    """Every sequence decodes a token a step, and its blocks come back when it has ended."""
    peak = 0
    for step in range(max(remaining) + 1):
        held = 0
        for left, lacks, has in zip(remaining, missing, owned, strict=True):
            held += lacks + -(-step // size) if step <= left else -has
        peak = max(peak, held)
    return peak


def test_the_projected_peak_is_that_of_a_simulation() -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        count = int(rng.integers(1, 8))
        remaining, missing, owned = (rng.integers(0, most, count) for most in (60, 5, 12))
        size = int(rng.choice([1, 4, 16]))
        expected = by_simulation(remaining.tolist(), missing.tolist(), owned.tolist(), size)
        assert peak_growth(remaining, missing, owned, size) == expected

"""Promise: every transport keeps the contract of ``kv_transfer.transports.base``, alone and wrapped by ``faulty``."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from kv_transfer.core.events import Cancelled, Landed, Pushed, PushFailed
from kv_transfer.transports.build import TRANSPORTS, allocate_pool, make_receiver, make_sender
from messages.common import KVEndpoint
from tests.kv_transfer.kv_pair import Pair, key, scattered, shard_of_bytes

MakePair = Callable[..., Pair]
every_transport = pytest.mark.parametrize(
    ("transport", "wrapped"),
    [(transport, wrapped) for transport in TRANSPORTS for wrapped in (False, True)],
    ids=[f"{transport}{wrapped}" for transport in TRANSPORTS for wrapped in ("", "-faulty")],
)
TWO_SIDED = [transport for transport in TRANSPORTS if transport != "shm"]


def arrived(pair: Pair, count: int) -> list[int]:
    """Indices that have landed, as a two-sided receiver reports them; nothing for a one-sided one."""
    if pair.receiver.one_sided:
        return []
    return np.concatenate([event.indices for event in pair.received.landed(count)]).tolist()


@every_transport
@pytest.mark.parametrize("block_bytes", [512, 65_536 + 64, 3 << 20])
def test_scattered_blocks_arrive_and_nothing_else_is_written(
    transport: str, wrapped: bool, block_bytes: int, make_pair: MakePair
) -> None:
    num_blocks = 16 if block_bytes > 1 << 20 else 64
    pair = make_pair(transport, wrapped, num_blocks, block_bytes)
    count = num_blocks // 2
    source, target = scattered(1, count, num_blocks), scattered(2, count, num_blocks)
    source[:4] = [4, 5, 6, 7]  # a run, too
    pair.there[:] = 7
    pair.open(key(), 3, target)
    pair.push(key(), 3, source, target)
    assert pair.sent.next() == Pushed(key(), 3, count)
    assert arrived(pair, count) in ([], [*range(3, 3 + count)])
    np.testing.assert_array_equal(pair.there[target], pair.here[source])
    others = np.setdiff1d(np.arange(num_blocks), target)
    assert (pair.there[others] == 7).all()


@every_transport
def test_pushes_of_one_key_keep_their_order(transport: str, wrapped: bool, make_pair: MakePair) -> None:
    pair = make_pair(transport, wrapped)
    rows = scattered(1, 10)
    pair.open(key(), 0, rows)
    for source in range(40):  # each overwrites the one before it
        pair.push(key(), source % 10, np.array([source], np.int32), rows[source % 10 :][:1])
    assert pair.sent.until(Pushed(key(), 9, 1))
    pushed = [event.first for _ in range(3) for event in pair.sent.until(Pushed(key(), 9, 1))]
    assert pushed == [*range(10)] * 3
    arrived(pair, 40)
    np.testing.assert_array_equal(pair.there[rows], pair.here[30:40])


@every_transport
def test_many_transfers_at_once_do_not_mix(transport: str, wrapped: bool, make_pair: MakePair) -> None:
    pair = make_pair(transport, wrapped, 256)
    rows, source = scattered(1, 256, 256).reshape(32, 8), scattered(2, 256, 256).reshape(32, 8)
    for number in range(32):
        pair.open(key(number), 0, rows[number])
    for begin in range(8):
        for number in range(32):
            part = slice(begin, begin + 1)
            pair.push(key(number), begin, source[number, part], rows[number, part])
    assert len(pair.sent.until(Pushed(key(31), 7, 1))) == 256
    arrived(pair, 256)
    np.testing.assert_array_equal(pair.there[rows], pair.here[source])


@every_transport
def test_a_cancel_is_answered_once_and_nothing_is_written_after_it(
    transport: str, wrapped: bool, make_pair: MakePair
) -> None:
    pair = make_pair(transport, wrapped, 64, 1 << 20)
    rows = scattered(1, 60)
    pair.open(key(1), 0, rows[:50])
    pair.open(key(2), 0, rows[50:])
    for _ in range(4):
        pair.push(key(1), 0, np.arange(50, dtype=np.int32), rows[:50])
    pair.push(key(2), 0, np.arange(50, 60, dtype=np.int32), rows[50:])
    pair.sender.cancel(key(1))
    until = pair.sent.until(Cancelled(key(1)))
    if not wrapped:  # whose own copies give the rest time to be pushed
        assert until.count(Pushed(key(1), 0, 50)) < 4
    written = pair.there[rows[:50]].copy()
    pair.here[:50] = 0  # the blocks are the caller's again
    if Pushed(key(2), 0, 10) not in until:
        assert pair.sent.until(Pushed(key(2), 0, 10)) == [Pushed(key(2), 0, 10)]
    np.testing.assert_array_equal(pair.there[rows[50:]], pair.here[50:60])
    np.testing.assert_array_equal(pair.there[rows[:50]], written)
    pair.sender.cancel(key(9))  # of what was never pushed
    assert pair.sent.next() == Cancelled(key(9))
    assert pair.sent.empty


@pytest.mark.parametrize("transport", TWO_SIDED)
def test_close_fences_a_late_writer(transport: str, make_pair: MakePair) -> None:
    pair = make_pair(transport, False, 64, 1 << 20)
    rows = scattered(1, 50)
    pair.open(key(), 0, rows)
    pair.push(key(), 0, np.arange(50, dtype=np.int32), rows)
    pair.received.until(Landed)
    pair.receiver.close(key())  # in the middle of it
    there = pair.there.copy()
    assert pair.sent.next() == Pushed(key(), 0, 50)
    pair.push(key(), 0, np.arange(50, dtype=np.int32), rows)
    assert pair.sent.next() == Pushed(key(), 0, 50)
    np.testing.assert_array_equal(pair.there, there)
    pair.receiver.close(key())
    assert pair.receiver.dropped > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("transport", TWO_SIDED)
def test_only_the_indices_that_are_open_can_be_written(transport: str, make_pair: MakePair) -> None:
    pair = make_pair(transport, False)
    rows = scattered(1, 4)
    pair.open(key(), 2, rows)
    for first in (0, 1, 3, 2**20):
        pair.push(key(), first, np.arange(4, dtype=np.int32), rows)
        assert pair.sent.next() == Pushed(key(), first, 4)
    pair.push(key(1, attempt=2), 2, np.arange(4, dtype=np.int32), rows)
    assert pair.sent.next() == Pushed(key(1, attempt=2), 2, 4)
    assert not pair.there.any()
    assert pair.received.empty


@every_transport
def test_what_cannot_be_pushed_fails_and_the_next_push_goes_through(
    transport: str, wrapped: bool, make_pair: MakePair
) -> None:
    pair = make_pair(transport, wrapped)
    good = np.array([1, 2], np.int32)
    pair.open(key(), 0, good)
    bad: list[tuple[KVEndpoint, Any, Any]] = [
        (pair.to, good, np.array([0, 64], np.int32)),
        (pair.to, good, np.array([-1, 2], np.int32)),
        (pair.to, good, np.array([1], np.int32)),
        (msgspec.structs.replace(pair.to, address="nowhere"), good, good),
    ]
    if not wrapped:  # the wrapper's own copy would raise first, and it is for tests
        bad.append((pair.to, np.array([1, -2], np.int32), good))
        bad.append((pair.to, np.array([1, 64], np.int32), good))
    for to, source, target in bad:
        pair.push(key(), 0, source, target, to)
        assert isinstance(pair.sent.next(), PushFailed)
    assert not pair.there.any()
    pair.push(key(), 0, good, good)
    assert pair.sent.next() == Pushed(key(), 0, 2)
    pair.push(key(), 0, good[:0], good[:0])
    assert pair.sent.next() == Pushed(key(), 0, 0)


@every_transport
def test_a_forgotten_peer_can_be_pushed_to_again(transport: str, wrapped: bool, make_pair: MakePair) -> None:
    pair = make_pair(transport, wrapped)
    blocks = np.array([5, 6], np.int32)
    pair.open(key(), 0, blocks)
    for _ in range(3):
        pair.push(key(), 0, blocks, blocks)
        assert pair.sent.next() == Pushed(key(), 0, 2)
        pair.sender.forget(pair.to)


def test_an_unknown_transport_is_refused_by_name() -> None:
    memory, shard = allocate_pool("inproc", 1, 64), shard_of_bytes(64)
    for make in (
        lambda: allocate_pool("pigeon", 1, 64),
        lambda: make_sender("pigeon", memory.pool, shard, print),
        lambda: make_receiver("pigeon", "127.0.0.1", memory, shard, print),
    ):
        with pytest.raises(ValueError, match="unknown KV transport 'pigeon'; there are inproc, shm, nccl, zmq"):
            make()
    with pytest.raises(ValueError, match="needs a pool that allocate_pool made for shm"):
        make_receiver("shm", "127.0.0.1", memory, shard, print)
    memory.release()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_pool_is_zeroed_writable_and_page_aligned(transport: str) -> None:
    memory = allocate_pool(transport, 3, 1000)
    assert memory.pool.shape == (3, 1000) and memory.pool.dtype == np.uint8
    assert memory.pool.flags.c_contiguous and memory.pool.flags.writeable
    assert memory.pool.ctypes.data % 4096 == 0 and not memory.pool.any()
    memory.release()
    memory.release()
    with pytest.raises(ValueError, match="needs blocks"):
        allocate_pool(transport, 0, 1000)

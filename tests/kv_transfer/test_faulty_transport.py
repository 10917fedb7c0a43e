"""Promise: faults are what the schedule says, and the digests find every one that spoils a block."""

from itertools import islice
from random import Random
from typing import Any

import numpy as np
import pytest

from kv_transfer.core.digest import digests, mismatches
from kv_transfer.core.events import Blocks, Landed, Pushed, PushFailed
from kv_transfer.transports.build import make_receiver, make_sender
from kv_transfer.transports.faulty import Fault, FaultyReceiver, FaultySender, random_faults
from kv_transfer.transports.memory import PrivateMemory
from tests.kv_transfer.kv_pair import ALL, Events, key, scattered, shard_of_bytes

BLOCK = 512
SHARD = shard_of_bytes(BLOCK)
COUNT = 10
PUSHED = Pushed(key(), 0, COUNT)


class World:
    """An inproc pair of which one side, or both, are faulty."""

    def __init__(self, sending: Any = (), receiving: Any = ()) -> None:
        self.here = np.random.default_rng(0).integers(0, 256, (64, BLOCK), np.uint8)
        self.memory = PrivateMemory(64, BLOCK)
        self.there = self.memory.pool
        self.sent, self.received = Events(), Events()
        self.source, self.rows = scattered(1, COUNT), scattered(2, COUNT)
        self.receiver = FaultyReceiver(
            self.there, lambda on_event: make_receiver("inproc", "", self.memory, SHARD, on_event),
            self.received.put, receiving, Random(1),
        )  # fmt: skip
        self.sender = FaultySender(
            self.here,
            lambda pool, on_event: make_sender("inproc", pool, SHARD, on_event),
            self.sent.put,
            sending,
            Random(2),
        )
        self.receiver.open(key(), 0, self.rows, (ALL,))

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        self.sender.shutdown()
        self.receiver.shutdown()
        self.memory.release()

    def push(self, first: int = 0, count: int = COUNT) -> None:
        part = slice(first, first + count)
        self.sender.push(key(), self.receiver.endpoint, ALL, first, self.source[part], self.rows[part])

    def bad(self) -> Blocks:
        expected = digests(self.here, self.source, key(), 0)
        return mismatches(expected, digests(self.there, self.rows, key(), 0))


def test_a_dropped_push_is_reported_and_never_arrives() -> None:
    with World([Fault.DROP]) as world:
        world.push()
        assert world.sent.next() == PUSHED
        assert len(world.bad()) == COUNT and world.received.empty
        world.push()  # the schedule has run out
        assert world.sent.next() == PUSHED
        assert not len(world.bad())


@pytest.mark.parametrize(("fault", "spoiled"), [(Fault.CORRUPT, 1), (Fault.SWAP, 2)])
@pytest.mark.parametrize("side", ["sending", "receiving"])
def test_spoiled_blocks_are_found_and_the_senders_own_stay_whole(side: str, fault: Fault, spoiled: int) -> None:
    with World(**{side: [fault] * 50}) as world:
        before = world.here.copy()
        for _ in range(50):
            world.push()
            assert world.sent.next() == PUSHED
            assert len(world.received.until(Landed)) == 1
            assert len(world.bad()) == spoiled
        world.push()
        assert world.sent.next() == PUSHED
        assert not len(world.bad())
        np.testing.assert_array_equal(world.here, before)


def test_a_duplicate_is_reported_once_and_lands_twice() -> None:
    with World([Fault.DUPLICATE]) as world:
        world.push()
        world.push()
        assert [world.sent.next(), world.sent.next()] == [PUSHED, PUSHED]
        assert len(world.received.landed(3 * COUNT)) == 3
        assert world.sent.empty and world.received.empty and not len(world.bad())


def test_a_delayed_push_comes_after_the_next_one_or_when_it_is_released() -> None:
    with World([Fault.DELAY, Fault.NONE, Fault.DELAY]) as world:
        world.push(0, 5)
        world.push(5, 5)
        assert [world.sent.next().first, world.sent.next().first] == [5, 0]
        world.push(0, 5)
        assert world.sent.empty
        world.sender.release()
        assert world.sent.next() == Pushed(key(), 0, 5)
        assert not len(world.bad())


def test_arrivals_are_lost_repeated_and_late() -> None:
    with World((), [Fault.DROP, Fault.DUPLICATE, Fault.DELAY, Fault.NONE, Fault.DELAY]) as world:
        for first in range(5):
            world.push(first, 1)
        world.sent.until(Pushed(key(), 4, 1))
        assert [event.indices.tolist() for event in world.received.landed(4)] == [[1], [1], [3], [2]]
        assert world.received.empty
        world.receiver.release()
        assert world.received.next().indices.tolist() == [4]


def test_a_failed_push_is_reported_as_failed() -> None:
    with World([Fault.FAIL]) as world:
        world.push()
        assert world.sent.next() == PushFailed(key(), "an injected fault")
        assert not world.there.any()


def test_the_dead_are_silent() -> None:
    with World([Fault.NONE, Fault.DIE]) as world:
        world.push(0, 2)
        assert world.sent.next() == Pushed(key(), 0, 2)
        world.push(2, 2)
        world.push(4, 2)
        world.sender.cancel(key())
    assert world.sent.empty
    with World((), [Fault.DIE]) as world:
        world.push()
        world.push()
        world.sent.until(PUSHED)
        world.sent.until(PUSHED)
    assert world.received.empty


def test_the_same_seed_makes_the_same_faults() -> None:
    rates = {Fault.DROP: 0.2, Fault.CORRUPT: 0.1, Fault.DELAY: 0.1}

    def run() -> tuple[list[Fault], bytes]:
        drawn = list(islice(random_faults(Random(7), rates), 100))
        with World(drawn) as world:
            for _ in range(10):
                for place in range(COUNT):
                    world.push(place, 1)
            world.sender.release()
            world.sender.push(
                key(2), world.receiver.endpoint, ALL, 0, world.source, world.rows
            )  # behind all the others
            world.sent.until(Pushed(key(2), 0, COUNT))
            return drawn, world.there.tobytes()

    first, again = run(), run()
    assert first == again
    assert set(first[0]) == {*rates, Fault.NONE}

"""Promise: links can be made bad and sound again while they are used, and no push gets more than its one answer."""

import time
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest

from kv_transfer.core.digest import digests, mismatches
from kv_transfer.core.events import Cancelled, Landed, Pushed, PushFailed
from kv_transfer.transports.build import make_receiver, make_sender, make_senders
from kv_transfer.transports.faulty import Fault
from kv_transfer.transports.memory import PrivateMemory
from kv_transfer.transports.switched import SOUND, Links, LinkState, SwitchedSender
from kv_transfer.transports.zmq import ZmqSender
from tests.kv_transfer.kv_pair import ALL, Events, key, scattered, shard_of_bytes

BLOCK = 512
SHARD = shard_of_bytes(BLOCK)
COUNT = 10
PUSHED = Pushed(key(), 0, COUNT)


class World:
    """An inproc pair whose links are sound at first."""

    def __init__(self) -> None:
        self.here = np.random.default_rng(0).integers(0, 256, (64, BLOCK), np.uint8)
        self.memory = PrivateMemory(64, BLOCK)
        self.sent, self.received = Events(), Events()
        self.source, self.rows = scattered(1, COUNT), scattered(2, COUNT)
        self.receiver = make_receiver("inproc", "", self.memory, SHARD, self.received.put)
        self.links = Links(Random(0))
        self.sender = SwitchedSender(self.here, partial(make_sender, "inproc", shard=SHARD), self.sent.put, self.links)
        self.receiver.open(key(), 0, self.rows, (ALL,))

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        self.sender.shutdown()
        self.receiver.shutdown()
        self.memory.release()

    def push(self, number: int = 1) -> None:
        self.sender.push(key(number), self.receiver.endpoint, ALL, 0, self.source, self.rows)

    def bad(self) -> Any:
        expected = digests(self.here, self.source, key(), 0)
        return mismatches(expected, digests(self.memory.pool, self.rows, key(), 0))


def test_links_are_bad_for_as_long_as_they_are_told_to_be() -> None:
    with World() as world:
        for _ in range(3):
            world.links.state = LinkState({Fault.CORRUPT: 1.0})
            world.push()
            assert world.sent.next() == PUSHED
            world.received.until(Landed)
            assert len(world.bad()) == 1
            world.links.state = SOUND
            world.push()
            assert world.sent.next() == PUSHED
            world.received.until(Landed)
            assert not len(world.bad())


def test_that_a_link_is_cut_is_heard_at_once_or_later() -> None:
    with World() as world:
        world.links.state = LinkState({Fault.FAIL: 1.0})
        world.push()
        assert world.sent.next() == PushFailed(key(), "an injected fault")
        world.links.state = LinkState({Fault.FAIL: 1.0}, latency=0.1)
        begun = time.monotonic()
        world.push()
        assert world.sent.next() == PushFailed(key(), "an injected fault")
        assert time.monotonic() - begun >= 0.1 and not world.memory.pool.any()
        world.links.state = SOUND
        world.push()
        assert world.sent.next() == PUSHED and world.sent.empty


@pytest.mark.parametrize(
    "state", [SOUND, LinkState({Fault.DUPLICATE: 1.0}), LinkState(latency=60.0)], ids=["sound", "twice", "slow"]
)
def test_a_cancel_gets_one_answer_after_which_nothing_comes(state: LinkState) -> None:
    with World() as world:
        world.links.state = state
        world.push()
        world.sender.cancel(key())
        assert world.sent.until(Cancelled(key()))[-1] == Cancelled(key())
        world.links.state = SOUND
        world.push(2)
        assert world.sent.next() == Pushed(key(2), 0, COUNT) and world.sent.empty


def test_a_slow_link_takes_its_latency_and_the_time_of_the_bytes() -> None:
    with World() as world:
        world.links.state = LinkState(latency=0.05, bytes_per_second=COUNT * BLOCK / 0.1)
        begun = time.monotonic()
        world.push()
        world.push()
        assert [world.sent.next(), world.sent.next()] == [PUSHED, PUSHED]
        assert time.monotonic() - begun >= 0.25


def test_what_a_slow_link_still_has_is_there_as_soon_as_it_is_fast_again() -> None:
    with World() as world:
        world.links.state = LinkState(latency=60.0)
        world.push()
        world.received.until(Landed)
        assert world.sent.empty
        world.links.state = SOUND
        assert world.sent.next() == PUSHED


def test_without_chaos_a_worker_has_plain_senders() -> None:
    memory = PrivateMemory(4, BLOCK)
    senders = make_senders("zmq", memory, SHARD, Events().put)
    assert {name: type(sender) for name, sender in senders.items()} == {"zmq": ZmqSender}
    for sender in senders.values():
        sender.shutdown()
    memory.release()

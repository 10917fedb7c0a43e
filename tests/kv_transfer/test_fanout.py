"""Promise: however the ranks' answers mix, the session hears one answer to each thing it asked, when all have given
theirs."""

from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.core.digest import DIGEST_BYTES, combined
from kv_transfer.core.events import Cancelled, Landed, Pushed, PushFailed
from kv_transfer.core.fanout import DigestLane, Fanout, LaneDigested, OpenLanes, PushLane
from kv_transfer.core.lanes import Route, plan_lanes
from kv_transfer.core.session import CancelPushes, CloseLanding, Digested, LandingOpened, OpenLanding, Push, TakeDigests
from messages.common import KVEndpoint
from tests.kv_transfer.kv_pair import key
from tests.kv_transfer.test_lanes import split

degrees = st.sampled_from([1, 2, 3, 4])


def blocks(count: int) -> Any:
    return np.arange(count, dtype=np.int32)


def route(sending: int, receiving: int) -> Route:
    receivers = split(receiving, 6)
    to = tuple(KVEndpoint("test", f"rank {rank}", shard, 64) for rank, shard in enumerate(receivers))
    return Route(to, plan_lanes(split(sending, 6), receivers))


def digest_of(number: int, first: int, count: int) -> bytes:
    return Random(1000 * number + first).randbytes(count * DIGEST_BYTES)


@given(degrees, degrees, st.integers(0, 2**32))
def test_a_senders_ranks_answer_as_one_in_whatever_order(sending: int, receiving: int, seed: int) -> None:
    rng, way, fanout = Random(seed), route(sending, receiving), Fanout(sending)
    chunks = [(0, 3), (3, 1), (4, 5)]
    waiting: list[tuple[int, Any]] = []
    for first, count in chunks:
        for action in (
            Push(key(), way, first, blocks(count), blocks(count)),
            TakeDigests(key(), way, first, blocks(count), sent=True),
        ):  # fmt: skip
            parts = fanout.fan(action)
            assert len(parts) == len(way.lanes)
            waiting += parts
    rng.shuffle(waiting)
    heard: list[Any] = []
    for rank, part in waiting:
        if isinstance(part, PushLane):
            assert any(lane.sender == rank and lane.heads == part.heads for lane in way.lanes)
            heard += fanout.gather(rank, Pushed(key(), part.first, len(part.source), 10 * part.heads.num))
        else:
            assert isinstance(part, DigestLane)
            taken = digest_of(part.number, part.first, len(part.blocks))
            heard += fanout.gather(rank, LaneDigested(key(), part.number, part.first, taken))
    pushed = [event for event in heard if isinstance(event, Pushed)]
    assert sorted((event.first, event.count) for event in pushed) == chunks
    assert all(event.num_bytes == 60 for event in pushed)  # every head once
    digested = {event.first: event.digests for event in heard if isinstance(event, Digested)}
    assert digested == {
        first: combined([digest_of(number, first, count) for number in range(len(way.lanes))])
        for first, count in chunks
    }
    assert fanout.idle


@given(degrees, degrees, st.integers(0, 2**32))
def test_a_cancel_is_answered_once_by_all_and_leaves_nothing(sending: int, receiving: int, seed: int) -> None:
    rng, way, fanout = Random(seed), route(sending, receiving), Fanout(sending)
    pushes = fanout.fan(Push(key(), way, 0, blocks(3), blocks(3)))
    digests = fanout.fan(TakeDigests(key(), way, 0, blocks(3), sent=True))
    answered = rng.sample(pushes, rng.randrange(len(pushes)))
    for rank, _ in answered:
        assert not fanout.gather(rank, Pushed(key(), 0, 3))
    assert fanout.gather(0, PushFailed(key(), "gone")) == [PushFailed(key(), "gone")]
    cancels = fanout.fan(CancelPushes(key(), "test"))
    assert sorted(rank for rank, _ in cancels) == [*range(sending)]
    rng.shuffle(cancels)
    heard = [event for rank, _ in cancels for event in fanout.gather(rank, Cancelled(key()))]
    assert heard == [Cancelled(key())] and fanout.idle
    for rank, part in digests:  # too late
        assert isinstance(part, DigestLane)
        assert not fanout.gather(rank, LaneDigested(key(), part.number, 0, b"late"))
    assert not fanout.gather(0, Pushed(key(), 0, 3)) and fanout.idle


@given(degrees, degrees, st.integers(0, 2**32))
def test_a_block_has_landed_when_every_rank_has_it_and_again_after_a_repair(
    sending: int, receiving: int, seed: int
) -> None:
    rng, way, fanout = Random(seed), route(sending, receiving), Fanout(receiving)
    parts = fanout.fan(OpenLanding(key(), way, 2, blocks(8)))
    for rank, part in parts:
        assert isinstance(part, OpenLanes)
        assert sum(heads.num for heads in part.lanes) == way.to[rank].shard.num_heads
    rng.shuffle(parts)
    opened = [event for rank, _ in parts for event in fanout.gather(rank, LandingOpened(key()))]
    assert opened == [LandingOpened(key())]
    for _ in range(2):
        arrivals = [(rank, np.int32(index)) for rank in range(receiving) for index in range(2, 10)]
        rng.shuffle(arrivals)
        seen: dict[int, set[int]] = {}
        for rank, index in arrivals:
            seen.setdefault(int(index), set()).add(rank)
            heard = fanout.gather(rank, Landed(key(), np.array([index], np.int32)))
            if len(seen[int(index)]) < receiving:
                assert not heard
            else:
                assert [event.indices.tolist() for event in heard if isinstance(event, Landed)] == [[index]]
    assert not fanout.idle
    assert [rank for rank, _ in fanout.fan(CloseLanding(key()))] == [*range(receiving)]
    assert fanout.idle
    assert not fanout.gather(0, Landed(key(), blocks(8) + 2)) and not fanout.gather(0, LandingOpened(key()))


def test_digests_of_no_blocks_are_answered_too() -> None:
    """Where decode has every block in its cache."""
    way, fanout = route(2, 2), Fanout(2)
    heard: list[Any] = []
    for rank, part in fanout.fan(TakeDigests(key(), way, 3, blocks(0))):
        assert isinstance(part, DigestLane)
        heard += fanout.gather(rank, LaneDigested(key(), part.number, 3, b""))
    assert heard == [Digested(key(), 3, b"")]


@pytest.mark.parametrize("lanes", [2, 3, 5])
def test_no_lane_can_differ_alone_or_change_places_and_go_unseen(lanes: int) -> None:
    rng = Random(lanes)
    parts = [rng.randbytes(3 * DIGEST_BYTES) for _ in range(lanes)]
    whole = combined(parts)
    for place in range(lanes):
        changed = bytearray(parts[place])
        changed[DIGEST_BYTES] ^= 1
        assert combined([*parts[:place], bytes(changed), *parts[place + 1 :]]) != whole
    assert combined([parts[1], parts[0], *parts[2:]]) != whole
    assert combined(parts[:1]) == parts[0]

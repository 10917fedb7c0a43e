"""Promise: whatever the two sides' ranks hold, each head that a rank of the receiver needs comes to it exactly once."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.core.lanes import CannotPair, Heads, Lane, check_pair, plan_lanes
from messages.common import KVShard


def shard(first: int, num: int, total: int, **changes: object) -> KVShard:
    fields: dict[str, object] = {
        "num_layers": 2, "head_dim": 8, "block_size": 4, "dtype": "float32",
        "total_heads": total, "first_head": first, "num_heads": num,
    }  # fmt: skip
    return KVShard(**{**fields, **changes})  # type: ignore[arg-type]


def split(ranks: int, heads: int) -> list[KVShard]:
    """As tensor parallelism does it: each rank has its share, or one head that others have too."""
    if ranks > heads:
        return [shard(rank * heads // ranks, 1, heads) for rank in range(ranks)]
    cuts = [rank * heads // ranks for rank in range(ranks + 1)]
    return [shard(first, end - first, heads) for first, end in pairwise(cuts)]


def covered(first: int, end: int, heads: int) -> KVShard:
    return shard(first, end - first, heads)


@st.composite
def any_shards(draw: st.DrawFn, heads: int) -> list[KVShard]:
    """Ranges that overlap as they like, and together have every head."""
    cuts = sorted({0, heads, *draw(st.lists(st.integers(0, heads), max_size=6))})
    pairs = list(pairwise(cuts))
    extra = draw(st.lists(st.tuples(st.integers(0, heads - 1), st.integers(1, heads)), max_size=3))
    pairs += [(first, min(heads, first + num)) for first, num in extra]
    return [covered(first, end, heads) for first, end in draw(st.permutations(pairs))]


def check(senders: list[KVShard], receivers: list[KVShard]) -> tuple[Lane, ...]:
    lanes = plan_lanes(senders, receivers)
    assert list(lanes) == sorted(lanes, key=lambda lane: (lane.receiver, lane.heads))
    for rank, receiver in enumerate(receivers):
        heads = [head for lane in lanes if lane.receiver == rank for head in range(lane.heads.first, sum(lane.heads))]
        assert heads == [*range(receiver.first_head, receiver.first_head + receiver.num_heads)]
    for lane in lanes:
        held = senders[lane.sender]
        assert held.first_head <= lane.heads.first and sum(lane.heads) <= held.first_head + held.num_heads
    return lanes


@given(st.integers(1, 40).flatmap(lambda heads: st.tuples(any_shards(heads), any_shards(heads))))
def test_every_rank_gets_each_of_its_heads_once_from_one_that_has_it(
    pair: tuple[list[KVShard], list[KVShard]],
) -> None:
    check(*pair)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12])
def test_every_pair_of_degrees_is_planned_without_a_lane_too_many(heads: int) -> None:
    degrees = [degree for degree in (1, 2, 3, 4, 6, 8, 16)]
    for sending in degrees:
        for receiving in degrees:
            lanes = check(split(sending, heads), split(receiving, heads))
            assert len(lanes) <= receiving + min(sending, heads) - 1, (sending, receiving)
            if sending == receiving:
                assert [(lane.sender, lane.receiver) for lane in lanes] == [(rank, rank) for rank in range(sending)]


def test_heads_that_several_ranks_have_come_from_all_of_them() -> None:
    lanes = check(split(4, 2), split(8, 2))
    assert [lane.sender for lane in lanes] == [0, 1, 0, 1, 2, 3, 2, 3]


def test_the_pairs_of_the_plan_are_those_that_one_expects() -> None:
    assert check(split(2, 4), split(1, 4)) == (Lane(0, 0, Heads(0, 2)), Lane(1, 0, Heads(2, 2)))
    assert check(split(1, 4), split(2, 4)) == (Lane(0, 0, Heads(0, 2)), Lane(0, 1, Heads(2, 2)))
    assert [lane[:2] for lane in check(split(2, 4), split(4, 4))] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert check(split(3, 4), split(2, 4)) == (
        Lane(0, 0, Heads(0, 1)), Lane(1, 0, Heads(1, 1)), Lane(2, 1, Heads(2, 2)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_layers": 3}, "num_layers 2 cannot land in a pool of num_layers 3"),
        ({"head_dim": 16}, "head_dim"), ({"block_size": 8}, "block_size"), ({"total_heads": 5}, "total_heads"),
    ],
)  # fmt: skip
def test_pools_of_other_shapes_do_not_pair_and_it_is_said_why(changes: dict[str, object], told: str) -> None:
    with pytest.raises(CannotPair, match=told):
        plan_lanes([shard(0, 4, 4)], [shard(0, 4, 4, **changes)])


def test_a_head_that_no_rank_sends_is_named() -> None:
    with pytest.raises(CannotPair, match="no rank of the sender has KV head 2"):
        plan_lanes([shard(0, 2, 4), shard(3, 1, 4)], [shard(0, 4, 4)])
    with pytest.raises(CannotPair, match="without KV"):
        plan_lanes([], [shard(0, 4, 4)])


def test_floats_become_any_dtype_and_what_is_quantised_stays_so() -> None:
    floats, quantised = ["float32", "bfloat16", "float16"], ["int8", "fp8"]
    for source in floats + quantised:
        for target in floats + quantised:
            here, there = (shard(0, 4, 4, dtype=dtype) for dtype in (source, target))
            if source in floats or source == target:
                check_pair(here, there)
            else:
                with pytest.raises(CannotPair, match=f"KV of dtype {source} cannot land in a pool of {target}"):
                    check_pair(here, there)


def test_a_shard_outside_its_model_is_refused() -> None:
    with pytest.raises(ValueError, match="KV heads from 3 on"):
        shard(3, 2, 4)

"""Promise: the ranks of a group hold every head between them, whatever their numbers, and no rank has none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.shards import head_shard, part, ranks_of


@given(st.integers(0, 1000), st.integers(1, 64))
def test_parts_are_everything_in_order_and_differ_by_one_at_most(count: int, size: int) -> None:
    parts = [part(count, rank, size) for rank in range(size)]
    assert [each for share in parts for each in share] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@st.composite
def groups(draw: st.DrawFn) -> tuple[int, int, int]:
    kv_heads, group = draw(st.integers(1, 16)), draw(st.integers(1, 8))
    return kv_heads * group, kv_heads, draw(st.integers(1, kv_heads * group))


@given(groups())
def test_each_query_head_is_on_one_rank_beside_the_kv_head_that_it_reads(shape: tuple[int, int, int]) -> None:
    heads, kv_heads, size = shape
    shards = [head_shard(heads, kv_heads, rank, size) for rank in range(size)]
    assert [head for shard in shards for head in shard.query] == list(range(heads))
    for shard in shards:
        queries_a_head, rest = divmod(len(shard.query), len(shard.kv))
        assert queries_a_head > 0 and rest == 0
        for place, head in enumerate(shard.query):
            assert shard.kv[place // queries_a_head] == head // (heads // kv_heads)
    for head in range(kv_heads):
        assert [rank for rank in range(size) if head in shards[rank].kv] == list(ranks_of(head, kv_heads, size))


def test_three_kv_heads_on_two_ranks_and_two_on_four() -> None:
    assert [(shard.query, shard.kv) for shard in (head_shard(9, 3, rank, 2) for rank in range(2))] == [
        (range(0, 3), range(0, 1)),
        (range(3, 9), range(1, 3)),
    ]
    assert [(shard.query, shard.kv) for shard in (head_shard(4, 2, rank, 4) for rank in range(4))] == [
        (range(0, 1), range(0, 1)),
        (range(1, 2), range(0, 1)),
        (range(2, 3), range(1, 2)),
        (range(3, 4), range(1, 2)),
    ]


def test_more_ranks_than_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="4 attention heads cannot be shared among 5 ranks"):
        head_shard(4, 2, 0, 5)

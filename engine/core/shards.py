"""Which part of a model each rank of a tensor-parallel group holds. Ranges are of the whole model's numbering.

A rank holds whole KV heads with the query heads that read them; where KV heads are fewer than ranks, several ranks hold
the same KV head, and share its query heads out. Nothing need divide evenly: 3 KV heads on 2 ranks are 1 and 2.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeadShard:
    """One rank's attention heads. Each of its KV heads is read by equally many of its query heads."""

    query: range
    kv: range


def part(count: int, rank: int, size: int) -> range:
    """The share of ``rank`` in ``count`` things; shares differ by one at most, and together they are everything."""
    return range(rank * count // size, (rank + 1) * count // size)


def head_shard(num_heads: int, num_kv_heads: int, rank: int, size: int) -> HeadShard:
    """The heads of ``rank``. Raises ``ValueError`` where some rank would have none."""
    if size > num_heads:
        raise ValueError(f"{num_heads} attention heads cannot be shared among {size} ranks")
    group = num_heads // num_kv_heads
    if size <= num_kv_heads:
        kv = part(num_kv_heads, rank, size)
        return HeadShard(range(kv.start * group, kv.stop * group), kv)
    head = rank * num_kv_heads // size
    holders = ranks_of(head, num_kv_heads, size)
    mine = part(group, rank - holders.start, len(holders))
    return HeadShard(range(head * group + mine.start, head * group + mine.stop), range(head, head + 1))


def ranks_of(kv_head: int, num_kv_heads: int, size: int) -> range:
    """The ranks that hold ``kv_head``: one, or several where KV heads are fewer than ranks."""
    if size <= num_kv_heads:
        rank = ((kv_head + 1) * size - 1) // num_kv_heads
        return range(rank, rank + 1)
    return range(-(-kv_head * size // num_kv_heads), -(-(kv_head + 1) * size // num_kv_heads))

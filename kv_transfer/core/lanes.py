"""Which heads go from which rank to which, where two workers cut their KV differently.

A lane is one range of heads on its way from one rank of the sender to one rank of the receiver. Both ends plan the
same lanes from the same shards, so a lane is named by its place in the plan.
"""

from collections.abc import Sequence
from typing import NamedTuple

from engine.core.kv_layout import QUANTIZED_MAX, KVLayout
from messages.common import KVEndpoint, KVShard


class CannotPair(ValueError):
    """KV of these shards cannot be handed over; says why."""


class Heads(NamedTuple):
    """The model's KV heads ``first``, ``first + 1``, ... ``num`` of them."""

    first: int
    num: int


class Layers(NamedTuple):
    """The model's layers ``first``, ... up to ``end``, which is not one of them."""

    first: int
    end: int


class Lane(NamedTuple):
    sender: int
    """Rank."""
    receiver: int
    """Rank."""
    heads: Heads


Lanes = tuple[Lane, ...]


class Route(NamedTuple):
    """The way from one worker to another: where its ranks' pools are, and the lanes into them."""

    to: tuple[KVEndpoint, ...]
    """All by one transport."""
    lanes: Lanes

    @property
    def transport(self) -> str:
        return self.to[0].transport

    def heads_to(self, receiver: int) -> tuple[Heads, ...]:
        """Of each lane into that rank."""
        return tuple(lane.heads for lane in self.lanes if lane.receiver == receiver)


def heads_of(shard: KVShard) -> Heads:
    return Heads(shard.first_head, shard.num_heads)


def layout_of(shard: KVShard, heads: Heads | None = None) -> KVLayout:
    """Of a rank's blocks, or of ``heads`` of them as they travel."""
    count = shard.num_heads if heads is None else heads.num
    return KVLayout(shard.num_layers, count, shard.head_dim, shard.block_size, shard.dtype)


def shard_of(layout: KVLayout, total_heads: int, first_head: int = 0) -> KVShard:
    """The shard whose blocks are laid out so; raises ``ValueError`` where it is none."""
    return KVShard(
        num_layers=layout.num_layers,
        head_dim=layout.head_dim,
        block_size=layout.block_size,
        dtype=layout.dtype,  # type: ignore[arg-type]  # a KVLayout has no other
        total_heads=total_heads,
        first_head=first_head,
        num_heads=layout.num_kv_heads,
    )


def plan_lanes(senders: Sequence[KVShard], receivers: Sequence[KVShard]) -> Lanes:
    """The lanes that give each rank of the receiver each of its heads once, by receiver and head.

    Heads that several senders hold come from the one with the least to send. Raises ``CannotPair``.
    """
    if not senders or not receivers:
        raise CannotPair("a worker without KV")
    for shard in (*senders, *receivers):
        check_pair(senders[0], shard)
    load = [0] * len(senders)
    lanes: list[Lane] = []
    for receiver, shard in enumerate(receivers):
        head, end = shard.first_head, shard.first_head + shard.num_heads
        while head < end:
            ends = {
                rank: min(held.first_head + held.num_heads, end)
                for rank, held in enumerate(senders)
                if held.first_head <= head < held.first_head + held.num_heads
            }
            if not ends:
                raise CannotPair(f"no rank of the sender has KV head {head}")
            sender = min(ends, key=lambda rank: (load[rank], -ends[rank], rank))
            lanes.append(Lane(sender, receiver, Heads(head, ends[sender] - head)))
            load[sender] += ends[sender] - head
            head = ends[sender]
    return tuple(lanes)


def check_pair(sender: KVShard, receiver: KVShard) -> None:
    """Raise ``CannotPair`` unless records of ``sender`` can become records of ``receiver``."""
    for what in ("num_layers", "head_dim", "block_size", "total_heads"):
        here, there = getattr(sender, what), getattr(receiver, what)
        if here != there:
            raise CannotPair(f"KV of {what} {here} cannot land in a pool of {what} {there}")
    if sender.dtype != receiver.dtype and sender.dtype in QUANTIZED_MAX:
        raise CannotPair(f"KV of dtype {sender.dtype} cannot land in a pool of {receiver.dtype}; make both the same")

"""Which transport carries KV from one worker to another.

Each rank of a worker says on which host it is and which transports it offers: one where the topology names it, several
under ``auto``. The sender takes the best that both offer and that reaches, for all ranks alike, and names it in
``OpenTransfer``; the receiver looks at it in the same way, and accepts or refuses.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from kv_transfer.core.lanes import CannotPair, Route, plan_lanes
from messages.common import KVEndpoint, KVRank


class Kind(NamedTuple):
    """What is to be known of a transport."""

    one_sided: bool
    """Whether the receiver does not see the writes, and so cannot refuse a late one."""
    one_host: bool
    """Whether each end must be able to map the other's memory."""


KINDS = {
    "inproc": Kind(one_sided=False, one_host=True),
    "cuda_ipc": Kind(one_sided=True, one_host=True),
    "shm": Kind(one_sided=True, one_host=True),
    "nccl": Kind(one_sided=False, one_host=False),
    "zmq": Kind(one_sided=False, one_host=False),
}
"""The best first."""


def choose(senders: Sequence[KVRank], receivers: Sequence[KVRank], avoid: Collection[str] = ()) -> str:
    """The best transport that goes from all of ``senders`` to all of ``receivers``, one of ``avoid`` only if there is
    no other. Raises ``CannotPair``, which says why none does."""
    reasons = {transport: misfit(transport, senders, receivers) for transport in KINDS}
    usable = [transport for transport, reason in reasons.items() if not reason]
    if not usable:
        offered = {way.transport for rank in (*senders, *receivers) for way in rank.ways}
        whys = [f"{transport}: {reason}" for transport, reason in reasons.items() if transport in offered]
        raise CannotPair("; ".join(whys) or "no transport is offered")
    return next((transport for transport in usable if transport not in avoid), usable[0])


def misfit(transport: str, senders: Sequence[KVRank], receivers: Sequence[KVRank]) -> str:
    """Why ``transport`` does not go from all of ``senders`` to all of ``receivers``; empty where it does."""
    if transport not in KINDS:
        return "there is no such transport"
    for side, ranks in (("prefill", senders), ("decode", receivers)):
        if not ranks or not all(_offers(rank, transport) for rank in ranks):
            others = sorted({way.transport for rank in ranks for way in rank.ways})
            return f"the {side} worker offers {', '.join(others) or 'none'}; give both the same kv.transport"
    if KINDS[transport].one_host and len({rank.host for rank in (*senders, *receivers)}) > 1:
        return "neither can map the other's memory (another host, container or user); set kv.transport to auto or zmq"
    return ""


def route(transport: str, senders: Sequence[KVRank], receivers: Sequence[KVRank]) -> Route:
    """The way by ``transport``, head by head; raises ``CannotPair``."""
    reason = misfit(transport, senders, receivers)
    if reason:
        raise CannotPair(f"{transport}: {reason}")
    lanes = plan_lanes([rank.shard for rank in senders], [rank.shard for rank in receivers])
    return Route(endpoints(receivers, transport), lanes)


def endpoints(ranks: Sequence[KVRank], transport: str) -> tuple[KVEndpoint, ...]:
    """Of each of ``ranks``, all of which offer ``transport``."""
    return tuple(
        next(
            KVEndpoint(transport, way.address, rank.shard, rank.num_blocks)
            for way in rank.ways
            if way.transport == transport
        )
        for rank in ranks
    )


def _offers(rank: KVRank, transport: str) -> bool:
    return any(way.transport == transport for way in rank.ways)

"""Which protocol a process speaks: what all its messages are made of, in short."""

import hashlib
from functools import cache

import msgspec

from messages import (
    decode_to_prefill,
    gateway_to_router,
    gateway_to_worker,
    leader_to_rank,
    prefill_to_decode,
    rank_to_leader,
    router_to_gateway,
    router_to_worker,
    worker_to_gateway,
    worker_to_router,
)
from messages.common import Message

_DIRECTIONS = (
    decode_to_prefill, gateway_to_router, gateway_to_worker, leader_to_rank, prefill_to_decode, rank_to_leader,
    router_to_gateway, router_to_worker, worker_to_gateway, worker_to_router,
)  # fmt: skip


@cache
def protocol() -> str:
    """12 hex digits: equal where every message has the same fields, types and bounds, different where one has not."""
    found = {
        kind.__name__: kind
        for module in _DIRECTIONS
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Message)
    }
    schemas, parts = msgspec.json.schema_components([found[name] for name in sorted(found)])
    return hashlib.sha256(msgspec.json.encode((schemas, parts), order="sorted")).hexdigest()[:12]

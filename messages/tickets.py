"""KV tickets: minted by the router, bound to one attempt and one pair of worker incarnations, checked by decode.

HMAC-SHA256 (RFC 2104) under a key that the launcher draws for the cluster and gives to the router and the workers;
nothing of it comes from a client.
"""

import hashlib
import hmac

from messages.common import Ticket, WorkerAddress
from messages.ids import Attempt, Epoch, RequestId, WorkerId


def mint(key: bytes, request: RequestId, attempt: Attempt, prefill: WorkerAddress, decode: WorkerAddress) -> Ticket:
    """A ticket for one attempt; it dies with either incarnation."""
    pair = (prefill.worker, prefill.epoch, decode.worker, decode.epoch)
    mac = _mac(key, request, attempt, *pair)
    return Ticket(prefill=pair[0], prefill_epoch=pair[1], decode=pair[2], decode_epoch=pair[3], mac=mac)


def valid(key: bytes, ticket: Ticket, request: RequestId, attempt: Attempt) -> bool:
    """Whether the router minted ``ticket`` for just this attempt."""
    pair = (ticket.prefill, ticket.prefill_epoch, ticket.decode, ticket.decode_epoch)
    return hmac.compare_digest(ticket.mac, _mac(key, request, attempt, *pair))


def valid_between(
    key: bytes, ticket: Ticket, request: RequestId, attempt: Attempt, prefill: WorkerAddress, decode: WorkerAddress
) -> bool:
    """Whether the router minted ``ticket`` for just this attempt, from ``prefill`` to ``decode``."""
    named = (ticket.prefill, ticket.prefill_epoch, ticket.decode, ticket.decode_epoch)
    pair = (prefill.worker, prefill.epoch, decode.worker, decode.epoch)
    return named == pair and valid(key, ticket, request, attempt)


def _mac(
    key: bytes, request: RequestId, attempt: Attempt, prefill: WorkerId, prefill_epoch: Epoch,
    decode: WorkerId, decode_epoch: Epoch,
) -> bytes:  # fmt: skip
    fields = (request, str(attempt), prefill, str(prefill_epoch), decode, str(decode_epoch))
    # Lengths keep ("ab", "c") and ("a", "bc") apart.
    text = b"".join(len(part).to_bytes(4, "little") + part for part in (field.encode() for field in fields))
    return hmac.new(key, text, hashlib.sha256).digest()

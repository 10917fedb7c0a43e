"""Proof that a message about the membership comes from within the cluster.

HMAC-SHA256 (RFC 2104) over the whole message but the proof itself, under the cluster's key: see ``messages.tickets``.
Who can only reach a mailbox can neither enter the membership, nor take another's place or have it taken for gone.
"""

import hashlib
import hmac
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from messages.codec import encode
from messages.common import Message

_PURPOSE = b"baton membership\0"  # no ticket's text begins like this


class Sealed(Message, frozen=True, kw_only=True):
    """A message that its receiver heeds only with a proof."""

    mac: Annotated[bytes, Meta(max_length=32)] = b""


S = TypeVar("S", bound=Sealed)


def seal(key: bytes, message: S) -> S:
    """``message`` with its proof."""
    return msgspec.structs.replace(message, mac=_mac(key, message))


def genuine(key: bytes, message: Sealed) -> bool:
    """Whether someone who knows ``key`` has sealed just this message."""
    return hmac.compare_digest(message.mac, _mac(key, message))


def _mac(key: bytes, message: Sealed) -> bytes:
    return hmac.new(key, _PURPOSE + encode(msgspec.structs.replace(message, mac=b"")), hashlib.sha256).digest()

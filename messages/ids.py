"""Ids are types: a request is not a worker, an attempt is not a block. What comes from the wire is bounded."""

from typing import Annotated, NewType

from msgspec import Meta

RequestId = NewType("RequestId", Annotated[str, Meta(min_length=1, max_length=128)])
"""One for each sequence (each child of ``n`` or of a prompt list): 128 random bits in hex, drawn by the gateway, which
are the id that its client knows, and the number of the choice."""

Attempt = NewType("Attempt", int)
"""1, 2, 3, ... within one request. A newer attempt fences the older ones: what they still send is dropped."""

WorkerId = NewType("WorkerId", Annotated[str, Meta(min_length=1, max_length=256)])
"""The name that the topology gives a worker, such as ``prefill-0``; it survives restarts."""

Epoch = NewType("Epoch", Annotated[int, Meta(ge=0, le=2**63 - 1)])
"""63 random bits, drawn at the start of a process: tells a restarted worker from the one before it."""

BlockId = NewType("BlockId", int)
"""The number of a KV block in one worker's pool."""

_HOST = r"([A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])"
_ENDPOINT = rf"\Atcp://{_HOST}:[1-9][0-9]{{0,4}}\Z"
Address = NewType("Address", Annotated[str, Meta(max_length=300, pattern=_ENDPOINT)])
"""A ZeroMQ endpoint, such as ``tcp://127.0.0.1:40123``. Nothing else is connected to because a message says so."""

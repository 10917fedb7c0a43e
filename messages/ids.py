"""Ids are types: a request is not a worker, an attempt is not a block."""

from typing import NewType

RequestId = NewType("RequestId", str)
"""128 random bits in hex, drawn by the gateway: one for each sequence (each child of ``n`` or of a prompt list)."""

Attempt = NewType("Attempt", int)
"""1, 2, 3, ... within one request. A newer attempt fences the older ones: what they still send is dropped."""

WorkerId = NewType("WorkerId", str)
"""The name that the topology gives a worker, such as ``prefill-0``; it survives restarts."""

Epoch = NewType("Epoch", int)
"""63 random bits, drawn at the start of a process: tells a restarted worker from the one before it."""

BlockId = NewType("BlockId", int)
"""The number of a KV block in one worker's pool."""

Address = NewType("Address", str)
"""A ZeroMQ endpoint, such as ``tcp://127.0.0.1:40123``."""

"""Frames of the ``zmq`` and ``nccl`` transports: the header of a data message, and the receiver's answer to it.

A data message is a header and then one or more parts, each a whole number of blocks, ``count`` blocks in all: some
layers and heads of the sequence's blocks ``first``, ``first + 1``, ... in order. Where they go is the receiver's own
knowledge.
"""

from typing import Annotated

from msgspec import Meta

from kv_transfer.core.events import TransferKey
from kv_transfer.core.lanes import Heads, Layers
from messages.codec import Decode, decoder_for
from messages.common import MAX_SIDE, AttemptMessage, Count, Message, Side

MAX_BLOCKS = 2**16
"""In one data message."""
MAX_PARTS = 1024
"""Of one data message, its header not counted."""
MAX_PART_BYTES = 64 << 20
"""The largest part that a receiver takes; a block must fit in one part."""


class DataHeader(AttemptMessage, frozen=True):
    """What the parts behind it are."""

    number: Count
    """Counts up over a sender's messages to one receiver."""
    first: Annotated[int, Meta(ge=0, le=2**22)]
    count: Annotated[int, Meta(ge=1, le=MAX_BLOCKS)]
    block_bytes: Annotated[int, Meta(ge=1, le=MAX_PART_BYTES)]
    """Of these layers and heads."""
    first_layer: Annotated[int, Meta(ge=0, lt=MAX_SIDE)]
    num_layers: Side
    first_head: Annotated[int, Meta(ge=0, lt=MAX_SIDE)]
    num_heads: Side

    @property
    def key(self) -> TransferKey:
        return TransferKey(self.request, self.attempt)

    @property
    def layers(self) -> Layers:
        return Layers(self.first_layer, self.first_layer + self.num_layers)

    @property
    def heads(self) -> Heads:
        return Heads(self.first_head, self.num_heads)


class Meet(Message, frozen=True):
    """Over a connection of ``nccl``, while a group forms: what one end's torch sets for the other's to read. An empty
    key: no more will be set."""

    key: Annotated[str, Meta(max_length=256)]
    value: Annotated[bytes, Meta(max_length=2048)] = b""


class Taken(Message, frozen=True):
    """The receiver has taken, or dropped, every message up to ``number``: so much may follow."""

    number: Count


decode_header: Decode = decoder_for(DataHeader)
decode_taken: Decode = decoder_for(Taken)
decode_meet: Decode = decoder_for(Meet)
"""From one frame to a ``DataHeader``, a ``Taken`` or a ``Meet``; ``BadMessage`` for anything else."""


def whole_blocks(header: DataHeader, sizes: list[int]) -> bool:
    """Whether parts of ``sizes`` bytes are just the blocks that ``header`` announces."""
    whole = all(size and size % header.block_bytes == 0 for size in sizes)
    return whole and sum(sizes) == header.count * header.block_bytes

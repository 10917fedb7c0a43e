"""What names a transfer, and what its transport reports: the words that the session and the transports share."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from messages.ids import Attempt, RequestId

Blocks = NDArray[np.int32]
"""Block numbers, in the order of the sequence."""
Pool = NDArray[np.uint8]
"""``[num_blocks, block_bytes]``, C-contiguous: one worker's KV cache as bytes."""


class TransferKey(NamedTuple):
    """Names one transfer; a new attempt is another transfer."""

    request: RequestId
    attempt: Attempt


class Live(IntEnum):
    """Which step makes the blocks of a push final; each layer of them is pushed when it is there."""

    NO = 0
    """None: they are final."""
    NEXT = 1
    """The one that is to run next."""
    RUNNING = 2
    """The one that runs. Another rank than rank 0 may have it behind itself when it hears of the push."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """The blocks at ``first .. first + count`` of the sequence have left the sender's pool."""

    key: TransferKey
    first: int
    count: int
    num_bytes: int = field(default=0, compare=False)
    """That went to the peer for it."""
    early_bytes: int = field(default=0, compare=False)
    """Of them those that had gone before the last layer of the step that computes them was there. 0 for a push of
    blocks that were final before."""
    at: float = field(default=0.0, compare=False)
    """When the last of them had gone: seconds of the host's monotonic clock."""
    layers: tuple[tuple[int, float, float], ...] = field(default=(), compare=False)
    """Of a push layer by layer each piece: the layer that it ended before, when it was begun, when it had gone."""


@dataclass(frozen=True, slots=True)
class PushFailed:
    """The peer cannot be written to."""

    key: TransferKey
    detail: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Nothing is being written for this key any more, and nothing will be."""

    key: TransferKey


@dataclass(frozen=True, slots=True)
class Landed:
    """Blocks at ``indices`` (int32, within the sequence) have been written into the receiver's pool."""

    key: TransferKey
    indices: Blocks


TransportEvent = Pushed | PushFailed | Cancelled | Landed

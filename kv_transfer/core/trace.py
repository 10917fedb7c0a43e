"""When the KV of one hand-over left, beside the prompt that was being computed: what metrics and pictures are made of.

All times are seconds of the sender's monotonic clock, NaN for what never came.
"""

from dataclasses import dataclass

from kv_transfer.core.events import TransferKey


@dataclass(frozen=True, slots=True)
class PushTrace:
    """The blocks ``first .. first + count`` of the sequence, pushed at once."""

    first: int
    count: int
    live: bool
    """Asked for before the end of the step that computes them, to leave layer by layer."""
    asked: float
    left: float
    """When the last byte had left."""
    num_bytes: int
    hidden_bytes: int
    """Of them those that had left before the prompt's last layer was computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferTrace:
    """One hand-over as its sender saw it, handed out when it ends."""

    key: TransferKey
    opened: float
    accepted: float
    computed: float
    """When the first token was known."""
    acked: float
    """When the receiver had verified it all."""
    num_blocks: int
    """That the receiver did not have."""
    cached_blocks: int
    """That it had."""
    repairs: int
    """Rounds in which blocks were asked for again."""
    pushes: tuple[PushTrace, ...]
    """In the order in which they were asked for."""

    @property
    def num_bytes(self) -> int:
        return sum(push.num_bytes for push in self.pushes)

    @property
    def hidden_bytes(self) -> int:
        """That left while the prompt was being computed."""
        return sum(push.hidden_bytes for push in self.pushes)

    @property
    def share_hidden(self) -> float:
        """Of all bytes; 1 where there were none to move."""
        return self.hidden_bytes / self.num_bytes if self.num_bytes else 1.0

    @property
    def first_push(self) -> float:
        return min((push.asked for push in self.pushes), default=float("nan"))

    @property
    def last_byte(self) -> float:
        return max((push.left for push in self.pushes), default=float("nan"))

"""The receiving side of a KV transfer."""

from messages.codec import check_packed
from messages.common import AttemptMessage, Count, Detail, PackedBlocks
from messages.ids import Address


class TransferAccepted(AttemptMessage, frozen=True):
    """Blocks are reserved: push the sequence's blocks ``cached_blocks``, ... into these, in order."""

    blocks: PackedBlocks
    """Block numbers in decode's pool, packed int32."""
    cached_blocks: Count
    """Leading blocks of the sequence that decode already has."""

    def __post_init__(self) -> None:
        check_packed(self.blocks)


class TransferPending(AttemptMessage, frozen=True):
    """Answers what is asked again while there is no answer yet: it is known here, and waits for blocks, or for digests.
    Where not even this comes, the way between the two is cut."""


class TransferRefused(AttemptMessage, frozen=True):
    """No room is reserved, and none will be: another pair, or none, must run this request."""

    retryable: bool
    detail: Detail


class TransferAcked(AttemptMessage, frozen=True):
    """Everything landed and was verified: the sender may free its blocks."""


class BlocksWanted(AttemptMessage, frozen=True):
    """Push these again: missing, or their digest is wrong."""

    round: Count
    """Of the end that this answers; a sender that is further on does not heed it."""
    indices: PackedBlocks
    """Indices within the sequence's blocks, packed int32."""

    def __post_init__(self) -> None:
        check_packed(self.indices)


class CancelTransfer(AttemptMessage, frozen=True):
    """The receiver wants no more of this: stop writing, free, and say so with ``TransferClosed``."""

    mailbox: Address
    """The receiver's, for a sender that has forgotten the transfer."""
    detail: Detail


class TailOffered(AttemptMessage, frozen=True):
    """The receiver would compute what it lacks of the prompt itself: answered by ``TailYielded``, unless the sender has
    got further than its open. Then the transfer goes on, and so it does when this is lost."""

    mailbox: Address
    """The receiver's."""

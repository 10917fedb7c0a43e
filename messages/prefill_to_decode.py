"""The sending side of a KV transfer. Each message is idempotent and sent again until it is answered."""

from typing import Annotated

from msgspec import Meta

from messages.common import (
    MAX_RANKS,
    AttemptMessage,
    Count,
    Detail,
    Generation,
    KVRank,
    Logprobs,
    Name,
    Part,
    Rate,
    Seconds,
    Ticket,
    TokenId,
    WorkerAddress,
)
from messages.common import PackedBlocks as PackedDigests
from messages.ids import Address, Epoch


class FirstToken(Part, frozen=True):
    """The token that the prefill worker sampled; decode goes on from it."""

    token: TokenId
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None


class OpenTransfer(AttemptMessage, frozen=True):
    """Reserve room for the KV of ``generation``. Answered by ``TransferAccepted`` or ``TransferRefused``."""

    prefill: WorkerAddress
    gateway: Address
    generation: Generation
    transport: Name
    """That the sender has chosen of those that both offer."""
    ranks: Annotated[tuple[KVRank, ...], Meta(max_length=MAX_RANKS)]
    """The sender's KV: by it and by its own the receiver knows what will come from whom, and a one-sided one sees by
    its ways whether the writers live."""
    ticket: Ticket
    probe: bool = False
    """Nothing goes on from it: the blocks are verified and freed. Refused unless there are free ones for it at once."""
    cached_tokens: Count = 0
    """What the sender need not compute."""
    prefill_rate: Rate = 0.0
    """The sender's prompt tokens a second, of late."""
    transfer_latency: Seconds = 0.0
    """Of its hand-overs to this receiver, from the computed prompt to the ack, whatever their size; 0 with a rate of 0:
    not known."""
    transfer_rate: Rate = 0.0
    """KV bytes a second on top of that; 0 where they make no difference."""


class EndTransfer(AttemptMessage, frozen=True):
    """Every block has been pushed. Answered by ``TransferAcked``, or ``BlocksWanted`` where some are bad."""

    mailbox: Address
    """The sender's, for a receiver that has forgotten the transfer."""
    round: Count
    """1 the first time, one more after each repair; a resend keeps its number."""
    first: FirstToken
    num_blocks: Count
    """Blocks pushed: all of the sequence's but those that decode had cached."""
    digests: PackedDigests
    """8 bytes a block, in the order of the sequence; see ``kv_transfer.core.digest``."""


class TransferProgress(AttemptMessage, frozen=True):
    """More has been pushed: the blocks stay reserved. A one-sided receiver does not see it by itself."""


class TransferClosed(AttemptMessage, frozen=True):
    """The sender will write no more for this attempt (and all older ones), whoever ended it."""

    reason: Detail
    epoch: Epoch
    """The sender's: another process at the same mailbox can say nothing of what this one's ranks may still write."""


class TailYielded(AttemptMessage, frozen=True):
    """``TailOffered`` is taken: nothing has been pushed, nothing will be, and no token was sampled. The attempt is the
    receiver's from here, prompt and all. Sent again until ``TransferAcked`` comes."""

    mailbox: Address
    """The sender's."""

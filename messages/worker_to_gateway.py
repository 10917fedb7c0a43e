"""What prefill and decode workers send straight to the gateway, never through the router."""

from typing import Annotated

from msgspec import Meta

from messages.codec import check_packed
from messages.common import (
    AttemptMessage,
    Count,
    Detail,
    FailReason,
    Generation,
    Logprobs,
    Message,
    Name,
    PackedTokens,
    Part,
    WorkerAddress,
)
from messages.ids import Attempt, RequestId, WorkerId
from messages.sampling import FinishReason


class TokenChunk(Part, frozen=True):
    """Consecutive output tokens of one attempt."""

    request: RequestId
    attempt: Annotated[Attempt, Meta(ge=1, le=2**31)]
    index: Count
    """Output position of the first token, those of earlier attempts counted in."""
    tokens: PackedTokens
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    """With the first chunk only: entries for prompt tokens 1, 2, ..."""
    finish: FinishReason | None = None
    """Set on the last chunk: these are all the tokens. Sent again until an ``EndAck`` comes."""
    kv_bytes: Count = 0
    """KV bytes that moved for this attempt, with the first chunk that decode sends."""
    cached_tokens: Count = 0
    """Tokens of the prompt whose KV was there already, with the first chunk of whoever computed the others."""

    def __post_init__(self) -> None:
        check_packed(self.tokens)


class TokenBatch(Message, frozen=True):
    """What one step of a worker made for the requests of one gateway."""

    worker: WorkerId
    chunks: tuple[TokenChunk, ...]


class AttemptFailed(AttemptMessage, frozen=True):
    """The worker gives this attempt up and has freed what it held."""

    worker: WorkerId
    reason: FailReason
    detail: Detail


class Adopted(AttemptMessage, frozen=True):
    """What the worker has of a request that is the gateway's from now on, as this attempt."""

    worker: WorkerAddress
    generation: Generation
    """As the attempt got it."""
    tokens: TokenChunk
    """All that the attempt has made so far; what follows comes in ``TokenBatch``."""
    running: bool
    """Where False the attempt has made nothing yet, and is not the gateway's: it shall be aborted, and a further one
    placed."""


class NotHere(Message, frozen=True):
    """The worker cannot let the request be adopted: it does not have it, or no longer."""

    request: RequestId
    worker: WorkerId


class Superseded(AttemptMessage, frozen=True):
    """Another gateway has adopted the request: this attempt is over for who hears it, and nothing is to be aborted."""

    worker: WorkerId


MAX_MARKS = 1024
"""Of one worker about one attempt."""

Fact = Annotated[str, Meta(max_length=256)] | int | float


class Mark(Part, frozen=True):
    """Something that was done for one attempt, or happened to it."""

    track: Name
    """What it belongs to: steps, transfer, digests, tokens."""
    name: Name
    begin: float
    """Seconds of the process's monotonic clock."""
    end: float
    """The same as ``begin`` for what takes no time."""
    facts: Annotated[dict[Name, Fact], Meta(max_length=16)]


class Timeline(AttemptMessage, frozen=True):
    """All that a worker did for an attempt that is traced, once its part is over. Sent once: a trace may lack it."""

    worker: WorkerId
    clock: Name
    """Processes that name the same clock have one: a host's, since its boot."""
    sent: float
    """By that clock, like every mark."""
    marks: Annotated[tuple[Mark, ...], Meta(max_length=MAX_MARKS)]
    dropped: Count = 0
    """Marks that were too many."""

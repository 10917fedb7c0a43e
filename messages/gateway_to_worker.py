"""What a gateway sends to prefill and decode workers."""

from messages.common import AttemptMessage, Count, Generation, Ticket, WorkerAddress
from messages.ids import Address


class Prefill(AttemptMessage, frozen=True):
    """Compute the prompt's KV and the first token, then hand the KV over to ``decode``."""

    gateway: Address
    generation: Generation
    decode: WorkerAddress
    ticket: Ticket


class Generate(AttemptMessage, frozen=True):
    """Run the whole sequence on one worker, without a hand-over."""

    gateway: Address
    generation: Generation


class Abort(AttemptMessage, frozen=True):
    """Stop this attempt and all older ones, and free what they hold. No answer."""

    keep: bool = False
    """The answer is complete (a stop string): its tokens are kept for a while, as after an ``EndAck``."""


class EndAck(AttemptMessage, frozen=True):
    """The gateway has every token up to the end: the worker may forget the request."""

    keep: bool = False
    """Not at once: the client may not have everything yet, and another gateway may have to tell it."""


class TokensWanted(AttemptMessage, frozen=True):
    """Send again from output token ``index``: some were lost on the way. Where the attempt is over at the worker that
    decodes it, the answer is ``AttemptFailed``."""

    index: Count
    gateway: Address

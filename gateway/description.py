"""What a gateway must know of a request, besides its tokens and sampling parameters, to go on with its answer: it
travels with the work, so that whoever adopts the sequences can. It holds no secret, and only gateways look into it.
"""

from collections.abc import Mapping

import msgspec
from msgspec import Struct

from gateway.core.session import Session
from gateway.orders import Plan, Prompt
from messages.codec import unpack_tokens
from messages.common import MAX_DESCRIPTION


class Description(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Of one choice."""

    chat: bool
    created: int
    """Seconds since 1970."""
    num_choices: int
    """Of the whole answer."""
    n: int
    """Of each prompt."""
    num_prompt_tokens: int
    """Of all prompts together."""
    stops: tuple[str, ...]
    include_stop: bool
    echo: bool
    text: str | None
    """The prompt's, where the answer begins with it and the client has sent text."""
    logprobs: bool
    include_usage: bool
    return_token_ids: bool
    trace: bool
    """Whether the last chunk says who ran it."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Description)


def describe(plan: Plan, prompt: Prompt, *, chat: bool, created: int, trace: bool) -> bytes:
    """A choice of ``prompt``. Empty where nobody else can go on with it: an answer in one piece, or a prompt that is to
    be repeated and far too long."""
    if not plan.stream:
        return b""
    description = Description(
        chat=chat,
        created=created,
        num_choices=len(plan.sampling),
        n=plan.n,
        num_prompt_tokens=plan.num_prompt_tokens,
        stops=plan.stops,
        include_stop=plan.include_stop,
        echo=plan.echo,
        text=prompt.text if plan.echo else None,
        logprobs=plan.logprobs,
        include_usage=plan.include_usage,
        return_token_ids=plan.return_token_ids,
        trace=trace,
    )
    packed = _encoder.encode(description)
    return packed if len(packed) <= MAX_DESCRIPTION else b""


def description_of(session: Session) -> Description | None:
    """None for what no gateway of this version has made."""
    try:
        return _decoder.decode(session.description)
    except (ValueError, RecursionError):  # msgspec's own errors, and text that is no UTF-8
        return None


def plan_of(description: Description, sessions: Mapping[int, Session]) -> Plan:
    """The plan of an answer of whose choices there are these sessions; nothing is known of other choices' prompts."""
    choices = range(description.num_choices)
    known = {index // description.n: session for index, session in sessions.items()}
    some = next(iter(sessions.values()))
    return Plan(
        prompts=[_prompt(known.get(number)) for number in range(description.num_choices // description.n)],
        sampling=[sessions[index].sampling if index in sessions else some.sampling for index in choices],
        num_prompt_tokens=description.num_prompt_tokens,
        n=description.n,
        cache_salt="",
        stops=description.stops,
        include_stop=description.include_stop,
        echo=description.echo,
        logprobs=description.logprobs,
        stream=True,
        include_usage=description.include_usage,
        resumable=True,
        return_token_ids=description.return_token_ids,
    )


def _prompt(session: Session | None) -> Prompt:
    description = None if session is None else description_of(session)
    if session is None or description is None:
        return Prompt(None, [], b"")
    return Prompt(description.text, unpack_tokens(session.prompt).tolist(), session.prompt)

"""What comes back, by vLLM's names."""

from collections.abc import Callable
from dataclasses import dataclass

from gateway.choice import Choice
from gateway.core.errors import GatewayError
from gateway.core.session import Deliver
from messages.common import Logprobs
from messages.sampling import FinishReason


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural, of the model's own distribution."""

    logprob: float
    rank: int
    """1 is the likeliest token."""
    decoded_token: str


TokenLogprobs = dict[int, Logprob]
"""The token itself and its likeliest alternatives at one position, by token id."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None
    """stop, length or None while it grows."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt and what came of it so far."""

    prompt: str | None
    """None where the prompt was token ids."""
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    """One a prompt token, None for the first, where they were asked for."""
    outputs: list[CompletionOutput]
    finished: bool


class Sample:
    """One growing sample: a listener of the hub that keeps all it hears."""

    def __init__(self, choice: Choice, decoded: Callable[[int], str], *, logprobs: bool) -> None:
        self.error: GatewayError | None = None
        self.prompt_logprobs: Logprobs | None = None
        self._choice = choice
        self._decoded = decoded
        self._text = ""
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = [] if logprobs else None
        self._sum = 0.0
        self._finish: FinishReason | None = None

    @property
    def over(self) -> bool:
        return self._choice.over

    def deliver(self, tokens: Deliver, now: float) -> bool:
        if tokens.prompt_logprobs is not None:
            self.prompt_logprobs = tokens.prompt_logprobs
        before = self._choice.num_tokens
        complete = self._choice.deliver(tokens, now)
        used = self._choice.num_tokens - before
        if self._logprobs is not None and tokens.logprobs is not None:
            self._logprobs += by_position(tokens.tokens[:used], tokens.logprobs, self._decoded)
            self._sum += sum(tokens.logprobs.sampled[:used])
        return complete

    def ended(self, reason: FinishReason, now: float) -> None:
        self._choice.ended(reason, now)

    def failed(self, error: GatewayError) -> None:
        self.error = error
        self._choice.failed(error)

    def output(self) -> CompletionOutput:
        piece = self._choice.take(even_without_text=True)
        if piece is not None:
            self._text += piece.text
            self._tokens += piece.tokens
            self._finish = piece.finish
        return CompletionOutput(
            index=self._choice.index,
            text=self._text,
            token_ids=list(self._tokens),
            cumulative_logprob=None if self._logprobs is None else self._sum,
            logprobs=None if self._logprobs is None else list(self._logprobs),
            finish_reason=None if self._finish is None else self._finish.value,
        )


def by_position(tokens: list[int], logprobs: Logprobs, decoded: Callable[[int], str]) -> list[TokenLogprobs]:
    """One entry for each of ``tokens``, which may be fewer than there are log-probabilities."""
    positions = []
    for place, token in enumerate(tokens):
        entry = {token: Logprob(logprobs.sampled[place], logprobs.ranks[place], decoded(token))}
        top = zip(logprobs.top_ids[place], logprobs.top_logprobs[place], strict=True)
        for rank, (other, logprob) in enumerate(top, 1):
            entry.setdefault(other, Logprob(logprob, rank, decoded(other)))
        positions.append(entry)
    return positions

"""One choice of an answer while it grows: tokens in, text out.

Pieces that the client has not taken yet are joined, so a slow client costs no more than the answer's length, and delays
nobody.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from gateway.core.errors import GatewayError
from gateway.core.positions import START, Position
from gateway.core.session import Deliver
from gateway.core.stop_strings import StopStrings
from gateway.detokenizer import Detokenizer
from gateway.metrics import Metrics
from messages.common import Logprobs
from messages.sampling import FinishReason


class TokenLogprob(NamedTuple):
    token: int
    logprob: float | None
    """None for the first token of a prompt."""
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class Piece:
    """What came since the last ``take``."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    first: bool = False
    """Whether nothing was taken before."""
    skipped: list[int] = field(default_factory=list)
    """Tokens before ``logprobs`` whose log-probabilities the client has from an earlier reading of the stream."""


class Echo:
    """A prompt, with which all its choices begin. Its log-probabilities come with the first tokens of the first choice;
    until then the others hold back what they have."""

    def __init__(self, text: str, tokens: list[int], *, logprobs: bool) -> None:
        self.text = text
        self.scores: list[TokenLogprob] | None = None if logprobs else []
        """One a token; empty where they are not wanted, None where they are not there yet."""
        self.tokens = tokens

    def scored(self, logprobs: Logprobs | None) -> None:
        """The first choice's first tokens are there."""
        if self.scores is None:
            known = [] if logprobs is None else entries(self.tokens[1:], logprobs)
            self.scores = [TokenLogprob(self.tokens[0], None, ()), *known]


class Choice:
    """A ``Listener`` of the hub.

    One that is ``resumed`` gets the tokens from the first one on, as any other does, but begins behind ``after``: what
    the client has been sent up to there is left out.
    """

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        stops: StopStrings,
        *,
        include_stop: bool,
        logprobs: bool,
        echo: Echo | None,
        is_first: bool,
        arrived: float,
        changed: Callable[[], None],
        metrics: Metrics,
        after: Position = START,
        resumed: bool = False,
    ) -> None:
        """``echo``: the prompt, to begin with. ``is_first``: of this prompt. ``arrived``: when the request came in.
        ``resumed``: somebody has read it before, up to ``after``; it is not timed."""
        self.index = index
        self.num_tokens = 0
        self.cached_tokens = 0
        """Of the prompt: their KV was there already."""
        self.finish: FinishReason | None = None
        self.error: GatewayError | None = None
        self.first_at: float | None = None
        self.last_at = arrived
        self._arrived = arrived
        self._detokenizer = detokenizer
        self._stops = stops
        self._include_stop = include_stop
        self._with_logprobs = logprobs
        self._scores = echo if is_first else None
        self._echo = None if after.begun else echo
        self._changed = changed
        self._metrics = metrics
        self._after = after
        self._resumed = resumed
        self._stopped = False
        self.position = after
        """Of what was taken so far."""
        self.fresh = False
        """Whether something came since the last ``take``."""
        self._text: list[str] = []
        self._piece = Piece()
        if after.begun and echo is not None and logprobs:
            self._piece.skipped += echo.tokens

    @property
    def over(self) -> bool:
        return self.finish is not None or self.error is not None

    @property
    def stop_string(self) -> str:
        """That has ended it; empty where none has."""
        return self._stops.matched

    @property
    def ttft(self) -> float | None:
        return None if self.first_at is None or self._resumed else self.first_at - self._arrived

    @property
    def tpot(self) -> float | None:
        if self.first_at is None or self.num_tokens < 2 or self._resumed:
            return None
        return (self.last_at - self.first_at) / (self.num_tokens - 1)

    def deliver(self, tokens: Deliver, now: float) -> bool:
        if tokens.tokens:
            self._observe(now)
        self.replay(tokens)
        self._changed()
        return self._stopped

    def replay(self, tokens: Deliver) -> bool:
        """Take in the next tokens; those up to ``after`` for what follows from them only. True if the text is complete
        with them."""
        if self._scores is not None:
            self._scores.scored(tokens.prompt_logprobs)
        used = self._decode(tokens.tokens, silent_last=tokens.finish is FinishReason.STOP and not self._include_stop)
        known = min(used, max(0, self._after.tokens - self.num_tokens))
        self.num_tokens += used
        self.cached_tokens = max(self.cached_tokens, tokens.cached_tokens)
        piece = self._piece
        piece.tokens += tokens.tokens[known:used]
        if self._with_logprobs and tokens.logprobs is not None:
            piece.skipped += tokens.tokens[:known]
            piece.logprobs += entries(tokens.tokens[:used], tokens.logprobs)[known:]
        self.fresh = True
        return self._stopped

    def known(self) -> None:
        """The client has all of it, up to ``after``."""
        self.num_tokens, self.finish = self._after.tokens, FinishReason.STOP

    def _decode(self, tokens: list[int], *, silent_last: bool) -> int:
        """Append the tokens' text; how many of them there were up to a stop string. The token that ended the sequence
        is silent: it belongs to the output, but not to its text."""
        speaking = len(tokens) - silent_last
        for i in range(speaking):
            text, self._stopped = self._stops.feed(self._detokenizer.step(tokens[i]))
            if text and self.num_tokens + i >= self._after.tokens:
                self._text.append(text)
            if self._stopped:
                return i + 1
        return len(tokens)

    def ended(self, reason: FinishReason, now: float) -> None:
        self.finished(reason)
        if not self._resumed:
            self._metrics.e2e.observe(now - self._arrived)
        if self.tpot is not None:
            self._metrics.tpot.observe(self.tpot)
        self._changed()

    def finished(self, reason: FinishReason) -> None:
        """There are no more tokens."""
        if self._scores is not None:
            self._scores.scored(None)  # they will not come, where they have not yet
        if not self._stopped:
            text, self._stopped = self._stops.feed(self._detokenizer.flush())
            self._text.append(text if self._stopped else text + self._stops.flush())
        self.finish = FinishReason.STOP if self._stopped else reason
        self.fresh = True

    def failed(self, error: GatewayError) -> None:
        self.error = error
        self._changed()

    def take(self, *, even_without_text: bool) -> Piece | None:
        """What came since the last time; None where that is nothing to show."""
        if self._after.ended or (self.num_tokens == 0 and self.finish is None):
            return None
        if self._echo is not None and not self._begin_with(self._echo):
            return None
        self.fresh = False
        piece = self._piece
        if not (self._text or self.finish is not None or (even_without_text and (piece.tokens or piece.logprobs))):
            return None
        piece.text = "".join(self._text)
        piece.finish = self.finish
        piece.first = not self.position.begun
        self.position = Position(max(self.num_tokens, self._after.tokens), self.finish is not None)
        self._text.clear()
        self._piece = Piece()
        return piece

    def _begin_with(self, echo: Echo) -> bool:
        """Put the prompt before what came so far; False where its log-probabilities are not there yet."""
        if echo.scores is None:
            return False
        self._text.insert(0, echo.text)
        self._piece.logprobs[:0] = echo.scores
        self._echo = None
        return True

    def _observe(self, now: float) -> None:
        if self.first_at is None:
            self.first_at = now
            if not self._resumed:
                self._metrics.ttft.observe(now - self._arrived)
        else:
            self._metrics.itl.observe(now - self.last_at)
        self.last_at = now


def entries(tokens: list[int], logprobs: Logprobs) -> list[TokenLogprob]:
    """The log-probabilities of ``tokens``, which may be fewer than there are entries."""
    return [
        TokenLogprob(token, logprobs.sampled[i], tuple(zip(logprobs.top_ids[i], logprobs.top_logprobs[i], strict=True)))
        for i, token in enumerate(tokens)
    ]

"""Answers as JSON in the shape of OpenAI's API, with vLLM's ``token_ids`` and our ``baton`` where asked for."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import msgspec

from gateway.choice import Choice, Piece, TokenLogprob
from gateway.core.errors import GatewayError
from gateway.hub import Relay
from gateway.orders import Plan
from gateway.tokenization import Tokenizer

LEAST_LOGPROB = -9999.0
"""JSON has no infinity; OpenAI's stand-in for it."""

encode = msgspec.json.Encoder().encode


def error_body(error: GatewayError) -> dict[str, Any]:
    return {
        "error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code},
    }


def retry_after(error: GatewayError) -> int | None:
    """What the header ``Retry-After`` says: whole seconds."""
    return None if error.retry_after is None else max(1, math.ceil(error.retry_after))


def error_event(error: GatewayError, event_id: str) -> bytes:
    """The error that ends a stream. Its headers are long sent, so ``retry_after`` stands in it."""
    body = error_body(error)
    seconds = retry_after(error)
    if seconds is not None:
        body["error"]["retry_after"] = seconds
    return event(body, event_id)


def event(body: Any, event_id: str) -> bytes:
    """One server-sent event; ``core/positions.py`` says what its id means."""
    return b"id: " + event_id.encode() + b"\ndata: " + encode(body) + b"\n\n"


def done(event_id: str) -> bytes:
    """The last event."""
    return b"id: " + event_id.encode() + b"\ndata: [DONE]\n\n"


class Renderer:
    """One answer's JSON. ``id`` is the server's; the tokens' own texts come from ``tokenizer``."""

    whole: ClassVar[str]
    """The type of an answer in one piece."""
    part: ClassVar[str]
    prefix: ClassVar[str]

    def __init__(
        self, request_id: str, model: str, plan: Plan, tokenizer: Tokenizer, *, created: int, trace: bool
    ) -> None:
        """``created``: seconds since 1970."""
        self._plan = plan
        self._trace = trace
        self._token_text = lru_cache(4096)(tokenizer.token_text)
        self._head: dict[str, Any] = {
            "id": self.prefix + request_id,
            "object": self.whole,
            "created": created,
            "model": model,
        }
        self.even_without_text = plan.logprobs or plan.return_token_ids
        """Whether tokens are worth a chunk that have no text yet."""
        head = encode(self._head | {"object": self.part})
        self._before = b"\ndata: " + head[:-1] + b',"choices":['
        self._after = b'],"usage":null}\n\n' if plan.include_usage else b"]}\n\n"

    def chunk(self, choice: Choice, relay: Relay, piece: Piece, event_id: str) -> bytes:
        """The event that carries ``piece``."""
        body = self._part(choice, piece)
        self._add_extras(body, choice, relay, piece)
        return b"id: " + event_id.encode() + self._before + encode(body) + self._after

    def usage_chunk(self, choices: Sequence[Choice], event_id: str) -> bytes:
        return event(self._head | {"object": self.part, "choices": [], "usage": self._usage(choices)}, event_id)

    def answer(self, choices: Sequence[Choice], relays: Sequence[Relay], pieces: Sequence[Piece]) -> bytes:
        """The whole answer in one piece."""
        bodies = []
        for choice, relay, piece in zip(choices, relays, pieces, strict=True):
            body = self._whole(choice, piece)
            self._add_extras(body, choice, relay, piece)
            bodies.append(body)
        return encode(self._head | {"choices": bodies, "usage": self._usage(choices)})

    def _part(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """A choice in a chunk."""
        raise NotImplementedError

    def _whole(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def _add_extras(self, body: dict[str, Any], choice: Choice, relay: Relay, piece: Piece) -> None:
        if self._plan.return_token_ids:
            body["token_ids"] = piece.tokens
        if self._trace and piece.finish is not None:
            body["baton"] = relay.baton | {"ttft_ms": _ms(choice.ttft), "tpot_ms": _ms(choice.tpot)}

    def _usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        prompt = self._plan.num_prompt_tokens
        completion = sum(choice.num_tokens for choice in choices)
        cached = sum(choice.cached_tokens for choice in choices if choice.index % self._plan.n == 0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class CompletionRenderer(Renderer):
    whole = part = "text_completion"
    prefix = "cmpl-"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._offsets = [0] * len(self._plan.sampling)  # characters of each choice's tokens so far

    def _part(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": piece.text,
            "logprobs": self._logprobs(choice, piece) if self._plan.logprobs else None,
            "finish_reason": piece.finish,
        }

    _whole = _part

    def _add_extras(self, body: dict[str, Any], choice: Choice, relay: Relay, piece: Piece) -> None:
        super()._add_extras(body, choice, relay, piece)
        if self._plan.return_token_ids and piece.first:
            body["prompt_token_ids"] = self._plan.prompts[choice.index // self._plan.n].tokens

    def _logprobs(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        self._offsets[choice.index] += sum(len(self._token_text(token)[0]) for token in piece.skipped)
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for entry in piece.logprobs:
            text, _ = self._token_text(entry.token)
            tokens.append(text)
            offsets.append(self._offsets[choice.index])
            self._offsets[choice.index] += len(text)
            if entry.logprob is None:
                values.append(None)
                tops.append(None)
                continue
            values.append(_finite(entry.logprob))
            top = {self._token_text(token)[0]: _finite(value) for token, value in entry.top}
            tops.append(top | {text: _finite(entry.logprob)})
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


class ChatRenderer(Renderer):
    whole = "chat.completion"
    part = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._plan.return_token_ids:
            self._head["prompt_token_ids"] = self._plan.prompts[0].tokens

    def chunk(self, choice: Choice, relay: Relay, piece: Piece, event_id: str) -> bytes:
        line = super().chunk(choice, relay, piece, event_id)
        if self._plan.return_token_ids and piece.first:
            line = line[:-3] + b',"prompt_token_ids":' + encode(self._plan.prompts[0].tokens) + b"}\n\n"
        return line

    def _part(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        delta: dict[str, str] = {"role": "assistant"} if piece.first else {}
        if piece.text or piece.first:
            delta["content"] = piece.text
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": self._logprobs(piece.logprobs) if self._plan.logprobs else None,
            "finish_reason": piece.finish,
        }

    def _whole(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece.logprobs) if self._plan.logprobs else None,
            "finish_reason": piece.finish,
        }

    def _logprobs(self, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        content = []
        for entry in logprobs:
            body = self._token(entry.token, entry.logprob)
            content.append(body | {"top_logprobs": [self._token(token, value) for token, value in entry.top]})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, raw = self._token_text(token)
        return {"token": text, "logprob": _finite(logprob or 0.0), "bytes": list(raw)}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)

"""A model that is a function: KV names the tokens that it was made of, so whoever reads it can tell if it is right.

The next token is made of the seed, the position and all tokens before it: a gap, a repeat or a resume in the wrong
place changes every token behind it.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from engine.core.outputs import TokenLogprobs
from messages.common import KVShard
from messages.sampling import FinishReason, SamplingParams

BLOCK, LAYERS, HEADS, VOCABULARY = 4, 2, 2, 50
EOS = 7
"""Ends a sequence, unless it is to be ignored."""
_KINDS = np.array([3, 5, 7, 11, 13, 17, 19, 23], np.uint32).reshape(LAYERS, 2, HEADS)
_KNOWN = 4096
"""Prefixes whose KV is remembered."""


def shards(ranks: int) -> list[KVShard]:
    """What each of ``ranks`` ranks holds of the KV."""
    own = HEADS // ranks
    return [KVShard(LAYERS, 1, BLOCK, "float32", HEADS, rank * own, own) for rank in range(ranks)]


class Transcript(NamedTuple):
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of the tokens."""
    text: str
    reason: FinishReason


class Truth:
    """What KV has to be, and which token follows."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], np.ndarray[Any, Any]] = {}

    def kv(self, tokens: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """uint32 ``[token, layer, k|v, head]``."""
        known = self._known.get(tokens)
        if known is None:
            if len(self._known) == _KNOWN:
                self._known.clear()
            known = self._known[tokens] = np.array(_names(tokens), np.uint32)[:, None, None, None] * _KINDS
        return known

    def fingerprints(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Of each block that ``tokens`` fill, the last one perhaps in part: a number for its tokens and all before."""
        names = _names(tokens)
        return (*names[BLOCK - 1 :: BLOCK], *(names[-1:] if len(tokens) % BLOCK else ()))

    def next(self, tokens: tuple[int, ...], seed: int = 0) -> int:
        """The token that follows ``tokens``, drawn with ``seed``."""
        return _draw(_names(tokens)[-1], seed, len(tokens)) % VOCABULARY

    def scores(self, tokens: tuple[int, ...], token: int, num_top: int) -> TokenLogprobs:
        """What is said of ``token``, which follows ``tokens``."""
        drawn = _draw(_names(tokens)[-1], token, len(tokens))
        top = tuple((drawn + 11 * place) % VOCABULARY for place in range(num_top))
        return TokenLogprobs(
            token, -(drawn % 997) / 64, 1 + drawn % 5, top, tuple(-1.0 - place for place in range(num_top))
        )

    def answer(self, prompt: tuple[int, ...], count: int, seed: int = 0) -> list[int]:
        """The ``count`` tokens after ``prompt``, whatever ends a sequence."""
        tokens = prompt
        for _ in range(count):
            tokens += (self.next(tokens, seed),)
        return list(tokens[len(prompt) :])

    def transcript(self, prompt: tuple[int, ...], params: SamplingParams, stop: tuple[str, ...] = ()) -> Transcript:
        """The whole answer, as a run without faults gives it."""
        tokens, text, logprobs, reason = prompt, "", [], FinishReason.LENGTH
        while len(tokens) - len(prompt) < params.max_tokens:
            token = self.next(tokens, params.seed)
            logprobs.append(self.scores(tokens, token, 0).logprob)
            tokens += (token,)
            if (token == EOS and not params.ignore_eos) or token in params.stop_token_ids:
                reason = FinishReason.STOP
                break
            text += text_of(token)
            ends = [each for each in stop if text.endswith(each)]
            if ends:
                text, reason = text[: -max(map(len, ends))], FinishReason.STOP
                break
        return Transcript(tokens[len(prompt) :], tuple(logprobs), text, reason)


def text_of(token: int) -> str:
    """One character; several tokens have the same."""
    return "abcdefghij"[token % 10]


@lru_cache(_KNOWN)
def _names(tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Of each token one number that stands for it and all before it."""
    names, name = [], 1
    for token in tokens:
        name = (name * 1000003 + token + 1) & 0xFFFFFFFF
        names.append(name)
    return tuple(names)


def _draw(name: int, seed: int, position: int) -> int:
    """A number that is as good as random (the finalizer of MurmurHash3)."""
    mixed = (name ^ (seed * 0x9E3779B1 + position * 0x85EBCA77)) & 0xFFFFFFFF
    mixed = ((mixed ^ mixed >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    mixed = ((mixed ^ mixed >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return mixed ^ mixed >> 16

"""How one sequence is sampled, and why it ended."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_TOKEN_ID = 2**31 - 1
SEED_BITS = (1 << 63) - 1
GREEDY_BELOW = 1e-5
"""A temperature below this one draws the likeliest token whatever the number, and would overflow in fp32."""


class FinishReason(StrEnum):
    """Why a sequence ended; the values are OpenAI's."""

    STOP = "stop"
    """An end-of-sequence token, a stop token id or a stop string."""
    LENGTH = "length"
    """``max_tokens`` or the model's context is used up."""
    ABORT = "abort"
    """The client went away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """The sampling parameters that an engine needs: token ids in, token ids out.

    Stop *strings* are the gateway's business, which knows the tokenizer. Bounds are checked wherever one is made,
    also when it is decoded from the wire; a value out of bounds raises ``ValueError`` with the parameter's name.
    """

    max_tokens: int
    """Tokens to generate at the most, those of earlier attempts counted in; 0 only scores the prompt."""
    temperature: float = 1.0
    """0, and anything below ``GREEDY_BELOW``, is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities first reach this sum."""
    min_p: float = 0.0
    """Drop tokens below this fraction of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides positive, multiplies negative logits of tokens in prompt or output (CTRL, Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    """Keys the generator, with the token's position: any worker at any time draws the same token. 63 bits."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Number of likeliest alternatives to report with each sampled token; 0 reports only the sampled one."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits, token id to bias in [-100, 100]."""

    @property
    def alters_logits(self) -> bool:
        """Whether penalties or biases change the logits before a token is chosen."""
        penalties = (self.repetition_penalty != 1.0, self.presence_penalty, self.frequency_penalty)
        return any(penalties) or bool(self.logit_bias)

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn at random; else the likeliest is taken."""
        return self.temperature >= GREEDY_BELOW

    @property
    def truncates(self) -> bool:
        """Whether only the likeliest tokens stay in the draw."""
        return self.top_k > 0 or self.top_p < 1.0

    def __post_init__(self) -> None:
        _within("max_tokens", self.max_tokens, 0, MAX_TOKEN_ID)
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_k", self.top_k, 0, MAX_TOKEN_ID)
        _within("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("seed", self.seed, 0, SEED_BITS)
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _within(name, count, 0, MAX_LOGPROBS)
        _within("the number of stop_token_ids", len(self.stop_token_ids), 0, MAX_STOP_TOKEN_IDS)
        for token in self.stop_token_ids:
            _within("stop_token_ids", token, 0, MAX_TOKEN_ID)
        _within("the number of logit_bias entries", len(self.logit_bias), 0, MAX_LOGIT_BIAS)
        for token, bias in self.logit_bias.items():
            _within("a logit_bias token id", token, 0, MAX_TOKEN_ID)
            _within("logit_bias", bias, -100.0, 100.0)


def seed_of_sample(seed: int, sample: int) -> int:
    """The seed of one of the ``n`` samples of a request with this seed."""
    return (seed + sample) & SEED_BITS


def _within(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    inside = math.isfinite(value) and (low < value if low_open else low <= value) and value <= high
    if not inside:
        bracket = "(" if low_open else "["
        raise ValueError(f"{name} must be in {bracket}{low}, {high}], got {value}")

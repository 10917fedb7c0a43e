"""The requests of a chaos run: a fixed number of different ones, each asked many times.

What a request asks for is told by the seed alone, so its answer is computed once, before any fault. Together they use
what has to survive a death: penalties and seeds, stop strings, several samples, log-probabilities, both APIs, short and
long prompts and answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from cluster.chaos.core.answers import Answer

OPTIONS = {"include_usage": True, "resumable": True}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_WORDS = (
    *("the", "king", "a", "river", "once", "upon", "time", "old", "forest", "said", "little", "house", "went"),
    *("under", "star", "for", "girl", "three", "and", "mountain", "to", "sea", "bird", "who", "of", "golden"),
    *("in", "far", "away", "great", "lived", "with", "stone", "every", "winter", "light", "through", "night"),
)


@dataclass(slots=True)
class Case:
    """One request, and its answer when nothing fails."""

    name: str
    path: str
    body: dict[str, Any]
    stops: bool = False
    """Its stop string is still to be taken from the middle of its answer."""
    expected: Answer = field(default_factory=Answer)
    prompt: list[int] = field(default_factory=list)
    """Its tokens, once it was asked."""

    @property
    def wants_everything(self) -> dict[str, Any]:
        """The body to be sent."""
        return {**self.body, "stream": True, "stream_options": OPTIONS, "return_token_ids": True}

    def stop_in_the_middle(self, text: str) -> None:
        """End where some words of ``text``, the answer without a stop string, stand."""
        middle = len(text) // 2
        self.body["stop"] = [text[middle : middle + 12] or " "]


FEW = 16
"""An answer of less tokens is short."""
Make = Callable[[Random, str], tuple[str, dict[str, Any]]]


def catalogue(model: str, seed: int, count: int, longest: int = 240) -> list[Case]:
    """``count`` requests to ``model``, of every sort in turn. ``longest``: tokens of an answer; where they are few, so
    are those of the prompt."""
    cases = []
    for number in range(count):
        rng = Random(f"{seed}/{number}")
        name, make = _SORTS[number % len(_SORTS)]
        path, body = make(rng, _prompt(rng, (8,) if longest < FEW else (8, 40, 40, 200, 400)))
        # A handful of short answers, for what happens at their ends.
        short = number % 5 == 4 or longest < FEW
        length = rng.randrange(2, min(16, longest + 1)) if short else rng.randrange(longest // 4, longest)
        body |= {"model": model, "max_tokens": length}
        cases.append(Case(f"{number} {name}", path, body, stops=name == "stop"))
    return cases


def _prompt(rng: Random, lengths: Sequence[int]) -> str:
    """``lengths``: of its most words, one is drawn."""
    longest = rng.choice(lengths)
    return " ".join(rng.choice(_WORDS) for _ in range(rng.randrange(longest // 4, longest)))


def _greedy(_rng: Random, prompt: str) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": prompt, "temperature": 0, "ignore_eos": True}


def _sampled(rng: Random) -> dict[str, Any]:
    """Among few tokens: the more there are, the likelier is a draw so close to the border of two of them
    that rounding alone decides."""
    return {"temperature": rng.choice((0.7, 1.0)), "top_k": rng.choice((4, 8)), "seed": rng.randrange(1 << 31)}


def _seeded(rng: Random, prompt: str) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": prompt, **_sampled(rng), "ignore_eos": True}


def _several(rng: Random, prompt: str) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": prompt, **_sampled(rng), "n": rng.choice((2, 3))}


def _scored(rng: Random, prompt: str) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": prompt, **_sampled(rng), "logprobs": 3, "ignore_eos": True}


def _echoed(rng: Random, prompt: str) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": prompt, "temperature": 0, "logprobs": 1, "echo": True, "ignore_eos": True}


def _punished(rng: Random, prompt: str) -> tuple[str, dict[str, Any]]:
    penalties = {"presence_penalty": 0.6, "frequency_penalty": 0.4, "repetition_penalty": 1.1}
    return COMPLETIONS, {"prompt": prompt, **_sampled(rng), **penalties, "ignore_eos": True}


def _chat(rng: Random, prompt: str) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": prompt}]
    return CHAT, {"messages": messages, **_sampled(rng), "logprobs": True, "top_logprobs": 2}


_SORTS: tuple[tuple[str, Make], ...] = (
    ("greedy", _greedy),
    ("seeded", _seeded),
    ("stop", _seeded),
    ("samples", _several),
    ("logprobs", _scored),
    ("penalties", _punished),
    ("chat", _chat),
    ("echo", _echoed),
)

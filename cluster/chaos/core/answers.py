"""What a client has of an answer, compared with what it should be at every event.

Text, token ids, log-probabilities (to rounding), finish reasons and usage must be those of the failure-free run; how
they are cut into events is free.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

ROUNDING = 2e-3
"""Between log-probabilities of the same kernels on other shapes, in float32."""
WINDOW = 64
"""Tokens around a difference among which what came instead is looked for."""
ENOUGH = 3
"""Tokens that must agree to say where in the answer they belong."""


class Verdict(StrEnum):
    SAME = "same"
    LOST = "lost"
    """Something is missing: the end, or tokens before it."""
    REPEATED = "repeated"
    """Something came twice."""
    WRONG = "wrong"
    """Something else came."""


class Scored(NamedTuple):
    """One token's log-probabilities."""

    token: str
    logprob: float | None
    top: tuple[float, ...]
    """Of the alternatives, falling."""


@dataclass(slots=True)
class Sample:
    """One choice of an answer."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Scored] = field(default_factory=list)
    finish: str | None = None


Usage = tuple[int, int, int]
"""Tokens of the prompt, of the answer, of both."""


@dataclass(slots=True)
class Answer:
    """All choices of one answer."""

    samples: dict[int, Sample] = field(default_factory=dict)
    usage: Usage | None = None
    attempts: int = 1
    """Most of any choice."""
    done: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.tokens) for sample in self.samples.values())

    def feed(self, chunk: dict[str, Any]) -> list[int]:
        """Take one event in; which choices it was about."""
        touched = []
        for choice in chunk["choices"]:
            sample = self.samples.setdefault(choice["index"], Sample())
            sample.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            sample.tokens += choice.get("token_ids") or []
            sample.logprobs += _scored(choice.get("logprobs"))
            sample.finish = choice["finish_reason"] or sample.finish
            self.attempts = max(self.attempts, choice.get("baton", {}).get("attempts", 1))
            touched.append(choice["index"])
        usage = chunk.get("usage")
        if usage is not None:
            self.usage = (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])
        return touched


def _scored(logprobs: dict[str, Any] | None) -> Iterator[Scored]:
    """Of either API."""
    if logprobs is None:
        return
    if "content" in logprobs:
        for entry in logprobs["content"]:
            tops = [each["logprob"] for each in entry["top_logprobs"]]
            yield Scored(entry["token"], entry["logprob"], tuple(sorted(tops, reverse=True)))
        return
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        yield Scored(token, value, tuple(sorted((top or {}).values(), reverse=True)))


@dataclass(slots=True)
class Comparison:
    """One answer under way beside the ``expected`` one. ``feed`` each event; ``verdict`` at the end."""

    expected: Answer
    got: Answer = field(default_factory=Answer)
    detail: str = ""
    """The first difference."""
    _differs: tuple[int, int] | None = None  # the choice, and the first token that differs
    _extra: bool = False

    def feed(self, chunk: dict[str, Any]) -> None:
        before = {index: (len(each.tokens), len(each.logprobs)) for index, each in self.got.samples.items()}
        for index in self.got.feed(chunk):
            if not self.detail:
                self._compare(index, *before.get(index, (0, 0)))

    def verdict(self, broken: str = "") -> Verdict:
        """``broken``: why the stream ended before its end; empty where it did not."""
        if self._differs is not None:
            return _kind_of(*self._sequences(*self._differs))
        if self.detail:
            return Verdict.REPEATED if self._extra else Verdict.WRONG
        if broken:
            self.detail = broken
            return Verdict.LOST
        return self._compare_ends()

    def _compare(self, index: int, num_tokens: int, num_logprobs: int) -> None:
        got, expected = self.got.samples[index], self.expected.samples.get(index, Sample())
        for at in range(num_tokens, len(got.tokens)):
            if at >= len(expected.tokens) or got.tokens[at] != expected.tokens[at]:
                self._differs = (index, at)
                wanted = expected.tokens[at : at + ENOUGH]
                self.detail = f"choice {index}, token {at}: {got.tokens[at : at + ENOUGH]} came for {wanted}"
                return
        if not expected.text.startswith(got.text):
            self._extra = len(got.text) > len(expected.text)
            self.detail = f"choice {index}: the text ends with {got.text[-20:]!r} after {len(got.text)} characters"
        for at in range(num_logprobs, len(got.logprobs)):
            if at >= len(expected.logprobs) or not _close(got.logprobs[at], expected.logprobs[at]):
                self._extra = at >= len(expected.logprobs)
                self.detail = f"choice {index}: log-probability {at} is {got.logprobs[at]}"
                return

    def _compare_ends(self) -> Verdict:
        for index, expected in self.expected.samples.items():
            got = self.got.samples.get(index, Sample())
            if (len(got.tokens), got.text, len(got.logprobs)) != (
                len(expected.tokens), expected.text, len(expected.logprobs),
            ):  # fmt: skip
                self.detail = f"choice {index} ended after {len(got.tokens)} of {len(expected.tokens)} tokens"
                return Verdict.LOST
            if got.finish != expected.finish:
                self.detail = f"choice {index} ended with {got.finish!r}, not {expected.finish!r}"
                return Verdict.LOST if got.finish is None else Verdict.WRONG
        if self.got.usage != self.expected.usage:
            self.detail = f"usage is {self.got.usage}, not {self.expected.usage}"
            return Verdict.LOST if self.got.usage is None else Verdict.WRONG
        return Verdict.SAME

    def _sequences(self, index: int, at: int) -> tuple[Sequence[int], Sequence[int], int]:
        return self.got.samples[index].tokens, self.expected.samples.get(index, Sample()).tokens, at


def _kind_of(got: Sequence[int], expected: Sequence[int], at: int) -> Verdict:
    """What came from token ``at`` on: something from before once more, something from further on, or neither."""
    tail = list(got[at : at + WINDOW])
    for back in range(1, min(at, WINDOW) + 1):
        if _agree(tail, expected[at - back :]):
            return Verdict.REPEATED
    for ahead in range(1, WINDOW):
        if _agree(tail, expected[at + ahead :]):
            return Verdict.LOST
    return Verdict.WRONG


def _agree(tail: Sequence[int], piece: Sequence[int]) -> bool:
    length = min(len(tail), len(piece))
    return length >= min(ENOUGH, len(tail)) > 0 and list(tail[:length]) == list(piece[:length])


def _close(got: Scored, expected: Scored) -> bool:
    if got.token != expected.token or (got.logprob is None) != (expected.logprob is None):
        return False
    if len(got.top) != len(expected.top):
        return False
    pairs = [*zip(got.top, expected.top, strict=True)]
    if got.logprob is not None and expected.logprob is not None:
        pairs.append((got.logprob, expected.logprob))
    return all(abs(one - other) <= ROUNDING for one, other in pairs)

"""Writes what happens in a chaos run as a history, which the checker judges apart from everything here."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.chaos.catalogue import Case
from cluster.chaos.core.answers import ROUNDING, Answer
from cluster.chaos.processes import Life
from messages.ids import Epoch, RequestId, WorkerId
from messages.sampling import FinishReason, SamplingParams
from simulator import checker, verdict
from simulator import history as h

BOUNDS = verdict.Bounds(compute=2.0, logprobs=ROUNDING, settled=2.0)
"""Two busy cores take a while to compute a prompt again, beside everything else."""


class Recorder:
    """A context manager. Where no ``path`` is given, the history is gone with it."""

    def __init__(self, path: Path | None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="baton-history-") if path is None else None
        self._path = path if self._folder is None else Path(self._folder.name) / "history"
        assert self._path is not None
        self._file = h.HistoryFile(self._path)
        self._answers: dict[RequestId, verdict.Answer] = {}
        self._known: dict[tuple[str, int], verdict.Answer] = {}
        """The answers to each sample of a case: many requests share one, or the memory of this process would grow."""
        self._asked = 0

    def write(self, *records: h.Anything) -> None:
        for record in records:
            self._file.append(record)

    def ask(self, at: float, case: Case) -> int:
        """A client asks; the number of what it asks for."""
        self._asked += 1
        body = case.body
        for index, sample in case.expected.samples.items():
            request = request_id(self._asked, index)
            params = SamplingParams(max_tokens=body["max_tokens"], temperature=body["temperature"])
            self.write(h.Asked(at, request, tuple(case.prompt), params))
            answer = self._known.get((case.name, index))
            if answer is None:
                logprobs = None if body.get("echo") or not sample.logprobs else _values(sample.logprobs)
                reason = None if sample.finish is None else FinishReason(sample.finish)
                answer = verdict.Answer(tuple(sample.tokens), reason, logprobs, sample.text)
                self._known[case.name, index] = answer
            self._answers[request] = answer
        return self._asked

    def get(self, at: float, number: int, case: Case, before: Answer, chunk: dict[str, Any]) -> None:
        """The event ``chunk`` has come; ``before`` is what the client had."""
        piece = Answer()
        for index in piece.feed(chunk):
            sample, had = piece.samples[index], before.samples.get(index)
            have = 0 if had is None else len(had.tokens)
            scored = sample.logprobs and not case.body.get("echo")
            logprobs = _values(sample.logprobs) if scored else None
            self.write(h.Got(at, request_id(number, index), have, tuple(sample.tokens), logprobs, sample.text))

    def attach(self, at: float, number: int, gateway: str, got: Answer) -> None:
        """The client goes on at ``gateway``, for those samples that it has not got the end of."""
        for index, sample in got.samples.items():
            if sample.finish is None:
                self.write(h.Attached(at, request_id(number, index), gateway, len(sample.tokens)))

    def end(self, at: float, number: int, answer: Answer) -> None:
        """The client was told that all is there."""
        prompt, completion = None, None
        if answer.usage is not None:
            prompt, completion = answer.usage[0], answer.usage[1] if len(answer.samples) == 1 else None
        for index, sample in answer.samples.items():
            if sample.finish is not None:
                self.write(h.Ended(at, request_id(number, index), FinishReason(sample.finish), prompt, completion))

    def leave(self, at: float, number: int, case: Case) -> None:
        """The client gave up what it had asked for, and asks anew."""
        for index in case.expected.samples:
            self.write(h.Left(at, request_id(number, index)))

    def fail(self, at: float, number: int, case: Case, status: int, code: str, after: float | None, why: str) -> None:
        """The client got an error, or (``status`` 0) nothing more."""
        for index in case.expected.samples:
            self.write(h.Failed(at, request_id(number, index), status, code, after, why))

    def blocks(self, at: float, lives: dict[str, Life], figures: dict[str, dict[str, int]]) -> None:
        for name, counts in figures.items():
            if "total" in counts and name in lives:
                four = (counts["free"], counts["held"], counts["cached"], counts["total"])
                self.write(h.Blocks(at, incarnation(lives[name]), *four))
            elif counts.get("placed") == 0 and name in lives:
                self.write(h.Ledger(at, incarnation(lives[name]), ()))

    def judge(self) -> verdict.Verdict:
        """What the checker makes of it, once everything is written."""
        self._file.flush()
        assert self._path is not None
        records = sorted(h.load(self._path), key=lambda record: record.at)
        return checker.check(records, lambda asked: self._answers[asked.request], BOUNDS)

    def close(self) -> None:
        self._file.close()
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def incarnation(life: Life) -> h.Incarnation:
    return h.Incarnation(life.name, Epoch(life.epoch))


def lost(losses: Iterable[tuple[float, str, int]]) -> list[h.DeclaredLost]:
    return [h.DeclaredLost(at, h.Incarnation(WorkerId(name), Epoch(epoch))) for at, name, epoch in losses]


def request_id(number: int, index: int) -> RequestId:
    """Of one sample."""
    return RequestId(f"chaos-{number}-{index}")


def _values(logprobs: Iterable[Any]) -> tuple[float, ...]:
    return tuple(each.logprob for each in logprobs)

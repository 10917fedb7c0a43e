"""What the clients got: all of the right answer, once, from nobody that was superseded, and one end."""

from simulator.history import Asked, Attached, AttemptBegun, AttemptPlaced, Ended, Failed, Got, Left, Offered
from simulator.judges.case import Case, Request
from simulator.judges.health import NEVER
from simulator.judges.waits import Waits
from simulator.verdict import Answer, Invariant

OK = 200
OVERLOADED = 429


class Clients:
    """``asked`` and the others: one for each kind of record."""

    def __init__(self, case: Case, waits: Waits) -> None:
        self._case = case
        self._waits = waits

    # The stream

    def asked(self, record: Asked) -> None:
        case = self._case
        if record.request in case.requests:
            case.broken(Invariant.ONE_END, case.requests[record.request], "another request has its id")
            return
        request = Request(record, case.health.troubles, record.at, record.gateway)
        case.requests[record.request] = case.live[record.request] = request
        case.health.open(record)

    def got(self, record: Got) -> None:
        request = self._case.requests.get(record.request)
        if request is None:
            return
        if request.end is not None:
            self._case.broken(Invariant.ONE_END, request, f"{len(record.tokens)} tokens came after its end")
            return
        self._waits.got(request, record)
        self._look_at_fence(request, record)
        if record.index != request.have:
            self._case.verdict.repeated += max(0, min(request.have - record.index, len(record.tokens)))
            detail = f"tokens from {record.index} on, to a client that has {request.have}"
            self._case.broken(Invariant.CONTIGUOUS, request, detail)
        self._compare(request, record, self._case.answer(request))
        request.have = max(request.have, record.index + len(record.tokens))
        request.text.append(record.text)

    def _compare(self, request: Request, record: Got, answer: Answer) -> None:
        begin, end = record.index, record.index + len(record.tokens)
        if answer.tokens is not None and answer.tokens[begin:end] != record.tokens:
            detail = f"from {begin} on {record.tokens}, not {answer.tokens[begin:end]}"
            self._case.broken(Invariant.SAME_TOKENS, request, detail)
        if answer.logprobs is not None and not self._close(record.logprobs or (), answer.logprobs[begin:end]):
            detail = f"from {begin} on logprobs {record.logprobs}, not {answer.logprobs[begin:end]}"
            self._case.broken(Invariant.SAME_TOKENS, request, detail)

    def _close(self, logprobs: tuple[float, ...], wanted: tuple[float, ...]) -> bool:
        tolerance = self._case.bounds.logprobs
        return len(logprobs) == len(wanted) and all(
            abs(one - other) <= tolerance for one, other in zip(logprobs, wanted, strict=True)
        )

    def attached(self, record: Attached) -> None:
        request = self._case.requests.get(record.request)
        if request is None:
            return
        request.gateway, request.orphan_at = record.gateway, NEVER
        self._waits.attached(request)
        if record.index != request.have:
            detail = f"it goes on from {record.index}, having {request.have} tokens"
            self._case.broken(Invariant.CONTIGUOUS, request, detail)

    # Ends

    def ended(self, record: Ended) -> None:
        request = self._case.requests.get(record.request)
        if request is None or not self._ends(request, record):
            return
        broken, answer, have = self._case.broken, self._case.answer(request), request.have
        if answer.status != OK:
            broken(Invariant.SAME_TOKENS, request, f"answered, where it should be refused with {answer.status}")
            return
        if answer.tokens is not None and have < len(answer.tokens):
            self._case.lose(request)
            broken(Invariant.SAME_TOKENS, request, f"it ended after {have} tokens, not after {len(answer.tokens)}")
        text = "".join(request.text)
        if answer.text is not None and text != answer.text:
            self._case.lose(request)
            broken(Invariant.SAME_TOKENS, request, f"its text ends {text[-80:]!r}, not {answer.text[-80:]!r}")
        if answer.reason not in (None, record.reason):
            broken(Invariant.SAME_TOKENS, request, f"it ended by {record.reason}, not by {answer.reason}")
        prompt = len(request.asked.prompt)
        if record.prompt_tokens not in (None, prompt):
            broken(Invariant.USAGE, request, f"usage says {record.prompt_tokens} of {prompt} prompt tokens")
        if answer.tokens is not None and record.completion_tokens not in (None, have):
            broken(Invariant.USAGE, request, f"usage says {record.completion_tokens} of {have} tokens")

    def failed(self, record: Failed) -> None:
        request = self._case.requests.get(record.request)
        if request is None or not self._ends(request, record):
            return
        expected = self._case.answer(request).status
        shown = f"{record.status} {record.code} {record.detail}".strip()
        if expected != OK:
            if record.status != expected:
                self._case.broken(Invariant.TYPED_ERROR, request, f"refused with {shown}, not with {expected}")
        elif record.status or not request.orphan:  # of an orphan's gateway nobody was left to say more
            self._look_at_error(request, record, shown)

    def _look_at_error(self, request: Request, record: Failed, shown: str) -> None:
        broken = self._case.broken
        if not (400 <= record.status < 600 and record.code):
            broken(Invariant.TYPED_ERROR, request, f"the answer broke off: {shown}")
        elif record.status < 500 and record.status != OVERLOADED:
            broken(Invariant.NO_ERROR, request, f"a good request was refused: {shown}")
        elif not self._excused(request):
            broken(Invariant.NO_ERROR, request, shown)
        elif record.retry_after is None:
            broken(Invariant.TYPED_ERROR, request, f"nothing says when to come back: {shown}")
        elif record.status == OVERLOADED and request.have:
            broken(Invariant.TYPED_ERROR, request, f"refused for load after its first token: {shown}")
        else:
            return
        self._case.lose(request)

    def _excused(self, request: Request) -> bool:
        """Whether there was no capacity for it of late, or every attempt that it may have met a fault."""
        health, tries = self._case.health, self._case.bounds.max_attempts
        met_faults = health.troubles - request.troubles >= tries and request.attempt >= tries
        return health.spare_since > self._case.now - self._case.bounds.error or met_faults

    def left(self, record: Left) -> None:
        request = self._case.requests.get(record.request)
        if request is not None:
            self._case.over(request)

    def _ends(self, request: Request, record: Ended | Failed) -> bool:
        """Whether this is its first end."""
        if request.end is not None:
            detail = f"{type(record).__name__} after {type(request.end).__name__}"
            self._case.broken(Invariant.ONE_END, request, detail)
            return False
        self._waits.heard(request)
        request.hits.clear()  # of an attempt that a fault befell all had been on its way
        request.end = record
        self._case.over(request)
        return True

    def finish(self) -> None:
        """Nothing happened any more."""
        for request in self._case.live.values():
            self._case.lose(request)
            detail = f"it never ended; its client has {request.have} tokens"
            self._case.broken(Invariant.ONE_END, request, detail)

    # Attempts

    def begun(self, record: AttemptBegun) -> None:
        request = self._case.requests.get(record.request)
        if request is None:
            return
        if record.attempt <= request.begun:
            detail = f"attempt {record.attempt} begins after {request.begun}"
            self._case.broken(Invariant.FENCED, request, detail)
            return
        request.begun = record.attempt
        if not record.moving:
            self._supersede(request, record.attempt)

    def placed(self, record: AttemptPlaced) -> None:
        request = self._case.requests.get(record.request)
        if request is not None:
            request.placed[record.attempt] = record
            if record.attempt > request.attempt:
                self._supersede(request, record.attempt)

    def _supersede(self, request: Request, attempt: int) -> None:
        """From now on only tokens of ``attempt`` count."""
        if request.attempt:
            request.superseded[request.attempt] = self._case.now
            self._case.verdict.resumes += 1
        request.attempt, request.decode_streams = attempt, False

    def offered(self, record: Offered) -> None:
        request = self._case.requests.get(record.request)
        if request is not None and record.attempt < request.attempt:
            self._case.verdict.late_tokens += record.count

    def _look_at_fence(self, request: Request, record: Got) -> None:
        if record.attempt is None:
            return
        if record.attempt != request.attempt:
            detail = f"tokens of attempt {record.attempt} in attempt {request.attempt}"
            self._case.broken(Invariant.FENCED, request, detail)
        placed = request.placed.get(record.attempt)
        if placed is None or record.source is None:
            return
        if record.source not in (placed.prefill, placed.decode):
            detail = f"tokens of {record.source.name}@{record.source.epoch}, which is no worker of this attempt"
            self._case.broken(Invariant.FENCED, request, detail)
        request.decode_streams = request.decode_streams or record.source == placed.decode

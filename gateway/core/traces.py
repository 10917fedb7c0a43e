"""What the gateway keeps of requests that are traced: what it did itself, and the timelines that workers send.

It watches the sessions' events and actions, as ``runtime.core.timeline`` watches those of a worker. A trace is bounded,
and so are all together; the oldest goes first.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from gateway.core.session import Chunk, Deliver, Ended, Failed
from messages.codec import count_tokens
from messages.gateway_to_router import PlacementWanted
from messages.gateway_to_worker import Generate, Prefill
from messages.ids import Attempt, RequestId, WorkerId
from messages.router_to_gateway import Placed, Rejected, WorkerLost
from messages.worker_to_gateway import MAX_MARKS, AttemptFailed, Fact, Mark, Timeline
from runtime.core.actions import Send

MAX_SEQUENCES = 8
"""Of one request that are traced."""
MAX_KEPT = 256
"""Traces."""
MAX_KEPT_MARKS = 100_000
"""Of all traces together; about 300 bytes each."""


@dataclass(slots=True)
class SequenceTrace:
    """One sequence of a request."""

    request: RequestId
    begun: float
    marks: list[Mark] = field(default_factory=list)
    """The gateway's own, by its clock."""
    ordered: dict[Attempt, float] = field(default_factory=dict)
    """When each attempt's work was first sent to a worker: no worker can have heard of it before."""
    placed: dict[Attempt, Placed] = field(default_factory=dict)
    timelines: list[tuple[Timeline, float]] = field(default_factory=list)
    """The workers', each with when it came."""
    over: bool = False

    def missing(self) -> list[tuple[Attempt, WorkerId]]:
        """Whose timelines have not come. Decode has one only if prefill has opened a hand-over."""
        have = {(timeline.attempt, timeline.worker): timeline for timeline, _ in self.timelines}
        wanted: list[tuple[Attempt, WorkerId]] = []
        for attempt, placed in self.placed.items():
            prefill = None if placed.prefill is None else (attempt, placed.prefill.worker)
            if prefill is not None:
                wanted.append(prefill)
            if prefill not in have or any(mark.name == "opened" for mark in have[prefill].marks):
                wanted.append((attempt, placed.decode.worker))
        return [each for each in wanted if each not in have]

    def add(self, track: str, name: str, now: float, **facts: Fact) -> None:
        if len(self.marks) < MAX_MARKS:
            self.marks.append(Mark(track, name, now, now, facts))


@dataclass(slots=True)
class Trace:
    """One HTTP request."""

    id: str
    sequences: list[SequenceTrace] = field(default_factory=list)

    @property
    def num_marks(self) -> int:
        each = self.sequences
        return sum(len(seq.marks) + sum(len(timeline.marks) for timeline, _ in seq.timelines) for seq in each)


class Traces:
    """All traces that one gateway keeps. ``clock`` names the clock of every ``now``."""

    def __init__(self, clock: str) -> None:
        self.clock = clock
        self._kept: OrderedDict[str, Trace] = OrderedDict()
        self._sequences: dict[RequestId, SequenceTrace] = {}

    def find(self, trace_id: str) -> Trace | None:
        return self._kept.get(trace_id)

    def begin(self, trace_id: str, request: RequestId, now: float, num_tokens: int) -> bool:
        """Whether this sequence of the request ``trace_id`` is traced from now on."""
        trace = self._kept.setdefault(trace_id, Trace(trace_id))
        if len(trace.sequences) == MAX_SEQUENCES:
            return False
        sequence = self._sequences[request] = SequenceTrace(request, now)
        sequence.add("request", "arrives", now, prompt=num_tokens)
        trace.sequences.append(sequence)
        self._make_room()
        return True

    def saw(self, request: RequestId, event: Any, now: float) -> None:
        """The session of ``request`` is about to get ``event``."""
        sequence = self._sequences.get(request)
        if sequence is None:
            return
        match event:
            case Placed():
                prefill = event.decode if event.prefill is None else event.prefill
                sequence.placed.setdefault(event.attempt, event)
                sequence.add("request", "placed", now, prefill=prefill.worker, decode=event.decode.worker)
            case Rejected():
                sequence.add("request", "rejected", now, detail=event.detail[:256])
            case AttemptFailed():
                sequence.add("request", "attempt failed", now, worker=event.worker, reason=event.reason.value)
            case WorkerLost():
                sequence.add("request", "worker lost", now, worker=event.worker)
            case Chunk(worker, chunk):
                sequence.add("tokens", "tokens arrive", now, worker=worker, tokens=count_tokens(chunk.tokens))

    def did(self, request: RequestId, action: Any, now: float) -> None:
        """The shell performs ``action`` of the session of ``request``."""
        sequence = self._sequences.get(request)
        if sequence is None:
            return
        match action:
            case Send(_, PlacementWanted() as wanted):
                sequence.add("request", "asks for workers", now, attempt=wanted.attempt)
            case Send(_, Prefill() | Generate() as order):
                sequence.ordered.setdefault(order.attempt, now)
                sequence.add("request", f"sends {type(order).__name__}", now, attempt=order.attempt)
            case Deliver(tokens):
                sequence.add("tokens", "tokens to the client", now, tokens=len(tokens))
            case Ended(reason):
                sequence.add("request", "ends", now, reason=reason.value)
                sequence.over = True
            case Failed(error):
                sequence.add("request", "fails", now, code=error.code or "")
                sequence.over = True

    def take(self, timeline: Timeline, now: float) -> None:
        """A worker has sent its part; of a sequence that is not kept it is dropped."""
        sequence = self._sequences.get(timeline.request)
        expected = sequence is not None and (timeline.attempt, timeline.worker) in sequence.missing()
        if sequence is not None and expected:
            sequence.timelines.append((timeline, now))
            self._make_room()

    def _make_room(self) -> None:
        marks = sum(trace.num_marks for trace in self._kept.values())
        while len(self._kept) > 1 and (marks > MAX_KEPT_MARKS or len(self._kept) > MAX_KEPT):
            _, oldest = self._kept.popitem(last=False)
            marks -= oldest.num_marks
            for sequence in oldest.sequences:
                del self._sequences[sequence.request]

"""What a worker does, and when, for the attempts that are traced.

It watches: the worker's shell shows it each event before the machine takes it, each action that the machine wants, and
each step that ran. So no machine knows of tracing, and where nothing is traced it costs one look at an empty dict.
A timeline begins when the machine has admitted the attempt, whose gateway is not believed before. It goes to it when
the worker's part in the attempt is over, at the latest when the machine no longer has the attempt.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine.core.scheduler import StepPlan
from kv_transfer.core.events import Cancelled, Landed, Live, Pushed, PushFailed, TransferKey
from kv_transfer.core.session import Digested, Push, TakeDigests
from messages.codec import count_tokens
from messages.decode_to_prefill import (
    BlocksWanted,
    CancelTransfer,
    TailOffered,
    TransferAccepted,
    TransferAcked,
    TransferRefused,
)
from messages.gateway_to_worker import Abort, Generate, Prefill
from messages.ids import Address, RequestId, WorkerId
from messages.prefill_to_decode import EndTransfer, OpenTransfer, TailYielded, TransferClosed
from messages.worker_to_gateway import MAX_MARKS, AttemptFailed, Fact, Mark, Timeline, TokenBatch
from runtime.core.actions import Send

MAX_TRACED = 64
"""Attempts traced at once; the oldest one's timeline goes out as it is when there are more."""


class _Note(NamedTuple):
    """What is noted of an event or an action."""

    track: str
    name: str
    facts: dict[str, Fact]
    last: bool = False
    """Whether the worker's part is over with it."""


@dataclass(slots=True)
class _Traced:
    gateway: Address
    marks: list[Mark] = field(default_factory=list)
    dropped: int = 0
    begun: dict[tuple[str, int], list[tuple[float, dict[str, Fact]]]] = field(default_factory=dict)
    """By name and first block: when pushes and digests were asked for, the oldest in front."""
    delivered: bool = False
    """Whether a token has gone to the gateway."""

    def add(
        self, track: str, name: str, begin: float, end: float, facts: dict[str, Fact], *, fine: bool = False
    ) -> None:
        """``fine``: a detail, for which there is half of the room."""
        if len(self.marks) < (MAX_MARKS // 2 if fine else MAX_MARKS):
            self.marks.append(Mark(track, name, begin, end, facts))
        else:
            self.dropped += 1


class Timelines:
    """Of one worker. ``now`` is of the shell's monotonic clock, which ``clock`` names; ``has`` is its machine's."""

    def __init__(self, worker: WorkerId, clock: str, has: Callable[[TransferKey], bool]) -> None:
        self._worker = worker
        self._clock = clock
        self._has = has
        self._open: OrderedDict[TransferKey, _Traced] = OrderedDict()
        self._due: list[tuple[TransferKey, _Traced]] = []

    @property
    def watching(self) -> bool:
        """Whether anything is traced: else only ``saw`` and ``begin`` have something to do."""
        return bool(self._open)

    def take(self, now: float) -> list[Send]:
        """The timelines that have ended since the last time, between two turns of the machine."""
        for key in [key for key in self._open if not self._has(key)]:
            self._note(key, _Note("request", "dropped", {}, last=True), now)
        due, self._due = self._due, []
        return [Send(traced.gateway, self._timeline(key, traced, now)) for key, traced in due]

    def saw(self, event: Any, now: float) -> bool:
        """The machine is about to get ``event``. Whether to call ``begin`` when it has: it may be an order to trace."""
        if isinstance(event, Prefill | Generate | OpenTransfer):
            # Asked again, an attempt that is here has its timeline, or has had it.
            return event.generation.traced and not self._has(TransferKey(event.request, event.attempt))
        if self._open:
            self._note_event(event, now)
        return False

    def begin(self, order: Prefill | Generate | OpenTransfer, now: float) -> None:
        """The machine has got ``order``, which ``saw`` took for a new one: trace it if it was admitted."""
        key = TransferKey(order.request, order.attempt)
        if not self._has(key):
            return  # forged, late, or refused
        if len(self._open) == MAX_TRACED:
            self._end(next(iter(self._open)))
        traced = self._open[key] = _Traced(order.gateway)
        work = order.generation
        tokens: dict[str, Fact] = {"prompt": count_tokens(work.prompt), "generated": count_tokens(work.generated)}
        traced.add("request", f"{type(order).__name__} arrives", now, now, tokens)

    def _note_event(self, event: Any, now: float) -> None:
        if isinstance(event, Abort):
            for key in [key for key in self._open if key.request == event.request and key.attempt <= event.attempt]:
                self._note(key, _Note("request", "aborted by the gateway", {}, last=True), now)
            return
        key = _key(event)
        if key not in self._open:
            return
        match event:
            case Pushed(_, first, count):
                moved: dict[str, Fact] = {"blocks": count, "bytes": event.num_bytes, "early_bytes": event.early_bytes}
                self._end_span(key, "push", first, event.at or now, moved)
                before = 0
                for end, begun, left in event.layers:
                    first_layer = before if before < end else 0  # of the next lane
                    self._open[key].add("pushed layers", _layers(first_layer, end), begun, left, {}, fine=True)
                    before = end
            case Digested(_, first):
                self._end_span(key, "digest", first, now, {})
            case _:
                note = _of_event(event)
                if note is not None:
                    self._note(key, note, now)

    def did(self, action: Any, now: float) -> None:
        """The shell performs ``action``."""
        match action:
            case Push(key, first=first) | TakeDigests(key, first=first) if key in self._open:
                name = "push" if isinstance(action, Push) else "digest"
                self._open[key].begun.setdefault((name, first), []).append((now, _asked(action)))
            case Send(_, TokenBatch() as batch):
                for chunk in batch.chunks:
                    self._tokens(TransferKey(chunk.request, chunk.attempt), chunk, now)
            case Send(_, message):
                key, note = _key(message), _of_message(message)
                if note is not None and key in self._open:
                    self._note(key, note, now)

    def ran(self, plan: StepPlan, begin: float, end: float, layers: Sequence[tuple[int, float]] = ()) -> None:
        """The model has run ``plan``; ``layers``: how many were there, and when."""
        by_request = {key.request: traced for key, traced in self._open.items()}
        rows = [row for row, seq in enumerate(plan.sequences) if seq.seq_id in by_request]
        batch = {"sequences": len(plan.sequences), "tokens_of_all": int(plan.num_tokens.sum())} if rows else {}
        for row in rows:
            seq, count, before = plan.sequences[row], int(plan.num_tokens[row]), int(plan.num_computed[row])
            prefill = before + count <= seq.num_prompt_tokens
            name = f"prefill {before}-{before + count}" if prefill else f"decode {before}"
            traced = by_request[RequestId(seq.seq_id)]
            traced.add("steps", name, begin, end, {"tokens": count, **batch})
            first, since = 0, begin
            for ready, at in layers:
                traced.add("layers", _layers(first, ready), since, at, {}, fine=True)
                first, since = ready, at

    def _note(self, key: TransferKey, note: _Note, now: float) -> None:
        self._open[key].add(note.track, note.name, now, now, note.facts)
        if note.last:
            self._end(key)

    def _end_span(self, key: TransferKey, name: str, first: int, now: float, facts: dict[str, Fact]) -> None:
        asked = self._open[key].begun.get((name, first))
        if asked:
            begin, before = asked.pop(0)
            self._open[key].add("transfer" if name == "push" else "digests", name, begin, now, before | facts)

    def _tokens(self, key: TransferKey, chunk: Any, now: float) -> None:
        traced = self._open.get(key)
        if traced is None:
            return
        if not traced.delivered:
            traced.delivered = True
            facts: dict[str, Fact] = {"index": chunk.index, "tokens": count_tokens(chunk.tokens)}
            traced.add("tokens", "first tokens leave", now, now, facts)
        if chunk.finish is not None:
            self._note(key, _Note("tokens", "last token leaves", {"finish": chunk.finish.value}, last=True), now)

    def _end(self, key: TransferKey) -> None:
        self._due.append((key, self._open.pop(key)))

    def _timeline(self, key: TransferKey, traced: _Traced, now: float) -> Timeline:
        return Timeline(
            request=key.request, attempt=key.attempt, worker=self._worker, clock=self._clock, sent=now,
            marks=tuple(traced.marks), dropped=traced.dropped,
        )  # fmt: skip


def _key(message: Any) -> Any:
    """The attempt that a message or an event is about; None where it is about none."""
    key = getattr(message, "key", None)
    if key is None and hasattr(message, "attempt"):
        key = TransferKey(message.request, message.attempt)
    return key


def _layers(begin: int, end: int) -> str:
    return f"layer {begin}" if end == begin + 1 else f"layers {begin}-{end - 1}"


def _asked(action: Push | TakeDigests) -> dict[str, Fact]:
    if isinstance(action, Push):
        return {"first": action.first, "blocks": len(action.source), "live": int(action.live is not Live.NO)}
    return {"first": action.first, "blocks": len(action.blocks)}


_PLAIN_EVENTS = {
    Cancelled: _Note("transfer", "stopped writing", {}),
    TailOffered: _Note("transfer", "decode offers to compute the prompt", {}),
    TailYielded: _Note("transfer", "prompt taken over", {}),
}


def _of_event(event: Any) -> _Note | None:
    """What has come from the other end, or from the transport."""
    match event:
        case TransferAccepted():
            facts: dict[str, Fact] = {"blocks": count_tokens(event.blocks), "cached_blocks": event.cached_blocks}
            return _Note("transfer", "accepted", facts)
        case TransferRefused():
            return _Note("transfer", "refused", {"detail": event.detail[:256]}, last=True)
        case TransferAcked():
            return _Note("transfer", "acked", {}, last=True)
        case BlocksWanted():
            return _Note("transfer", "asked for a repair", {"blocks": count_tokens(event.indices)})
        case CancelTransfer():
            return _Note("transfer", "cancelled by decode", {"detail": event.detail[:256]})
        case EndTransfer():
            return _Note("transfer", "end arrives", {"round": event.round, "blocks": event.num_blocks})
        case TransferClosed():
            return _Note("transfer", "closed by prefill", {"detail": event.reason[:256]}, last=True)
        case Landed():
            return _Note("transfer", "landed", {"blocks": len(event.indices)})
        case PushFailed():
            return _Note("transfer", "push failed", {"detail": event.detail[:256]})
    return _PLAIN_EVENTS.get(type(event))


def _of_message(message: Any) -> _Note | None:
    """What goes to the other end, or to the gateway."""
    match message:
        case OpenTransfer():
            return _Note("transfer", "opened", {})
        case TailOffered():
            return _Note("transfer", "offers to compute the prompt", {})
        case TailYielded():
            return _Note("transfer", "prompt left to decode", {}, last=True)
        case EndTransfer():
            return _Note("transfer", "end sent", {"round": message.round, "blocks": message.num_blocks})
        case TransferClosed():
            return _Note("transfer", "closed", {"detail": message.reason[:256]}, last=True)
        case TransferAccepted():
            facts: dict[str, Fact] = {"blocks": count_tokens(message.blocks), "cached_blocks": message.cached_blocks}
            return _Note("transfer", "blocks promised", facts)
        case TransferRefused():
            return _Note("transfer", "refused", {"detail": message.detail[:256]}, last=True)
        case TransferAcked():
            return _Note("transfer", "verified and acked", {})
        case BlocksWanted():
            return _Note("transfer", "asks for a repair", {"blocks": count_tokens(message.indices)})
        case CancelTransfer():
            return _Note("transfer", "gives up", {"detail": message.detail[:256]}, last=True)
        case AttemptFailed():
            return _Note("request", "attempt failed", {"reason": message.reason.value}, last=True)
    return None

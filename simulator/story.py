"""The lines of a history that concern one request: what to read when a promise is broken."""

from collections.abc import Iterable, Iterator

import msgspec

from messages.ids import RequestId
from simulator.history import (
    Anything,
    Blocks,
    Crashed,
    Cut,
    DeclaredLost,
    Delivered,
    Draining,
    Dropped,
    Frozen,
    Healed,
    Idle,
    Incarnation,
    Injected,
    Killed,
    Ledger,
    Record,
    Sent,
    Started,
    Stopped,
    Thawed,
)

WORLD = (Started, Stopped, Killed, Frozen, Thawed, Cut, Healed, Injected, Draining, DeclaredLost, Crashed, Idle)
"""Concern everyone."""
_LONGEST = 200
"""Characters of one field."""


def story(history: Iterable[Anything], request: RequestId | None) -> list[str]:
    """One line a record: those about ``request``, and those about the processes; only the latter for None."""
    return list(_lines(history, request))


def _lines(history: Iterable[Anything], request: RequestId | None) -> Iterator[str]:
    sent: dict[int, Sent] = {}
    held: dict[Incarnation, str] = {}  # what was said last of the request's blocks there
    for record in history:
        match record:
            case Sent() if request is not None and record.request == request:
                sent[record.number] = record
                yield _line(record.at, "Sent", _message(record))
            case Sent() | Ledger():
                pass
            case Delivered() | Dropped():
                if record.number in sent:
                    why = f": {record.why}" if isinstance(record, Dropped) and record.why else ""
                    yield _line(record.at, type(record).__name__, _message(sent[record.number]) + why)
            case Blocks():
                own = ", ".join(
                    f"{owner.num_blocks} of #{owner.attempt}{' in quarantine' if owner.quarantined else ''}"
                    for owner in record.owners or ()
                    if owner.request == request
                )
                if own != held.get(record.worker, ""):
                    held[record.worker] = own
                    yield _line(record.at, "Blocks", f"{_shown(record.worker)} holds {own or 'none any more'}")
            case _:
                if isinstance(record, WORLD) or (request is not None and record.request == request):
                    yield _line(record.at, type(record).__name__, _fields(record))


def _line(at: float, kind: str, rest: str) -> str:
    return f"{at:10.4f}  {kind:<14} {rest}"


def _message(sent: Sent) -> str:
    attempt = "" if sent.attempt is None else f" #{sent.attempt}"
    return f"{sent.number}: {sent.source} -> {sent.target} {sent.kind}{attempt}"


def _fields(record: Record) -> str:
    """Those that say something; the request is the story's own."""
    shown = []
    for each in msgspec.structs.fields(type(record)):
        value = getattr(record, each.name)
        if each.name in ("at", "request") or value is None or value in ("", ()):
            continue
        shown.append(f"{each.name}={_shown(value)}")
    return " ".join(shown)


def _shown(value: object) -> str:
    text = f"{value.name}@{value.epoch}" if isinstance(value, Incarnation) else str(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."

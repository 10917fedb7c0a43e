"""A trace in the Trace Event Format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

One process of the picture is one of the cluster's, one thread of it one track of one sequence. Times are microseconds
since the request arrived, by the gateway's clock.

Processes of one host share a clock, and their marks stand where they were. A worker of another host has a clock of its
own; how far it is ahead is only known within bounds: its first mark came after the gateway had ordered the work, and
its timeline left before it arrived here. The middle is taken, and the picture says how wrong that may be.
"""

from dataclasses import dataclass
from typing import Any

from gateway.core.traces import Trace
from messages.worker_to_gateway import Mark, Timeline

GATEWAY = "gateway"


@dataclass(frozen=True, slots=True)
class Offset:
    """How far a worker's clock is ahead of the gateway's, seconds."""

    ahead: float
    uncertainty: float
    """It may be so much more or less; 0 where both are one clock."""


def offset_of(timeline: Timeline, arrived: float, ordered: float, clock: str) -> Offset:
    """``arrived`` and ``ordered`` (when the gateway first sent the attempt's work out) by the gateway's ``clock``."""
    least = timeline.sent - arrived
    most = timeline.marks[0].begin - ordered if timeline.marks else least
    if timeline.clock == clock and least <= 0.0 <= most:
        return Offset(0.0, 0.0)
    return Offset((least + most) / 2, abs(most - least) / 2)


def chrome_trace(trace: Trace, clock: str) -> dict[str, Any]:
    """The JSON object; ``clock``: the gateway's."""
    picture = _Picture(min((sequence.begun for sequence in trace.sequences), default=0.0))
    clocks, missing, transfers, dropped = [], [], [], 0
    for number, sequence in enumerate(trace.sequences):
        for mark in sequence.marks:
            picture.add(GATEWAY, number, mark, 0.0, {})
        for timeline, arrived in sequence.timelines:
            ordered = sequence.ordered.get(timeline.attempt, sequence.begun)
            offset = offset_of(timeline, arrived, ordered, clock)
            for mark in timeline.marks:
                picture.add(timeline.worker, number, mark, offset.ahead, {"attempt": timeline.attempt})
            dropped += timeline.dropped
            clocks.append(
                {
                    "worker": timeline.worker,
                    "same_clock": timeline.clock == clock,
                    "ahead_ms": round(1e3 * offset.ahead, 3),
                    "uncertainty_ms": round(1e3 * offset.uncertainty, 3),
                }
            )
            moved = transfer_of(timeline)
            if moved is not None:
                transfers.append({"sequence": number, "attempt": timeline.attempt, "from": timeline.worker} | moved)
        missing += [{"sequence": number, "attempt": a, "worker": worker} for a, worker in sequence.missing()]
    return {
        "traceEvents": picture.events,
        "displayTimeUnit": "ms",
        "otherData": {
            "request": trace.id,
            "complete": all(sequence.over for sequence in trace.sequences) and not missing,
            "clocks": clocks,
            "missing": missing,
            "dropped": dropped,
            "transfers": transfers,
        },
    }


def transfer_of(timeline: Timeline) -> dict[str, Any] | None:
    """What a prefill worker's timeline says of its hand-over; None where it pushed nothing.

    Hidden is what left while the prompt was computed; of its last step, before its last layer was there."""
    pushes = [mark for mark in timeline.marks if mark.name == "push"]
    if not pushes:
        return None
    computed = max((mark.end for mark in timeline.marks if mark.track == "steps"), default=float("-inf"))
    num_bytes = sum(_number(mark, "bytes") for mark in pushes)
    whole = max(_number(mark, "first") + _number(mark, "blocks") for mark in pushes)
    hidden = sum(_hidden_bytes(mark, computed, whole) for mark in pushes)
    begin, end = min(mark.begin for mark in pushes), max(mark.end for mark in pushes)
    return {
        "bytes": num_bytes,
        "hidden_bytes": hidden,
        "share_hidden": round(hidden / num_bytes, 4) if num_bytes else 1.0,
        "seconds": round(end - begin, 6),
        "seconds_after_prefill": round(max(0.0, end - computed), 6),
        "repairs": sum(mark.name == "asked for a repair" for mark in timeline.marks),
    }


def _hidden_bytes(push: Mark, computed: float, whole: int) -> int:
    of_last_step = _number(push, "live") and _number(push, "first") + _number(push, "blocks") == whole
    return _number(push, "early_bytes" if of_last_step or push.end > computed else "bytes")


def _number(mark: Mark, fact: str) -> int:
    value = mark.facts.get(fact, 0)
    return int(value) if isinstance(value, int | float) else 0


class _Picture:
    """Events, and the names of the processes and threads that they stand in."""

    def __init__(self, zero: float) -> None:
        self.events: list[dict[str, Any]] = []
        self._zero = zero
        self._processes: dict[str, int] = {}
        self._threads: dict[tuple[str, str], int] = {}

    def add(self, process: str, sequence: int, mark: Mark, ahead: float, more: dict[str, Any]) -> None:
        pid = self._process(process)
        event: dict[str, Any] = {
            "name": mark.name,
            "cat": mark.track,
            "pid": pid,
            "tid": self._thread(process, pid, mark.track if sequence == 0 else f"{mark.track} {sequence}"),
            "ts": round(1e6 * (mark.begin - ahead - self._zero), 1),
            "args": mark.facts | more,
        }
        if mark.end > mark.begin:
            event |= {"ph": "X", "dur": round(1e6 * (mark.end - mark.begin), 1)}
        else:
            event |= {"ph": "i", "s": "t"}
        self.events.append(event)

    def _process(self, name: str) -> int:
        if name not in self._processes:
            pid = self._processes[name] = len(self._processes) + 1
            self._name("process_name", pid, 0, name)
        return self._processes[name]

    def _thread(self, process: str, pid: int, name: str) -> int:
        if (process, name) not in self._threads:
            tid = self._threads[process, name] = len(self._threads) + 1
            self._name("thread_name", pid, tid, name)
        return self._threads[process, name]

    def _name(self, what: str, pid: int, tid: int, name: str) -> None:
        self.events.append({"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}})

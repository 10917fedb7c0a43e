"""Tells the state machines of a recorded process once more what they were told then, and compares what they answer.

A machine is made from its recorded arguments alone. As its only inputs are events and the time, all its answers must be
the same ones; where one is not, the first says what to look at: other code, or something in the machine that depends
on more than its inputs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

from engine.core.outputs import StepOutput
from engine.core.scheduler import StepPlan
from gateway.core import session
from gateway.core.session import Session
from kv_transfer.core.fanout import WorkerEvent
from kv_transfer.core.session import WritersGone
from messages.codec import BadMessage
from messages.gateway_to_router import GatewayDied
from messages.record_file import read_records
from messages.worker_to_gateway import Adopted
from messages.worker_to_router import WorkerDied
from router.core import machine as router
from router.core.drains import Drain, Flip, Undrain
from router.core.machine import Router
from runtime.core.journal import Called, Full, Made, Types, first_difference, make, pack_answer, read_entry
from runtime.core.probe import ProbeStopped, ProbeWanted
from worker.core import machine as worker
from worker.core.build import make_machine


class Core(NamedTuple):
    """How a kind of machine is made, and what it can be told."""

    maker: Callable[..., Any]
    events: Types


CORES = {
    "worker": Core(
        make_machine,
        Types(*worker.Messages, *get_args(WorkerEvent), WritersGone, ProbeWanted, ProbeStopped, StepOutput, str),
    ),
    "session": Core(Session, Types(*get_args(session.Event), Adopted)),
    "router": Core(Router, Types(*router.Messages, WorkerDied, GatewayDied, router.Tick, Drain, Undrain, Flip)),
}


class Difference(NamedTuple):
    """An answer is another one."""

    call: int
    """The how manyeth of the file, from 1."""
    entry: Called
    event: Any
    what: str

    def __str__(self) -> str:
        told = f"{self.entry.method} at {self.entry.now:.6f}"
        event = "" if self.event is None else f"\n  event: {self.event!r:.1000}"
        return f"call {self.call} of {self.entry.key}: {told}{event}\n  {self.what}"


class Replay(NamedTuple):
    calls: int
    actions: int
    machines: int
    difference: Difference | None
    full: bool
    """The file had reached its size: it ends before its process did."""

    def __str__(self) -> str:
        if self.difference is not None:
            return f"the first difference:\n{self.difference}"
        end = ", up to the size that the file may have" if self.full else ""
        return f"{self.calls} events to {self.machines} machines, all {self.actions} actions equal{end}"


def replay(path: Path) -> Replay:
    """Until the end of the file or the first difference; ``BadMessage`` where it is no journal of this version."""
    players: dict[str, _Player] = {}
    calls = actions = 0
    with path.open("rb") as file:
        for record in read_records(file):
            match read_entry(record):
                case Made() as made:
                    players[made.key] = _Player(made)
                case Called() as called:
                    calls += 1
                    if called.key not in players:
                        raise BadMessage(f"{called.key} is called before it was made")
                    event, answer = players[called.key].play(called)
                    actions += len(answer) if isinstance(answer, list) else 0
                    replayed = pack_answer(answer)
                    if bytes(replayed) != bytes(called.answer):
                        what = first_difference(called.answer, replayed)
                        return Replay(calls, actions, len(players), Difference(calls, called, event, what), full=False)
                case Full():
                    return Replay(calls, actions, len(players), None, full=True)
    return Replay(calls, actions, len(players), None, full=False)


class _Player:
    """One machine, made anew."""

    def __init__(self, made: Made) -> None:
        core = CORES.get(made.core)
        if core is None:
            raise BadMessage(f"nobody knows a machine of kind {made.core}")
        self._events = core.events
        machine = make(core.maker, made.arguments)
        self._calls: dict[str, Callable[[Any, float], Any]] = {
            "start": lambda _, now: machine.start(now),
            "adopt": lambda event, now: machine.adopt(event, now),
            "handle": lambda event, now: machine.handle(event, now),
            "tick": lambda _, now: machine.tick(now),
            "schedule": self._schedule,
            "update": lambda output, now: machine.update(self._plan, output, now),
            "fail_step": lambda detail, now: machine.fail_step(self._plan, detail, now),
            "leave": lambda _, now: machine.leave(now),
        }
        self._machine = machine
        self._plan: StepPlan | None = None
        """Of a worker's step that runs."""

    def play(self, called: Called) -> tuple[Any, Any]:
        """The event, and what the machine answers now, or the name of what it raises."""
        event = self._events.unpack(called.kind, called.event) if called.kind else None
        call = self._calls.get(called.method)
        if call is None:
            raise BadMessage(f"nobody calls {called.method}")
        try:
            return event, call(event, called.now)
        except Exception as error:  # noqa: BLE001 - that it raises, and what, is its answer
            return event, type(error).__name__

    def _schedule(self, _event: None, now: float) -> Any:
        self._plan, actions = self._machine.schedule(now)
        return self._plan, actions

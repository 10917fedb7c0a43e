"""The shell of every worker: a thread that turns messages into events, steps into model calls, and actions into bytes.

What the machine decides is performed before it is asked again, so that a landing is closed before its blocks can be
given to another sequence.

The thread that runs a step also looks into the mailbox between two of its layers, where the machine waits for what it
can handle then (``core/during_step.py``). All else waits until the step is over.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from engine.core.outputs import StepOutput
from engine.core.scheduler import StepPlan
from engine.layer_gate import LayerGate
from engine.rank import STEP_ERRORS
from kv_transfer.core.events import TransferKey
from kv_transfer.core.session import (
    CancelPushes,
    CloseLanding,
    LookForWriters,
    OpenLanding,
    Push,
    TakeDigests,
    WritersGone,
)
from messages.ids import RequestId
from messages.rank_to_leader import Join, RankEvent, RankMessage
from runtime.core.actions import Forget, ForgetPeer, Send
from runtime.core.during_step import DuringStep
from runtime.core.membership import Membership
from runtime.core.probe import NOTHING_CAME, ProbeEnded, ProbeStopped, ProbeWanted
from runtime.core.timeline import Timelines
from runtime.kv_port import FromRank, KVPort, PortFailed
from runtime.leader import Leader
from runtime.mailbox import MESSAGES_A_TURN, Mailbox

log = logging.getLogger(__name__)

Perform = Callable[[Iterable[Any]], None]


class Machine(Protocol):
    """What prefill and decode machines have in common."""

    @property
    def membership(self) -> Membership: ...
    @property
    def early(self) -> tuple[type, ...]: ...
    @property
    def listens(self) -> bool: ...
    @property
    def wake_at(self) -> float: ...
    def handle(self, event: Any, now: float) -> list[Any]: ...
    def tick(self, now: float) -> list[Any]: ...
    def schedule(self, now: float) -> tuple[StepPlan | None, list[Any]]: ...
    def update(self, plan: StepPlan, output: StepOutput, now: float) -> list[Any]: ...
    def fail_step(self, plan: StepPlan, detail: str, now: float) -> list[Any]: ...
    def leave(self, now: float) -> list[Any]: ...
    def has(self, key: TransferKey) -> bool: ...
    def check_integrity(self) -> None: ...
    def inspect(self) -> dict[str, int]: ...


class Runner(Protocol):
    """One rank's model; see ``engine.runner``."""

    @property
    def layers(self) -> LayerGate: ...
    def run(self, plan: StepPlan) -> StepOutput: ...


class WorkerLoop:
    """Runs one machine until it is stopped; made and run in one thread, stopped from another."""

    def __init__(
        self,
        machine: Machine,
        runner: Runner,
        mailbox: Mailbox,
        port: KVPort,
        timelines: Timelines,
        leader: Leader | None = None,
    ) -> None:
        """``leader`` of the worker's other ranks, if it has any."""
        self._machine = machine
        self._runner = runner
        self._mailbox = mailbox
        self._port = port
        self._timelines = timelines
        self._leader = leader
        self._during = DuringStep(machine.early, MESSAGES_A_TURN)
        self._stopping = threading.Event()
        self._probes: dict[RequestId, queue.SimpleQueue[ProbeEnded]] = {}

    def run(self) -> None:
        """Until ``stop``: take what has come, schedule, run, update.

        Raises what a digest or the machine raised, and ``GroupLost`` when one of the worker's ranks is lost.
        """
        machine, now = self._machine, time.monotonic
        self._perform([machine.membership.register()])
        busy = False
        while not self._stopping.is_set():
            if self._leader is not None:
                self._leader.check()
            came = self._mailbox.receive(0.0 if busy else max(0.0, machine.wake_at - now()))
            for event in (*self._during.take(), *came):
                self._perform(self._handle(event))
            self._perform(machine.tick(now()))
            plan, actions = machine.schedule(now())
            self._perform(actions)
            busy = plan is not None
            if plan is not None:
                self._perform(self._step(plan))
            self._perform(self._timelines.take(now()))
        self._perform(machine.leave(now()))

    def stop(self) -> None:
        """Ask the loop to end, from any thread."""
        self._stopping.set()
        self._mailbox.post(None)

    def probe(self, wanted: ProbeWanted, *, within: float) -> ProbeEnded:
        """Have a hand-over tested, from any thread that may wait; ``TimeoutError`` if the loop does not answer."""
        answers: queue.SimpleQueue[ProbeEnded] = queue.SimpleQueue()
        self._probes[wanted.request] = answers
        try:
            self._mailbox.post(wanted)
            try:
                return answers.get(timeout=within)
            except queue.Empty:
                self._mailbox.post(ProbeStopped(wanted.request, f"{NOTHING_CAME} within {within:g} s"))
                return answers.get(timeout=within)
        except queue.Empty:
            raise TimeoutError(f"the step loop does not answer within {2 * within:g} s") from None
        finally:
            del self._probes[wanted.request]

    def ask(self, question: Callable[[Machine], None]) -> None:
        """Have ``question`` answered between two turns of the loop, from any thread."""
        self._mailbox.post(question)

    def _handle(self, event: Any) -> list[Any]:
        if event is None:
            return []
        if isinstance(event, RankMessage | Join):
            return self._heard(event)
        if isinstance(event, FromRank):
            return [action for answer in self._port.gather(event) for action in self._told(answer)]
        if isinstance(event, PortFailed):
            raise RuntimeError("taking a digest failed") from event.error
        if callable(event):
            event(self._machine)
            return []
        return self._told(event)

    def _told(self, event: Any) -> list[Any]:
        now = time.monotonic()
        new = self._timelines.saw(event, now)
        actions = self._machine.handle(event, now)
        if new:
            self._timelines.begin(event, now)
        return actions

    def _heard(self, message: RankMessage | Join) -> list[Any]:
        """From another rank of this worker, or from who says so."""
        if isinstance(message, RankEvent) and self._leader is not None:
            event = self._leader.event(message)
            if event is not None:
                return self._handle(FromRank(message.rank, event))
        return []

    def _step(self, plan: StepPlan) -> list[Any]:
        begin, layers = time.monotonic(), self._watch_layers()
        if self._machine.listens:
            self._listen()
        try:
            output = self._runner.run(plan)
        except STEP_ERRORS as error:  # none may end the loop
            log.exception("a step of %d sequences failed", len(plan.sequences))
            return self._machine.fail_step(plan, f"{type(error).__name__} in the engine", time.monotonic())
        end = time.monotonic()
        if self._timelines.watching:
            self._timelines.ran(plan, begin, end, layers)
        return self._machine.update(plan, output, end)

    def _listen(self) -> None:
        """Look into the mailbox between the layers of the step that is to run, on every rank."""
        self._runner.layers.upcoming.listen(self._between_layers)
        if self._leader is not None:
            self._leader.listen()

    def _between_layers(self) -> None:
        """More of the step that runs is there. This is called by the model, in the loop's thread."""
        step = self._runner.layers.current
        assert step is not None, "no step runs"
        if step.failed or self._during.full:
            return
        for event in self._mailbox.receive(0.0):
            if self._during.admits(event):
                self._perform(self._handle(event))

    def _watch_layers(self) -> list[tuple[int, float]]:
        """How many layers of the step that is to run are there, and when: filled while it runs, for what is traced."""
        seen: list[tuple[int, float]] = []
        if self._timelines.watching:
            step = self._runner.layers.upcoming
            step.listen(lambda: seen.append((step.num_ready, time.monotonic())))
        return seen

    def _perform(self, actions: Iterable[Any]) -> None:
        port = self._port
        for action in actions:
            if self._timelines.watching:
                self._timelines.did(action, time.monotonic())
            match action:
                case Send(to, message):
                    self._mailbox.send(to, message)
                case Forget(address):
                    self._mailbox.outbox.forget(address)
                case ForgetPeer(peer):
                    self._mailbox.outbox.forget(peer.mailbox)
                    port.forget(peer)
                case Push() | CancelPushes() | OpenLanding() | CloseLanding() | TakeDigests():
                    for answer in port.perform(action):
                        self._perform(self._told(answer))
                case LookForWriters(key, writers):
                    if port.all_gone(writers):
                        self._perform(self._machine.handle(WritersGone(key), time.monotonic()))
                case ProbeEnded(request):
                    waiting = self._probes.get(request)
                    if waiting is not None:
                        waiting.put(action)
                case _:
                    raise AssertionError(f"nobody performs {action}")

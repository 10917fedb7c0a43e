"""A worker's machine whose events and actions are written down; see ``recorder``."""

from collections.abc import Callable
from typing import Any

from engine.core.outputs import StepOutput
from engine.core.scheduler import StepPlan
from kv_transfer.core.events import TransferKey
from runtime.core.membership import Membership
from runtime.recorder import Answer, Recorder
from runtime.worker import Machine


class RecordedMachine:
    """A worker's machine, for its loop, that is recorded."""

    def __init__(self, machine: Machine, recorder: Recorder, key: str) -> None:
        self._machine = machine
        self._recorder = recorder
        self._key = key

    def handle(self, event: Any, now: float) -> list[Any]:
        return self._call("handle", lambda: self._machine.handle(event, now), event, now)

    def tick(self, now: float) -> list[Any]:
        return self._call("tick", lambda: self._machine.tick(now), None, now)

    def schedule(self, now: float) -> tuple[StepPlan | None, list[Any]]:
        return self._call("schedule", lambda: self._machine.schedule(now), None, now)

    def update(self, plan: StepPlan, output: StepOutput, now: float) -> list[Any]:
        return self._call("update", lambda: self._machine.update(plan, output, now), output, now)

    def fail_step(self, plan: StepPlan, detail: str, now: float) -> list[Any]:
        return self._call("fail_step", lambda: self._machine.fail_step(plan, detail, now), detail, now)

    def leave(self, now: float) -> list[Any]:
        return self._call("leave", lambda: self._machine.leave(now), None, now)

    def _call(self, method: str, function: Callable[[], Answer], event: Any, now: float) -> Answer:
        return self._recorder.call(self._key, method, function, event, now)

    # What changes nothing

    @property
    def membership(self) -> Membership:
        return self._machine.membership

    @property
    def early(self) -> tuple[type, ...]:
        return self._machine.early

    @property
    def listens(self) -> bool:
        return self._machine.listens

    @property
    def wake_at(self) -> float:
        return self._machine.wake_at

    def has(self, key: TransferKey) -> bool:
        return self._machine.has(key)

    def check_integrity(self) -> None:
        self._machine.check_integrity()

    def inspect(self) -> dict[str, int]:
        return self._machine.inspect()

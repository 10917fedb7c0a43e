"""A session whose events and actions are written down; see ``runtime.recorder``."""

from typing import Any

from gateway.core.session import Action, Event, Session
from messages.ids import RequestId
from messages.sampling import SamplingParams
from runtime.recorder import Recorder


class RecordedSession(Session):
    def __init__(
        self, recorder: Recorder, request: RequestId, prompt: bytes, sampling: SamplingParams, **settings: Any
    ) -> None:
        super().__init__(request, prompt, sampling, **settings)
        self._recorder = recorder
        recorder.made("session", request, request=request, prompt=prompt, sampling=sampling, **settings)

    def start(self, now: float) -> list[Action]:
        start = super().start
        return self._recorder.call(self.request, "start", lambda: start(now), None, now)

    def handle(self, event: Event, now: float) -> list[Action]:
        handle = super().handle
        return self._recorder.call(self.request, "handle", lambda: handle(event, now), event, now)

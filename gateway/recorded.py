"""A session whose events and actions are written down; see ``runtime.recorder``."""

from typing import Any

from gateway.core.session import Action, Event, Session
from messages.ids import RequestId
from messages.sampling import SamplingParams
from messages.worker_to_gateway import Adopted
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

    def adopt(self, adopted: Adopted, now: float) -> list[Action]:
        adopt = super().adopt
        return self._recorder.call(self.request, "adopt", lambda: adopt(adopted, now), adopted, now)

    def handle(self, event: Event, now: float) -> list[Action]:
        handle = super().handle
        return self._recorder.call(self.request, "handle", lambda: handle(event, now), event, now)

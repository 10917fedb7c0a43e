"""The router's shell: bytes become events, actions become bytes."""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from kv_transfer.curve import CurveKeys
from messages.codec import decoder_for
from messages.ids import Address, Epoch, WorkerId
from messages.router_to_gateway import WorkerLost
from router.core.drains import Refused
from router.core.machine import Action, Messages, Router, RouterSettings, Tick
from runtime.core.actions import Forget, Send, WakeAt
from runtime.mailbox import MESSAGES_A_TURN, Mailbox
from runtime.recorder import Recorder

log = logging.getLogger(__name__)

LOSSES_KEPT = 256


class Ask(NamedTuple):
    """Have the router handle ``event``; ``answer`` is called with why it does not, or None when it has."""

    event: Any
    answer: Callable[[Refused | None], None]


class RouterLoop:
    """Runs one router until it is stopped: made and run in one thread, stopped and asked from others."""

    def __init__(
        self,
        settings: RouterSettings,
        host: str,
        recorder: Recorder | None = None,
        *,
        port: int = 0,
        curve: CurveKeys | None = None,
    ) -> None:
        """``recorder``, if any, writes down what happens to the router."""
        epoch = Epoch(secrets.randbits(62))
        self._router = Router(settings, epoch)
        self._recorder = recorder
        if recorder is not None:
            recorder.made("router", "router", settings=settings, epoch=epoch)
        self._mailbox = Mailbox(host, decoder_for(*Messages), port, curve=curve)
        self._wake = float("inf")
        self._stopping = threading.Event()
        self.losses: deque[tuple[float, WorkerLost]] = deque(maxlen=LOSSES_KEPT)
        """Workers that were taken for lost, with when: seconds of the host's monotonic clock."""

    @property
    def address(self) -> Address:
        return self._mailbox.address

    def run(self) -> None:
        """Until ``stop``; then close the mailbox."""
        try:
            while not self._stopping.is_set():
                self._turn()
        finally:
            self._mailbox.close()
            if self._recorder is not None:
                self._recorder.close()

    def stop(self) -> None:
        self._stopping.set()
        self._mailbox.post(None)

    def ask(self, event: object) -> None:
        """Hand in an event of this process: a message, an ``Ask``, or a function that is called with the router."""
        self._mailbox.post(event)

    def _turn(self) -> None:
        now = time.monotonic()
        timeout = None if self._wake == float("inf") else max(0.0, self._wake - now)
        events = self._mailbox.receive(timeout)
        now = time.monotonic()
        for event in events:
            if isinstance(event, Ask):
                self._answer(event, now)
            elif callable(event):
                event(self._router)
            elif event is not None:
                self._perform(self._handle(event, now))
        # Reports that are still waiting to be read come before any verdict on who was silent.
        if now >= self._wake and len(events) < MESSAGES_A_TURN:
            self._wake = float("inf")
            self._perform(self._handle(Tick(), now))

    def _answer(self, asked: Ask, now: float) -> None:
        try:
            self._perform(self._handle(asked.event, now))
        except Refused as refused:
            asked.answer(refused)
        else:
            asked.answer(None)

    def _handle(self, event: Any, now: float) -> list[Action]:
        if self._recorder is None:
            return self._router.handle(event, now)
        return self._recorder.call("router", "handle", lambda: self._router.handle(event, now), event, now)

    def _perform(self, actions: Iterable[Action]) -> None:
        lost: set[tuple[WorkerId, Epoch]] = set()
        for action in actions:
            match action:
                case Send(to, message):
                    if isinstance(message, WorkerLost) and (message.worker, message.epoch) not in lost:
                        lost.add((message.worker, message.epoch))
                        self.losses.append((time.monotonic(), message))
                        log.warning("lost %s: %s", message.worker, message.detail)
                    self._mailbox.send(to, message)
                case WakeAt(at):
                    self._wake = min(self._wake, at)
                case Forget(address):
                    self._mailbox.outbox.forget(address)

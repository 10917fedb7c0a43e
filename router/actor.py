"""The router's process. A plain class; ``cluster`` makes a Ray actor of it."""

import logging
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv_transfer.curve import CurveKeys
from messages.common import Role
from messages.gateway_to_router import GatewayDied
from messages.ids import Address, Epoch, WorkerId
from messages.worker_to_router import WorkerDied
from router.core.drains import Drain, Flip, Refused, Undrain
from router.core.machine import Router, RouterSettings
from router.loop import Ask, RouterLoop
from runtime.recorder import Recorder

log = logging.getLogger(__name__)

STOP_WITHIN = 5.0
"""Seconds that the loop may take to end or to answer; nothing in it waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """What the composition root tells the router."""

    host: str
    """Address of this machine that the router's mailbox binds to."""
    port: int = 0
    """0: a free one. A router that takes the place of another listens where that one did."""
    curve: CurveKeys | None = None
    """Of the cluster; needed to bind to anything but loopback."""
    settings: RouterSettings
    record: str = ""
    """Folder in which everything that happens to the router is written down; empty for none."""


class RouterActor:
    """One router. ``start`` returns when it listens; ``stop`` when nothing of it is left."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._loop: RouterLoop | None = None
        self._thread: threading.Thread | None = None
        self.on_failure: Callable[[BaseException], None] | None = None
        """Called, in the loop's thread, when the loop ends by an exception: nothing is routed any more."""

    def start(self) -> dict[str, Any]:
        """Listen; harmless twice."""
        if self._loop is None:
            recorder = Recorder(Path(self._config.record), "router") if self._config.record else None
            config = self._config
            self._loop = RouterLoop(config.settings, config.host, recorder, port=config.port, curve=config.curve)
            self._thread = threading.Thread(target=self._run, args=(self._loop,), name="router", daemon=True)
            self._thread.start()
        return {"address": self._loop.address, "pid": os.getpid()}

    def _run(self, loop: RouterLoop) -> None:
        try:
            loop.run()
        except BaseException as error:
            log.exception("the router's loop has failed")
            if self.on_failure is not None:
                self.on_failure(error)

    def worker_died(self, worker: str, epoch: int | None, detail: str) -> None:
        """The supervisor's word that a worker's process is gone."""
        assert self._loop is not None, "not started"
        died = WorkerDied(worker=WorkerId(worker), epoch=None if epoch is None else Epoch(epoch), detail=detail[:2_000])
        self._loop.ask(died)

    def gateway_died(self, address: str, detail: str) -> None:
        """The supervisor's word that the gateway with this mailbox is gone."""
        assert self._loop is not None, "not started"
        self._loop.ask(GatewayDied(gateway=Address(address), detail=detail[:2_000]))

    def losses(self, since: float) -> list[tuple[float, str, int]]:
        """When, name and epoch of workers taken for lost after ``since``: seconds of the host's monotonic clock."""
        assert self._loop is not None, "not started"
        return [(at, lost.worker, lost.epoch) for at, lost in list(self._loop.losses) if at > since]

    def drain(self, worker: str, force: bool = False) -> None:
        """Have nothing more placed on ``worker``; what is there ends or moves elsewhere. ``Refused`` for one that is
        not there, and for the last of its role unless ``force``."""
        self._ask(Drain(WorkerId(worker), force))

    def undrain(self, worker: str) -> None:
        """Have requests placed on ``worker`` again; ``Refused`` for one that is not there."""
        self._ask(Undrain(WorkerId(worker)))

    def flip(self, worker: str, role: str) -> None:
        """Drain ``worker``, then have it do what ``role`` ("prefill", "decode") says; ``Refused`` where that would
        leave nobody for what it does now, and in a colocated pool."""
        self._ask(Flip(WorkerId(worker), Role(role)))

    def standing(self, worker: str) -> dict[str, Any]:
        """How far that is: ``role``, ``alive``, ``draining``, ``drained``, ``left``, ``assigned``, ``becoming`` and so
        on; ``Refused`` for one that is not known."""
        answers: queue.SimpleQueue[dict[str, Any] | Refused] = queue.SimpleQueue()

        def look(router: Router) -> None:
            try:
                answers.put(router.standing(WorkerId(worker)))
            except Refused as refused:
                answers.put(refused)

        self._post(look)
        answer = answers.get(timeout=STOP_WITHIN)
        if isinstance(answer, Refused):
            raise answer
        return answer

    def _ask(self, event: Drain | Undrain | Flip) -> None:
        answers: queue.SimpleQueue[Refused | None] = queue.SimpleQueue()
        self._post(Ask(event, answers.put))
        refused = answers.get(timeout=STOP_WITHIN)
        if refused is not None:
            raise refused

    def _post(self, event: object) -> None:
        assert self._loop is not None, "not started"
        self._loop.ask(event)

    def beat(self) -> bool:
        """Whether the loop has come round."""
        answers: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._post(lambda _router: answers.put(None))
        try:
            answers.get(timeout=STOP_WITHIN)
        except queue.Empty:
            return False
        return True

    def inspect(self) -> dict[str, int]:
        """Figures of the router between two events, after ``check_integrity``; for tests."""
        assert self._loop is not None, "not started"
        answers: queue.SimpleQueue[dict[str, int] | AssertionError] = queue.SimpleQueue()

        def look(router: Router) -> None:
            try:
                router.check_integrity()
            except AssertionError as error:
                answers.put(error)
            else:
                answers.put(router.inspect())

        self._loop.ask(look)
        answer = answers.get(timeout=STOP_WITHIN)
        if isinstance(answer, AssertionError):
            raise answer
        return answer

    def stop(self) -> None:
        """Close the mailbox; harmless twice."""
        if self._loop is not None and self._thread is not None:
            self._loop.stop()
            self._thread.join(STOP_WITHIN)
            if self._thread.is_alive():
                raise TimeoutError(f"the router did not stop within {STOP_WITHIN:.0f} s")
            self._loop = None

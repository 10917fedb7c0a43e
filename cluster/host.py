"""The one Ray actor class: a process that hosts one of our plain actors."""

import importlib
import logging
import os
import threading
import time
from typing import Any

from cluster.marks import mark as mark_process
from cluster.model_folder import ModelSource, locate
from cluster.state import started_at
from runtime import heap

log = logging.getLogger(__name__)

WORKER = "worker.actor:Worker"
LAST_WORDS = 0.5
"""Seconds from the failure of a loop to the end of its process."""
ROUTER = "router.actor:RouterActor"
GATEWAY = "gateway.actor:GatewayActor"


class Host:
    """Imports ``target`` ("module:Class") when it is made, so that all processes do so at once; ``start`` makes it.

    ``watch`` returns when ``stop`` is through. If the process dies, whoever waits for ``watch`` hears of it at once.
    When the actor's own loop fails, ``watch`` says why, and then the process ends, for without its loop it would only
    look alive. ``mark``: by which it is found without Ray (``marks``).
    """

    def __init__(self, target: str, mark: str) -> None:
        mark_process(mark)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        module, _, name = target.partition(":")
        self._make: Any = getattr(importlib.import_module(module), name)
        self._actor: Any = None
        self._stopped = threading.Event()
        self._failure = ""

    def identity(self) -> tuple[int, int | None]:
        """Its pid, and when it started: see ``state.started_at``."""
        return os.getpid(), started_at(os.getpid())

    def locate(self, source: ModelSource, host: str) -> str:
        """The model's folder on this host; ``LaunchError``."""
        return str(locate(source, host))

    def prepare(self, config: Any) -> str:
        """What a worker's other ranks need to know before they start: rank 0's address."""
        self._actor = self._make(config)
        address: str = self._actor.prepare()
        return address

    def start(self, config: Any) -> dict[str, Any]:
        if self._actor is None:
            self._actor = self._make(config)
        self._actor.on_failure = self._fail
        started: dict[str, Any] = self._actor.start()
        heap.settle()
        return started

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the actor that was started."""
        return getattr(self._actor, method)(*arguments)

    def watch(self) -> None:
        while not self._stopped.wait(heap.TRIM_EVERY):
            heap.trim()
        if self._failure:
            raise RuntimeError(self._failure)

    def hold(self) -> None:
        """Never returns; whoever waits for it hears, on another host too, when this process ends."""
        threading.Event().wait()

    def stop(self) -> None:
        try:
            if self._actor is not None:
                self._actor.stop()
        finally:
            self._stopped.set()

    def _fail(self, error: BaseException) -> None:
        log.critical("this process ends, for its loop has failed", exc_info=error)
        self._failure = f"{type(error).__name__}: {error}"
        self._stopped.set()
        logging.shutdown()
        time.sleep(LAST_WORDS)  # in the loop's own thread, while `watch` tells
        os._exit(1)

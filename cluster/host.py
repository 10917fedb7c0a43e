"""The one Ray actor class: a process that hosts one of our plain actors."""

import importlib
import logging
import os
import threading
from typing import Any

log = logging.getLogger(__name__)

WORKERS = {
    "prefill": "prefill_worker.actor:PrefillWorker",
    "decode": "decode_worker.actor:DecodeWorker",
    "colocated": "decode_worker.actor:DecodeWorker",
}
ROUTER = "router.actor:RouterActor"
GATEWAY = "gateway.actor:GatewayActor"


class Host:
    """Imports ``target`` ("module:Class") when it is made, so that all processes do so at once; ``start`` makes it.

    ``watch`` returns when ``stop`` is through. If the process dies, whoever waits for ``watch`` hears of it at once;
    and it does die when the actor's own loop fails, for a process without its loop would only look alive.
    """

    def __init__(self, target: str) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        module, _, name = target.partition(":")
        self._make: Any = getattr(importlib.import_module(module), name)
        self._actor: Any = None
        self._stopped = threading.Event()

    def start(self, config: Any) -> dict[str, Any]:
        self._actor = self._make(config)
        self._actor.on_failure = _end_process
        started: dict[str, Any] = self._actor.start()
        return started

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the actor that was started."""
        return getattr(self._actor, method)(*arguments)

    def watch(self) -> None:
        self._stopped.wait()

    def stop(self) -> None:
        try:
            if self._actor is not None:
                self._actor.stop()
        finally:
            self._stopped.set()


def _end_process(error: BaseException) -> None:
    log.critical("this process ends, for its loop has failed", exc_info=error)
    logging.shutdown()
    os._exit(1)

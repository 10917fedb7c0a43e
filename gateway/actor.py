"""The gateway as an actor: a plain class for the composition root to give to Ray. Requests do not pass through it."""

from collections.abc import Callable
from typing import Any

from gateway.config import GatewayConfig
from gateway.core.limits import Limits
from gateway.core.session import SessionTimeouts
from gateway.server import GatewayServer


class GatewayActor:
    def __init__(self, config: GatewayConfig | dict[str, Any]) -> None:
        """``config``: a ``GatewayConfig``, or its fields, with ``limits`` and ``timeouts`` as dicts of theirs."""
        self._server = GatewayServer(config if isinstance(config, GatewayConfig) else config_from(config))
        self.on_failure: Callable[[BaseException], None] | None = None
        """Called from the gateway's thread when it fails; set before ``start``."""

    def start(self) -> dict[str, Any]:
        """Take requests: the mailbox's ``address``, the ``http_url``, and the ``grpc_port``, which may be None."""
        self._server.on_failure = self.on_failure
        self._server.start()
        return {
            "address": self._server.address,
            "http_url": self._server.url,
            "grpc_port": self._server.grpc_port,
        }

    def url(self) -> str:
        """Where it takes requests; for jobs that look for it."""
        return self._server.url

    def ready(self) -> bool:
        """Whether the router has said that every role has a worker."""
        return self._server.ready

    def drain(self, grace: float) -> bool:
        """Listen no more, so that a replacement on this port gets what comes, and let what is here finish; whether it
        all has within ``grace`` seconds. To be stopped then."""
        return self._server.drain(grace)

    def stop(self) -> None:
        """Finish or fail what is in flight."""
        self._server.stop()


def config_from(fields: dict[str, Any]) -> GatewayConfig:
    """Raises ``TypeError`` for unknown fields."""
    nested: dict[str, Any] = {"limits": Limits, "timeouts": SessionTimeouts}
    built = {name: nested[name](**fields[name]) for name in nested if isinstance(fields.get(name), dict)}
    return GatewayConfig(**(fields | built))

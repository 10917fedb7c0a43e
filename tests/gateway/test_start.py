"""Promise: a gateway that cannot start says why in the words of what kept it, and leaves neither thread nor socket."""

import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from gateway.config import GatewayConfig
from gateway.server import GatewayServer
from tests.gateway.conftest import MODEL


async def refused(server: uvicorn.Server, sockets: Any = None) -> None:
    raise PermissionError("the system forbids it")


async def ended(server: uvicorn.Server, sockets: Any = None) -> None:
    server.should_exit = True


@pytest.mark.parametrize(
    ("startup", "kind", "words"),
    [(refused, PermissionError, "the system forbids it"), (ended, RuntimeError, "HTTP has ended before it began")],
)
def test_http_that_does_not_start_is_told_and_leaves_nothing(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, startup: Any, kind: type[Exception], words: str
) -> None:
    monkeypatch.setattr(uvicorn.Server, "startup", startup)
    config = GatewayConfig(
        model=str(tiny_llama), served_model_name=MODEL, router="tcp://127.0.0.1:9", port=0, drain=0.2, grpc_port=0
    )
    server = GatewayServer(config)
    with pytest.raises(kind, match=f"^{words}$"):
        server.start()
    server.stop()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("gateway")]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", server.port))
        probe.listen()

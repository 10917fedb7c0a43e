"""HTTP by hand, for what no well-behaved client does."""

import contextlib
import json
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from gateway.server import GatewayServer

TIMEOUT = 10.0


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    sent: int
    """Bytes of the request's body that had left when the reply began."""

    @property
    def error(self) -> dict[str, Any]:
        error = json.loads(self.body)["error"]
        assert isinstance(error, dict)
        return error


@contextlib.contextmanager
def connected(server: GatewayServer, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as connection:
        connection.settimeout(TIMEOUT)
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect(("127.0.0.1", server.port))
        yield connection


def head(path: str, *headers: str, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: gateway", "Content-Type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode()


def post(path: str, body: dict[str, Any]) -> bytes:
    """A whole request."""
    encoded = json.dumps(body).encode()
    return head(path, f"Content-Length: {len(encoded)}") + encoded


def converse(server: GatewayServer, request_head: bytes, body: Iterator[bytes]) -> Reply:
    """Send until there is a reply to read, as a client does that looks up from its work."""
    with connected(server) as connection:
        connection.sendall(request_head)
        connection.setblocking(False)
        sent, pending = 0, b""
        while True:
            pending = pending or next(body, b"")
            readable, writable, _ = select.select([connection], [connection] if pending else [], [], TIMEOUT)
            if readable:
                break
            assert writable, "neither a reply nor room to send more"
            took = connection.send(pending)
            sent, pending = sent + took, pending[took:]
        connection.settimeout(TIMEOUT)
        return read_reply(connection, sent)


def read_reply(connection: socket.socket, sent: int = 0) -> Reply:
    """A reply with a content-length."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += _more(connection)
    top, _, body = received.partition(b"\r\n\r\n")
    status_line, *lines = top.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    while len(body) < int(headers["content-length"]):
        body += _more(connection)
    return Reply(int(status_line.split()[1]), headers, body, sent)


def _more(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    assert data, "the connection was closed before the reply was complete"
    return data


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that only shows when it is looked at."""
    give_up = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < give_up, f"it never came to be that {what}"
        time.sleep(0.002)

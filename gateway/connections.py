"""HTTP connections within bounds: how many there are, and how long one may go without asking for anything.

With TLS, a connection counts from accept too, and has as long for its handshake.

From accept, and from the first byte after an answer, a client has ``headers_timeout`` seconds for a complete head of a
request; between an answer and that byte, uvicorn's keep-alive timeout runs. From a complete head on, the body's own
deadline counts (``body.py``), and whether the client reads (``answers.py``).
"""

import asyncio
import logging
import resource
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakSet

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway.answers import LINGER, error_headers
from gateway.core.errors import GatewayError, HeadersTimeout, Unavailable
from gateway.rendering import encode, error_body

log = logging.getLogger(__name__)

REFUSALS = 64
"""Refused connections that may linger until their clients have read why; further ones are closed without a word."""


def affordable(wanted: int, what: str = "HTTP", part: int = 2) -> int:
    """``wanted`` connections, or as many as one ``part``-th of this process's file descriptors is enough for: a mailbox
    that gets no descriptor ends the process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or wanted <= soft // part:
        return wanted
    log.warning("at most %d %s connections, not %d: the limit of open files is %d", soft // part, what, wanted, soft)
    return soft // part


@dataclass(frozen=True, slots=True, kw_only=True)
class Connections:
    """The open connections of one gateway, and their bounds."""

    most: int
    headers_timeout: float
    """Seconds."""
    tls: bool = False
    taken: set[asyncio.Protocol] = field(default_factory=set)
    coming: "WeakSet[asyncio.Protocol]" = field(default_factory=WeakSet)
    """In their TLS handshake; nobody tells of those that fail."""

    def protocol(self) -> type[H11Protocol]:
        """What uvicorn makes for each connection."""

        class Bound(BoundedProtocol):
            bounds = self

        return Bound


class BoundedProtocol(H11Protocol):
    """h11's protocol for one connection, which counts it and drops it when it is idle for too long."""

    bounds: ClassVar[Connections]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if self.bounds.tls and len(self.bounds.coming) + len(self.bounds.taken) >= self.bounds.most + REFUSALS:
            # asyncio drops the connection, before it spends a handshake on it.
            raise ConnectionAbortedError("too many connections are open, or are in their TLS handshake")
        super().__init__(*args, **kwargs)
        self.bounds.coming.add(self)
        self._deadline: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.bounds.coming.discard(self)
        if len(self.bounds.taken) < self.bounds.most:
            self.bounds.taken.add(self)
            self._expect_request()
        elif len(self.connections) <= self.bounds.most + REFUSALS:
            self._refuse(Unavailable("too many connections are open", retry_after=1.0))
        else:
            self._refused = True
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.bounds.taken.discard(self)
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if not self._owes_answer:
            self._expect_request()
        else:
            self._stop_waiting()

    @property
    def _owes_answer(self) -> bool:
        """Whether a request's head is there. If not, the client owes one; or the rest of a body that nobody reads,
        since its request is answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_request(self) -> None:
        """What comes without being a whole head does not move the deadline."""
        if self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self.bounds.headers_timeout, self._too_late)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        if self.transport.is_closing():
            return
        half_a_head = self.conn.our_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if half_a_head:
            seconds = self.bounds.headers_timeout
            self._refuse(HeadersTimeout(f"the request's headers did not arrive within {seconds:g} s"))
        else:
            self.timeout_keep_alive_handler()  # silently: there is no request to answer

    def _refuse(self, error: GatewayError) -> None:
        """Answer without a request, close once the client has had time to read it."""
        self._refused = True
        self.bounds.taken.discard(self)
        body = encode(error_body(error))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *error_headers(error),
        ]
        for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        # Closing while the client still sends would reset the connection, and it might never see the answer.
        self.transport.write_eof()
        self._deadline = self.loop.call_later(LINGER, self.transport.abort)

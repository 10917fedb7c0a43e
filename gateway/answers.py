"""How an answer leaves: as server-sent events or in one piece. A client that goes away cancels its sequences at once,
unless it has said that it may come back (``streams.py``).

The HTTP status is decided with the first token or the first error, so what is refused anywhere in the cluster keeps its
own status; an error after the first byte is one typed event, then the end.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.choice import Choice
from gateway.core.errors import GatewayError, StreamTaken
from gateway.core.positions import DONE, USAGE, event_id
from gateway.hub import Hub, Order, Relay
from gateway.rendering import Renderer, done, encode, error_body, error_event, retry_after

log = logging.getLogger(__name__)

LINGER = 0.3
"""Seconds that a refused client may go on sending before its connection is closed under it."""
TAKEN_WITHIN = 10.0
"""Seconds in which another gateway takes all of an answer, or nobody does."""
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Exchange:
    """The sequences of one HTTP request."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._changed = asyncio.Event()
        self._gone = False
        self._refusal: GatewayError | None = None
        self.choices: list[Choice] = []
        self.relays: list[Relay | None] = []
        """One a choice; None for a choice that the client has read to its end, and of which nobody knows more."""

    def changed(self) -> None:
        self._changed.set()

    def open(self, orders: Sequence[Order], choices: list[Choice]) -> None:
        """Run ``orders``, one a choice. Raises ``GatewayError``."""
        self.choices = choices
        self.relays = [*self._hub.open(zip(orders, choices, strict=True))]

    def resume(self, relays: list[Relay | None], choices: list[Choice]) -> None:
        """Read on in sequences that run, or have ended: ``choices`` begin where their client wants it."""
        self.choices, self.relays = choices, relays
        for relay, choice in zip(relays, choices, strict=True):
            if relay is None:
                choice.known()
                continue
            relay.listener = choice
            so_far = relay.session.transcript()
            if so_far is not None and choice.replay(so_far):
                self._hub.complete(relay)  # which the choice hears of, unless the sequence has ended before
            if choice.over:
                continue
            if isinstance(relay.outcome, GatewayError):
                choice.failed(relay.outcome)
            elif relay.outcome is not None:
                choice.finished(relay.outcome)
        self.changed()

    async def wait(self) -> None:
        """Until something has happened since the last time."""
        await self._changed.wait()
        self._changed.clear()

    def first_error(self) -> GatewayError | None:
        return self._refusal or next((choice.error for choice in self.choices if choice.error is not None), None)

    @property
    def over(self) -> bool:
        return all(choice.over for choice in self.choices)

    def close(self) -> None:
        """Cancel what still runs, and let go of it all."""
        if isinstance(self.first_error(), StreamTaken):  # who has taken one sequence is about to take the others
            asyncio.get_running_loop().call_later(TAKEN_WITHIN, self._hub.cancel_all, self.relays)
        else:
            self._hub.cancel_all(self.relays)
        self.let_go()

    def let_go(self) -> None:
        """Choices know their exchange, so they would wait for the garbage collector."""
        self.choices, self.relays = [], []

    def refuse(self, error: GatewayError) -> None:
        """Somebody else goes on with the sequences: the client hears ``error``."""
        self._refusal = error
        self.changed()

    def client_gone(self) -> bool:
        return self._gone

    def drop_client(self) -> None:
        self._gone = True
        self.changed()

    async def watch(self, receive: Receive) -> None:
        """Until the client goes away."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.drop_client()


class Answer(Response):
    """Answers one request: a response in FastAPI's eyes, with a body and headers that come when they are there."""

    background = None

    def __init__(self, exchange: Exchange, renderer: Renderer, leave: Callable[[], None]) -> None:
        """``leave`` is called when the client has gone, or has its answer."""
        self._exchange = exchange
        self._renderer = renderer
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._exchange.watch(receive))
        try:
            await self._answer(scope, receive, send)
        finally:
            self._leave()
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class WholeAnswer(Answer):
    """Needs no time limit: one write does not wait for its reader, and the socket's TCP_USER_TIMEOUT (``server.py``)
    drops a client that reads nothing."""

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = self._exchange
        while not (exchange.over or exchange.first_error() or exchange.client_gone()):
            await exchange.wait()
        if exchange.client_gone():
            return
        error = exchange.first_error()
        if error is not None:
            await send_error(error, send)
            return
        pieces = [choice.take(even_without_text=True) for choice in exchange.choices]
        present = [piece for piece in pieces if piece is not None]
        relays = [relay for relay in exchange.relays if relay is not None]
        body = self._renderer.answer(exchange.choices, relays, present)
        await send_json(200, body, send)


class EventStream(Answer):
    """``core/positions.py`` says what its events' ids mean."""

    def __init__(
        self,
        exchange: Exchange,
        renderer: Renderer,
        leave: Callable[[], None],
        *,
        include_usage: bool,
        stall: float,
        resumed: bool = False,
    ) -> None:
        """``stall``: seconds after which a client that does not read is dropped. ``resumed``: it knows its status."""
        super().__init__(exchange, renderer, leave)
        self._stall = stall
        self._include_usage = include_usage
        self._resumed = resumed

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = self._exchange
        if not self._resumed:
            await exchange.wait()
        error = exchange.first_error()
        if error is not None:
            await send_error(error, send)
            return
        if exchange.client_gone():
            return
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        while not exchange.client_gone():
            error, over = exchange.first_error(), exchange.over
            body = self._news()
            if error is not None:
                await self._write(send, body + error_event(error, self._id()), last=True)
                return
            if over:
                await self._write(send, body + self._end(), last=True)
                return
            if body:
                await self._write(send, body)
            await exchange.wait()

    def _news(self) -> bytes:
        """Chunks for everything that came since the last time."""
        renderer, exchange = self._renderer, self._exchange
        chunks = []
        for choice, relay in zip(exchange.choices, exchange.relays, strict=True):
            if choice.fresh and relay is not None:
                piece = choice.take(even_without_text=renderer.even_without_text)
                if piece is not None:
                    chunks.append(renderer.chunk(choice, relay, piece, self._id()))
        return b"".join(chunks)

    def _end(self) -> bytes:
        usage = b""
        if self._include_usage:
            usage = self._renderer.usage_chunk(self._exchange.choices, self._id(USAGE))
        return usage + done(self._id(DONE))

    def _id(self, *tail: str) -> str:
        return event_id((choice.position for choice in self._exchange.choices), *tail)

    async def _write(self, send: Send, body: bytes, *, last: bool = False) -> None:
        """Waits while the client does not read; gives it up after a while."""
        try:
            async with asyncio.timeout(self._stall):
                await send({"type": "http.response.body", "body": body, "more_body": not last})
        except TimeoutError:
            log.info("dropped a client that did not read for %.0f s", self._stall)
            self._exchange.drop_client()


async def send_json(status: int, body: bytes, send: Send, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


async def send_error(error: GatewayError, send: Send) -> None:
    await send_json(error.status, encode(error_body(error)), send, error_headers(error))


def error_headers(error: GatewayError) -> list[tuple[bytes, bytes]]:
    seconds = retry_after(error)
    return [] if seconds is None else [(b"retry-after", str(seconds).encode())]


class ErrorAnswer:
    """An error as ASGI application. ``close``: the body was not read, so the connection ends with the answer."""

    def __init__(
        self, error: GatewayError, headers: Sequence[tuple[bytes, bytes]] = (), *, close: bool = False
    ) -> None:
        self._error = error
        self._headers = [*error_headers(error), *headers]
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = encode(error_body(self._error))
        if not self._close:
            await send_json(self._error.status, body, send, self._headers)
            return
        headers: list[Any] = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *self._headers,
        ]
        await send({"type": "http.response.start", "status": self._error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        # Closing while the client still sends would reset the connection, and it might never see the answer.
        try:
            async with asyncio.timeout(LINGER):
                while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        except TimeoutError:
            log.debug("a refused client went on sending")
        await send({"type": "http.response.body", "body": b""})

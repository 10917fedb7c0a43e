"""Typed messages between processes over ZeroMQ: one PULL socket a process, one PUSH socket a peer.

A send never blocks and promises nothing (a dead link swallows hundreds of messages): whoever needs an answer has a
deadline and asks again. Sockets bind to the host that they are given: see ``kv_transfer.curve`` for what that needs.
"""

import contextlib
import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Self

import msgspec
import zmq
import zmq.asyncio

from kv_transfer.curve import OVERHEAD, CurveKeys, Unreachable, bind, connect
from messages.codec import BadMessage, Decode, encode
from messages.ids import Address

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 32 << 20
"""Above the largest message of the protocol (a sequence of 4 Mi tokens); libzmq drops peers that send more."""
QUEUED_MESSAGES = 10_000
"""Messages that wait for one peer, at each end, before further ones are dropped and counted."""
MAX_PEERS = 512
"""Peers that one process keeps a socket to; then the one that was not written to for the longest time loses its own."""
MAX_SOCKETS = 4 * MAX_PEERS
"""Sockets of one context: a closed one counts until libzmq's own thread has reaped it, in its own time."""
MAX_ANSWER_BYTES = 1024
"""Of what comes back over a socket that only sends; no peer of ours says anything there."""
MESSAGES_A_TURN = 256
"""Messages taken at once, so that a flood cannot keep a step loop from its step."""


class Outbox:
    """Sends messages to peers by address. Belongs to one thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], curve: CurveKeys | None = None) -> None:
        self._context = context
        self._curve = curve
        self._peers: OrderedDict[Address, zmq.Socket[bytes]] = OrderedDict()  # the last written to at the end
        self.dropped = 0
        """Messages that found a peer's queue full."""
        self.unreachable = 0
        """Messages to what is no address, or for which there was no socket; dropped."""

    def send(self, to: Address, message: msgspec.Struct) -> bool:
        """Queue ``message`` for the process that listens at ``to``; False where it was dropped."""
        peer = self._peers.get(to) or self._connect(to)
        if peer is None:
            return False
        self._peers.move_to_end(to)
        try:
            peer.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self.dropped += 1
            return False
        return True

    def _connect(self, to: Address) -> zmq.Socket[bytes] | None:
        """A new socket to ``to``; None where there can be none, for many an address comes from a message."""
        if len(self._peers) >= MAX_PEERS:
            self.forget(next(iter(self._peers)))
        peer = None
        try:
            peer = self._context.socket(zmq.PUSH)
            peer.set(zmq.SNDHWM, QUEUED_MESSAGES)
            peer.set(zmq.MAXMSGSIZE, MAX_ANSWER_BYTES)
            connect(peer, to, self._curve)
        except BaseException as error:
            if peer is not None:
                peer.close(linger=0)  # else the context would wait for it at the end
            if not isinstance(error, zmq.ZMQError | Unreachable):
                raise
            self.unreachable += 1
            warn_now_and_then(self.unreachable, "cannot send to %r: %s", to, error)
            return None
        self._peers[to] = peer
        return peer

    @property
    def num_peers(self) -> int:
        return len(self._peers)

    def forget(self, address: Address) -> None:
        """Close the socket to a peer that is gone; what still waited for it is lost."""
        peer = self._peers.pop(address, None)
        if peer is not None:
            peer.close(linger=0)

    def close(self, linger_ms: int = 200) -> None:
        """Close every socket, giving what was sent last this long to leave."""
        for peer in self._peers.values():
            peer.close(linger=linger_ms)
        self._peers.clear()


class Mailbox:
    """What one process receives, and where it sends from. Belongs to one thread, but for ``post``."""

    def __init__(self, host: str, decode: Decode, port: int = 0, *, curve: CurveKeys | None = None) -> None:
        """Bind to ``port`` (0: a free one) of ``host``, an IP address of this machine. ``Exposed`` where that needs
        ``curve``."""
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        self._decode = decode
        self._socket = bind_pull(self._context, host, port, curve)
        self.address = Address(self._socket.get_string(zmq.LAST_ENDPOINT))
        wake = f"inproc://wake-{id(self)}"
        self._socket.bind(wake)
        self._waker = self._context.socket(zmq.PUSH)
        self._waker.connect(wake)
        self._waker_lock = threading.Lock()
        self._posted: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.outbox = Outbox(self._context, curve)
        self.malformed = 0
        """Frames that were no message for this process; dropped."""

    def post(self, event: object) -> None:
        """Put an event of this process, from any thread, among what ``receive`` returns."""
        self._posted.put(event)
        with self._waker_lock, contextlib.suppress(zmq.Again, zmq.ZMQError):  # closed: nobody listens any more
            self._waker.send(b"", zmq.NOBLOCK)

    def send(self, to: Address, message: msgspec.Struct) -> bool:
        """See ``Outbox.send``."""
        return self.outbox.send(to, message)

    def receive(self, timeout: float | None) -> list[Any]:
        """Messages and posted events in order of arrival; waits ``timeout`` seconds (None: for ever) for the first."""
        wait = None if timeout is None else max(0, round(timeout * 1000))
        if not self._socket.poll(wait):
            return []
        return list(self._waiting())

    def _waiting(self) -> Iterator[Any]:
        for _ in range(MESSAGES_A_TURN):
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                # An empty frame says that something was posted; from outside it is only malformed.
                yield self._decode(frame) if frame else self._posted.get_nowait()
            except (BadMessage, queue.Empty) as error:
                self.malformed += 1
                warn_now_and_then(self.malformed, "dropped a malformed frame of %d bytes: %s", len(frame), error)

    def close(self) -> None:
        self.outbox.close()
        with self._waker_lock:
            self._waker.close(linger=0)
        self._socket.close(linger=0)
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncMailbox:
    """The same for a process that runs on asyncio: ``await receive()``, send without waiting."""

    def __init__(self, host: str, decode: Decode, *, curve: CurveKeys | None = None) -> None:
        self._context: Any = zmq.asyncio.Context()
        self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        self._decode = decode
        self._socket: Any = bind_pull(self._context, host, 0, curve)
        self.address = Address(self._socket.get_string(zmq.LAST_ENDPOINT))
        self.outbox = Outbox(zmq.Context(self._context), curve)
        self.malformed = 0

    def send(self, to: Address, message: msgspec.Struct) -> None:
        self.outbox.send(to, message)

    async def receive(self) -> Any:
        """The next message."""
        while True:
            frame = await self._socket.recv()
            try:
                return self._decode(frame)
            except BadMessage as error:
                self.malformed += 1
                warn_now_and_then(self.malformed, "dropped a malformed frame of %d bytes: %s", len(frame), error)

    def close(self) -> None:
        self.outbox.close()
        self._socket.close(linger=0)
        self._context.term()


def warn_now_and_then(count: int, text: str, *details: object) -> None:
    """Log the first occurrence, and the 2nd, 4th, 8th, ...: who floods us shall not flood the log."""
    if count & (count - 1) == 0:
        log.warning(f"{text} (%d so far)", *details, count)


def bind_pull(context: Any, host: str, port: int = 0, curve: CurveKeys | None = None) -> Any:
    """A bounded PULL socket on ``port`` of ``host`` (0: a free one). Terminates ``context`` where there can be none."""
    socket = context.socket(zmq.PULL)
    try:
        socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES + OVERHEAD)
        socket.set(zmq.RCVHWM, QUEUED_MESSAGES)
        bind(context, socket, host, curve, port)
    except BaseException:
        socket.close(linger=0)
        context.term()
        raise
    return socket

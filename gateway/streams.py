"""Answers that are read on after their client's connection broke: ``stream_options.resumable``.

Without its client such a request goes on for a while, and an answer that has left is kept as long, since what was
written need not have arrived. Whoever names the request reads on behind the last event that it has; of two who do, the
later one gets it.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from gateway.answers import Exchange
from gateway.choice import Choice
from gateway.core.errors import StreamNotFound, StreamTaken
from gateway.core.positions import Cursor
from gateway.hub import Relay
from gateway.orders import Plan
from gateway.rendering import Renderer


@dataclass(slots=True)
class Stream:
    """One answer, whoever reads it."""

    id: str
    """Of its request, and of whose it is."""
    plan: Plan
    renderer: Callable[[], Renderer]
    """A fresh one."""
    relays: list[Relay | None]
    reader: Exchange
    """Who reads it, or did last."""
    forgetting: asyncio.TimerHandle | None = None
    """Set while nobody reads it."""


class Streams:
    """Of one gateway; lives on its event loop."""

    def __init__(self, *, grace: float, most: int) -> None:
        """``grace``: seconds that a stream without a reader is kept; ``most``: streams kept so at once."""
        self._grace = grace
        self._most = most
        self._streams: dict[str, Stream] = {}
        self._fetching: dict[str, asyncio.Task[Stream]] = {}
        self._unread: dict[str, Stream] = {}  # the one that is longest without a reader first

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, stream: Stream) -> None:
        """From now on it may be found."""
        self._streams[stream.id] = stream

    async def find(self, id: str, fetch: Callable[[], Coroutine[Any, Any, Stream]]) -> Stream:
        """Where it is not here, whatever ``fetch`` finds or raises, which is called once for all who ask meanwhile."""
        known = self._streams.get(id)
        if known is not None:
            return known
        fetching = self._fetching.get(id)
        if fetching is None:
            fetching = self._fetching[id] = asyncio.create_task(fetch())
            fetching.add_done_callback(lambda done: self._fetched(id, done))
        return await asyncio.shield(fetching)

    def _fetched(self, id: str, done: asyncio.Task[Stream]) -> None:
        del self._fetching[id]
        if not done.cancelled():
            done.exception()  # whoever still waits has it raised

    def read(
        self, stream: Stream, exchange: Exchange, cursor: Cursor, choices: Callable[[Exchange, Cursor], list[Choice]]
    ) -> None:
        """``exchange`` reads on from ``cursor``; who reads it now hears that it is taken."""
        if stream.forgetting is None:
            stream.reader.refuse(StreamTaken("another connection reads this stream now"))
        else:
            stream.forgetting.cancel()
            stream.forgetting = None
            del self._unread[stream.id]
            stream.reader.let_go()
        stream.reader = exchange
        exchange.resume(stream.relays, choices(exchange, cursor))

    def leave(self, stream: Stream, exchange: Exchange) -> None:
        """``exchange`` reads no more."""
        if exchange is not stream.reader:
            exchange.let_go()
            return
        stream.forgetting = asyncio.get_running_loop().call_later(self._grace, self._forget, stream)
        self._unread[stream.id] = stream
        if len(self._unread) > self._most:
            self._forget(next(iter(self._unread.values())))

    def close(self) -> None:
        """Nobody comes back any more."""
        for stream in list(self._unread.values()):
            self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        assert stream.forgetting is not None, "somebody reads it"
        stream.forgetting.cancel()
        del self._unread[stream.id], self._streams[stream.id]
        stream.reader.close()


def not_found(id: str) -> StreamNotFound:
    """Nobody has this stream, or no longer all of it."""
    return StreamNotFound(f"there is no stream {id[:100]!r} to read on", param="id")

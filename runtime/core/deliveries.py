"""A worker's tokens on their way to the gateways.

Tokens that a step made leave in one ``TokenBatch`` a gateway. Every token of a request is kept until the gateway has
acked its end: a gateway that missed some asks again, and a last chunk that is not acked is sent again. Where the
gateway says so they are kept for a while longer, since another one may adopt the request.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from messages.codec import pack_tokens
from messages.common import Generation, Logprobs
from messages.ids import Address, Attempt, RequestId, WorkerId
from messages.sampling import FinishReason
from messages.worker_to_gateway import Superseded, TokenBatch, TokenChunk
from runtime.core.actions import Send

RESEND_AFTER = 0.5
"""Seconds after which an end that is not acked is sent again."""
FORGET_AFTER = 60.0
"""Seconds after which the gateway of an unacked end is taken for dead."""
KEEP = 10.0
"""Seconds that an acked end is kept for other gateways, where the one that acked asks for it."""
MAX_KEPT = 4096
"""Acked ends that are kept; the oldest goes first."""


class Adopted(NamedTuple):
    """What a gateway gets that adopts a stream."""

    attempt: Attempt
    generation: Generation
    tokens: TokenChunk
    """All of this worker's."""
    sends: list[Send]
    """To the gateway that had it before."""


@dataclass(slots=True)
class _Stream:
    attempt: Attempt
    gateway: Address
    start: int
    """Output position of the first token that this worker has."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs | None] = field(default_factory=list)
    prompt_logprobs: Logprobs | None = None
    finish: FinishReason | None = None
    kv_bytes: int = 0
    cached_tokens: int = 0
    generation: Generation | None = None
    """What is told to a gateway that adopts it; None where none can."""
    before: tuple[Address, Attempt] | None = None
    """Who had it before, and as which attempt."""
    adoptions: dict[tuple[Address, int], None] = field(default_factory=dict)
    """That were granted, by gateway and the gateway's number of it: a late repetition takes it from nobody."""
    sent: int = 0
    handed_over: bool = False
    resend_at: float = float("inf")
    forget_at: float = float("inf")


class Deliveries:
    """The token streams of one worker, at most one a request."""

    def __init__(self, worker: WorkerId) -> None:
        self._worker = worker
        self._streams: dict[RequestId, _Stream] = {}
        self._dirty: dict[RequestId, None] = {}  # in the order in which they got tokens
        self._ended: dict[RequestId, None] = {}  # finished, not acked
        self._kept: OrderedDict[RequestId, None] = OrderedDict()  # nobody waits for them; in the order of forget_at

    def __contains__(self, request: RequestId) -> bool:
        return request in self._streams

    def __len__(self) -> int:
        """Streams that somebody waits for."""
        return len(self._streams) - len(self._kept)

    def open(
        self,
        request: RequestId,
        attempt: Attempt,
        gateway: Address,
        start: int,
        *,
        kv_bytes: int = 0,
        cached_tokens: int = 0,
        generation: Generation | None = None,
    ) -> None:
        """A stream whose first token will have output position ``start``; replaces that of an older attempt.
        ``generation``: of a stream that may be adopted."""
        self.close(request)
        stream = _Stream(attempt, gateway, start, kv_bytes=kv_bytes, cached_tokens=cached_tokens)
        if generation is not None and generation.description:
            stream.generation = generation
        self._streams[request] = stream

    def add(self, request: RequestId, token: int, logprobs: Logprobs | None = None, *, deliver: bool = True) -> None:
        """The stream's next token. ``deliver=False``: the gateway has it from another worker."""
        stream = self._streams[request]
        stream.tokens.append(token)
        stream.logprobs.append(logprobs)
        if deliver:
            self._dirty[request] = None
        else:
            stream.sent = len(stream.tokens)

    def note_cached(self, request: RequestId, cached_tokens: int) -> None:
        """So many tokens of the prompt did not have to be computed."""
        self._streams[request].cached_tokens = cached_tokens

    def add_prompt_logprobs(self, request: RequestId, logprobs: Logprobs, *, deliver: bool = True) -> None:
        self._streams[request].prompt_logprobs = logprobs
        if deliver:
            self._dirty[request] = None

    def finish(self, request: RequestId, reason: FinishReason) -> None:
        """The tokens added so far are all."""
        self._streams[request].finish = reason
        self._dirty[request] = None

    def hand_over(self, request: RequestId) -> None:
        """Another worker answers for the request, once the tokens added so far have left."""
        self._streams[request].handed_over = True

    def flush(self, now: float) -> list[Send]:
        """What was added since the last time: one batch a gateway."""
        batches: dict[Address, list[TokenChunk]] = {}
        for request in self._dirty:
            stream = self._streams.get(request)
            if stream is not None:
                batches.setdefault(stream.gateway, []).append(self._chunk(request, stream, stream.sent))
                stream.sent = len(stream.tokens)
                if stream.handed_over:
                    del self._streams[request]
                elif stream.finish is not None:
                    self._await_ack(request, stream, now)
        self._dirty.clear()
        return [Send(gateway, TokenBatch(self._worker, tuple(chunks))) for gateway, chunks in batches.items()]

    def resend(self, request: RequestId, attempt: Attempt, index: int) -> list[Send]:
        """Everything sent so far from output position ``index`` on, as far as this worker has it."""
        stream = self._streams.get(request)
        if stream is None or request in self._kept:
            return []
        if stream.attempt == attempt:
            return [self._send(request, stream, max(0, index - stream.start))]
        return self._superseded(request, stream) if stream.before is not None and stream.before[1] == attempt else []

    def adopt(self, request: RequestId, gateway: Address, number: int, now: float) -> Adopted | None:
        """``gateway`` goes on with the stream, as the attempt after the next; None where none can, or where another one
        has adopted it since. What was sent so far, or is to be sent, it gets with this. ``number``: of the adoption."""
        stream = self._streams.get(request)
        if stream is None or stream.generation is None:
            return None
        if stream.gateway != gateway and (gateway, number) in stream.adoptions:
            return None
        stream.adoptions[gateway, number] = None
        sends = []
        if stream.gateway != gateway:
            stream.before = (stream.gateway, stream.attempt)
            sends = [] if request in self._kept else self._superseded(request, stream)
            # The next attempt may be on its way to the former gateway, as a move: it shall not be taken for this one.
            stream.gateway, stream.attempt = gateway, Attempt(stream.attempt + 2)
        stream.sent = len(stream.tokens)
        self._dirty.pop(request, None)
        if stream.finish is not None:
            self._kept.pop(request, None)
            self._await_ack(request, stream, now)
        elif request in self._kept:  # a stop string has ended it, which the gateway will find too
            stream.forget_at = now + KEEP
            self._kept.move_to_end(request)
        return Adopted(stream.attempt, stream.generation, self._chunk(request, stream, 0), sends)

    def tick(self, now: float) -> list[Send]:
        """Send ends again that were not acked in time, with all their tokens."""
        sends = []
        while self._kept and now >= self._streams[oldest := next(iter(self._kept))].forget_at:
            self.close(oldest)
        for request in list(self._ended):
            stream = self._streams[request]
            if now >= stream.forget_at:
                self.close(request)
            elif now >= stream.resend_at:
                stream.resend_at = now + RESEND_AFTER
                sends.append(self._send(request, stream, 0))
        return sends

    @property
    def wake_at(self) -> float:
        """When ``tick`` has something to do at the latest."""
        kept = self._streams[next(iter(self._kept))].forget_at if self._kept else float("inf")
        return min(kept, *(self._streams[request].resend_at for request in self._ended), float("inf"))

    def close(self, request: RequestId, attempt: Attempt | None = None) -> None:
        """The gateway has it all, or wants no more (of this attempt, where one is named)."""
        stream = self._streams.get(request)
        if stream is not None and attempt in (None, stream.attempt):
            del self._streams[request]
            self._dirty.pop(request, None)
            self._ended.pop(request, None)
            self._kept.pop(request, None)

    def keep(self, request: RequestId, attempt: Attempt, now: float) -> None:
        """The gateway has it all, but another one may still ask for it."""
        stream = self._streams.get(request)
        if stream is None or stream.attempt != attempt or request in self._kept:
            return
        if stream.generation is None:
            self.close(request)
            return
        self._dirty.pop(request, None)
        self._ended.pop(request, None)
        stream.forget_at = now + KEEP
        self._kept[request] = None
        if len(self._kept) > MAX_KEPT:
            self.close(next(iter(self._kept)))

    def gateways(self) -> Iterator[Address]:
        """Of all streams."""
        return (stream.gateway for stream in self._streams.values())

    def close_all(self, gateway: Address) -> None:
        """Nobody is there to take them."""
        for request in [request for request, stream in self._streams.items() if stream.gateway == gateway]:
            self.close(request)

    def fence(self, request: RequestId, attempt: Attempt) -> None:
        """Nothing of attempts up to ``attempt`` is wanted any more, but for what is kept of just this one."""
        stream = self._streams.get(request)
        kept = stream is not None and stream.attempt == attempt and request in self._kept
        if stream is not None and stream.attempt <= attempt and not kept:
            self.close(request)

    def _await_ack(self, request: RequestId, stream: _Stream, now: float) -> None:
        self._ended[request] = None
        stream.resend_at, stream.forget_at = now + RESEND_AFTER, now + FORGET_AFTER

    def _superseded(self, request: RequestId, stream: _Stream) -> list[Send]:
        assert stream.before is not None
        gateway, attempt = stream.before
        return [Send(gateway, Superseded(request=request, attempt=attempt, worker=self._worker))]

    def _send(self, request: RequestId, stream: _Stream, first: int) -> Send:
        return Send(stream.gateway, TokenBatch(self._worker, (self._chunk(request, stream, first),)))

    def _chunk(self, request: RequestId, stream: _Stream, first: int) -> TokenChunk:
        return TokenChunk(
            request=request,
            attempt=stream.attempt,
            index=stream.start + first,
            tokens=pack_tokens(stream.tokens[first:]),
            logprobs=_joined(stream.logprobs[first:]),
            prompt_logprobs=stream.prompt_logprobs if first == 0 else None,
            finish=stream.finish,
            kv_bytes=stream.kv_bytes if first <= 1 else 0,
            cached_tokens=stream.cached_tokens if first == 0 else 0,
        )


def _joined(parts: list[Logprobs | None]) -> Logprobs | None:
    present = [part for part in parts if part is not None]
    if not present or len(present) != len(parts):
        return None
    return Logprobs.joined(present)

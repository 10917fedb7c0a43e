"""A scripted cluster behind a gateway: router, prefill and decode worker in one thread with one real mailbox.

It stands in for the gateway's peers only; it speaks their real messages over real sockets. What a test asks of it is
scripted by ``script`` (token ids of an answer) and by the switches.
"""

import functools
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from messages.codec import decoder_for, pack_tokens, unpack_tokens
from messages.common import BlockCounts, FailReason, Generation, Logprobs, Role, Ticket, WorkerAddress
from messages.gateway_to_router import AdoptionWanted, ClusterStateWanted, Finished, PlacementWanted, Prefilled
from messages.gateway_to_worker import Abort, EndAck, Generate, Prefill, TokensWanted
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.router_to_gateway import AdoptionAsked, ClusterState, Placed, WorkerState
from messages.sampling import FinishReason
from messages.worker_to_gateway import Adopted, AttemptFailed, Superseded, TokenBatch, TokenChunk
from runtime.mailbox import Mailbox

EPOCH = Epoch(7)
PREFILL, DECODE = WorkerId("prefill-0"), WorkerId("decode-0")
TICKET = Ticket(prefill=PREFILL, prefill_epoch=EPOCH, decode=DECODE, decode_epoch=EPOCH, mac=bytes(32))
KV_BYTES = 4096
TIMEOUT = 10.0

Script = Callable[[list[int], int], list[int]]
"""Prompt and ``max_tokens`` -> the answer's tokens; shorter than ``max_tokens`` means that it ended by itself."""


def counting(prompt: list[int], max_tokens: int) -> list[int]:
    return [(prompt[0] + i) % 1000 + 100 for i in range(max_tokens)]


@dataclass
class Made:
    """What a request has brought about so far, as its worker knows it."""

    order: Prefill | Generate
    gateway: Address
    attempt: Attempt
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None


class FakeCluster:
    def __init__(self) -> None:
        self.script: Script = counting
        self.hold_after: int | None = None
        """Tokens after which an answer stands still until ``release``."""
        self.on_placement: Callable[[PlacementWanted], Any] | None = None
        """Answers ``PlacementWanted`` instead of a ``Placed``; None: does not answer."""
        self.ready = True
        self.cached_tokens = 0
        """That it says it had of each prompt."""
        self.received: list[Any] = []
        """In order of arrival; of requests that were placed since ``reset`` only."""
        self.chunk_size = 3
        self._held: dict[RequestId, Callable[[], None]] = {}
        self._made: dict[RequestId, Made] = {}
        self._requests: set[RequestId] = set()
        self._changed = threading.Condition()
        self._stopping = False
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="fake-cluster")
        self._thread.start()
        assert started.wait(TIMEOUT)

    # From the test's thread

    @property
    def address(self) -> Address:
        return self._mailbox.address

    def reset(self) -> None:
        with self._changed:
            self.script, self.hold_after, self.on_placement, self.ready = counting, None, None, True
            self.chunk_size, self.cached_tokens = 3, 0
            self.received.clear()
            self._requests.clear()
            self._held.clear()
            self._made.clear()

    def wait_for(self, kind: type[Any], count: int = 1, timeout: float = TIMEOUT) -> list[Any]:
        """The messages of this kind so far, once there are ``count``."""
        with self._changed:
            enough = self._changed.wait_for(lambda: len(self.of(kind)) >= count, timeout)
            assert enough, f"{len(self.of(kind))} {kind.__name__} of {count} came; received {self.received}"
            return self.of(kind)

    def of(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.received if isinstance(message, kind)]

    def do(self, action: Callable[[], None]) -> None:
        """Run ``action`` in the cluster's thread."""
        self._mailbox.post(action)

    def send(self, gateway: Address, message: Any) -> None:
        self.do(lambda: self._mailbox.send(gateway, message))

    def made(self, request: str) -> Made:
        """What there is of a request."""
        return self._made[RequestId(request)]

    def forget(self, request: str) -> None:
        """The worker has nothing of it any more."""
        self.do(lambda: self._made.pop(RequestId(request), None))

    def fail(self, request: str) -> None:
        """Its decode worker gives it up."""
        made = self._made[RequestId(request)]
        self._held.pop(made.order.request, None)
        failed = AttemptFailed(
            request=made.order.request, attempt=made.attempt, worker=DECODE, reason=FailReason.ENGINE, detail="it broke"
        )
        self.send(made.gateway, failed)

    def release(self) -> None:
        """Go on with what stands still."""

        def go_on() -> None:
            held, self._held = self._held, {}
            for action in held.values():
                action()

        self.hold_after = None
        self.do(go_on)

    def stop(self) -> None:
        def stop() -> None:
            self._stopping = True

        self.do(stop)
        self._thread.join(TIMEOUT)

    # In the cluster's thread

    def _run(self, started: threading.Event) -> None:
        decode = decoder_for(
            PlacementWanted, Prefilled, Finished, ClusterStateWanted, AdoptionWanted,
            Prefill, Generate, Abort, EndAck, TokensWanted,
        )  # fmt: skip
        with Mailbox("127.0.0.1", decode) as self._mailbox:
            started.set()
            while not self._stopping:
                for message in self._mailbox.receive(None):
                    if callable(message):
                        message()
                        continue
                    self._record(message)  # first, so that who has the answer finds the question
                    self._handle(message)

    def _record(self, message: Any) -> None:
        with self._changed:
            if isinstance(message, PlacementWanted):
                self._requests.add(message.request)
            if isinstance(message, ClusterStateWanted | AdoptionWanted) or message.request in self._requests:
                self.received.append(message)
                self._changed.notify_all()

    def _handle(self, message: Any) -> None:
        match message:
            case ClusterStateWanted():
                self._mailbox.send(message.gateway, self.state())
            case PlacementWanted():
                answer = self.placed(message) if self.on_placement is None else self.on_placement(message)
                if answer is not None:
                    self._mailbox.send(message.gateway, answer)
            case Prefill() | Generate():
                self.answer(message)
            case AdoptionWanted():
                self._let_adopt(message)
            case Abort() | EndAck():
                made = self._made.get(message.request)
                if made is not None and made.attempt <= message.attempt:
                    self._held.pop(message.request, None)
                    # An abort after the end is for decode, which knows nothing of what prefill has ended.
                    if not message.keep and (made.finish is None or isinstance(message, EndAck)):
                        del self._made[message.request]

    def placed(self, wanted: PlacementWanted) -> Placed:
        prefill, decode = (WorkerAddress(worker, EPOCH, self._mailbox.address) for worker in (PREFILL, DECODE))
        return Placed(request=wanted.request, attempt=wanted.attempt, prefill=prefill, decode=decode, ticket=TICKET)

    def answer(self, order: Prefill | Generate) -> None:
        """The script's tokens: the first from prefill, the others from decode."""
        generation = order.generation
        self._made[order.request] = Made(order, order.gateway, order.attempt)
        start = len(generation.generated) // 4
        prompt = unpack_tokens(generation.prompt).tolist()
        tokens = self.script(prompt, generation.sampling.max_tokens)
        ended = len(tokens) < generation.sampling.max_tokens
        reason = FinishReason.STOP if ended else FinishReason.LENGTH
        cuts = [start, min(start + 1, len(tokens)), *range(start + 1 + self.chunk_size, len(tokens), self.chunk_size)]
        if len(tokens) > cuts[-1]:
            cuts.append(len(tokens))
        self._go_on(order, tokens, list(dict.fromkeys(cuts)), reason)

    def _go_on(self, order: Any, tokens: list[int], cuts: list[int], reason: FinishReason) -> None:
        for i, (first, last) in enumerate(itertools.pairwise(cuts if len(cuts) > 1 else cuts * 2)):
            if self.hold_after is not None and last > self.hold_after:
                self._held[order.request] = functools.partial(self._go_on, order, tokens, cuts[i:], reason)
                return
            start = len(order.generation.generated) // 4
            self._send_chunk(
                order, order.generation, first, tokens[first:last], reason if last == len(tokens) else None, start
            )

    def _send_chunk(
        self, order: Any, work: Generation, index: int, tokens: list[int], finish: FinishReason | None, start: int
    ) -> None:
        made = self._made[order.request]
        made.tokens += tokens
        made.finish = finish
        chunk = self._chunk(made, index, tokens, start)
        worker = PREFILL if index == start and isinstance(order, Prefill) else DECODE
        self._mailbox.send(made.gateway, TokenBatch(worker, (chunk,)))

    def _chunk(self, made: Made, index: int, tokens: list[int], start: int) -> TokenChunk:
        work, sampling = made.order.generation, made.order.generation.sampling
        prompt_logprobs = None
        if sampling.prompt_logprobs is not None and index == 0:
            prompt_logprobs = logprobs_of(unpack_tokens(work.prompt).tolist()[1:], sampling.prompt_logprobs)
        return TokenChunk(
            request=made.order.request,
            attempt=made.attempt,
            index=index,
            tokens=pack_tokens(tokens),
            logprobs=None if sampling.logprobs is None else logprobs_of(tokens, sampling.logprobs),
            prompt_logprobs=prompt_logprobs,
            finish=made.finish,
            kv_bytes=KV_BYTES if index == start + 1 else 0,
            cached_tokens=self.cached_tokens if index == start else 0,
        )

    def _let_adopt(self, wanted: AdoptionWanted) -> None:
        made = self._made.get(wanted.request)
        asked = AdoptionAsked(request=wanted.request, workers=() if made is None else (DECODE,))
        self._mailbox.send(wanted.gateway, asked)
        if made is None:
            return
        if made.gateway != wanted.gateway:
            over = Superseded(request=wanted.request, attempt=made.attempt, worker=DECODE)
            self._mailbox.send(made.gateway, over)
            if made.tokens or made.finish is not None:
                made.gateway, made.attempt = wanted.gateway, Attempt(made.attempt + 1)
        start = len(made.order.generation.generated) // 4
        adopted = Adopted(
            request=wanted.request,
            attempt=made.attempt,
            worker=WorkerAddress(DECODE, EPOCH, self._mailbox.address),
            generation=made.order.generation,
            tokens=self._chunk(made, start, made.tokens, start),
            running=bool(made.tokens) or made.finish is not None,
        )
        self._mailbox.send(wanted.gateway, adopted)

    def state(self) -> ClusterState:
        blocks = BlockCounts(free=90, held=8, cached=2, total=100)
        workers = tuple(
            WorkerState(
                worker=worker,
                epoch=EPOCH,
                role=role,
                alive=True,
                running=1,
                waiting=2,
                steps=3,
                blocks=blocks,
                kv_bytes_sent=4,
                kv_bytes_received=5,
                transfers=6,
                assigned=7,
            )
            for worker, role in ((PREFILL, Role.PREFILL), (DECODE, Role.DECODE))
        )
        return ClusterState(workers=workers, queued=0, ready=self.ready)


def logprobs_of(tokens: list[int], top: int) -> Logprobs:
    """Token t has logprob -t / 1000, and the alternatives t, t+1, ..."""
    return Logprobs(
        sampled=tuple(-token / 1000 for token in tokens),
        ranks=tuple(1 for _ in tokens),
        top_ids=tuple(tuple((token + i) % 2048 for i in range(top)) for token in tokens),
        top_logprobs=tuple(tuple(-(token + i) / 1000 for i in range(top)) for token in tokens),
    )

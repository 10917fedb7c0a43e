"""One request's life: it owns the transcript, and asks for attempts until the transcript is complete.

1. ``start``: ``PlacementWanted`` goes to the router, again until an answer comes.
2. ``Placed``: ``Prefill`` goes to the prefill worker (``Generate`` to the decode worker where one does both), again
   until the first token comes.
3. Tokens come by index. A chunk of an older attempt is dropped and counted, a repeat is dropped; after a gap nothing is
   delivered before decode has sent the missing tokens again.
4. The last chunk: ``EndAck`` to its worker, ``Finished`` to the router, ``Ended`` to the shell.

When an attempt fails or a worker in use is lost, the old attempt is aborted and the next one placed; it gets the tokens
delivered so far, so the stream goes on without a gap or a repeat. Silence is not failure: workers that live may be
busy, and the router tells when they are lost. A silent stream is asked for; only after a long while without any
progress is the attempt given up. After ``max_attempts`` there is one typed error; an attempt that ended with a worker
which was only silent, or stopped in good order, counts less. A worker that is draining has done nothing wrong: while it
goes on, the next attempt is asked for (``MoveWanted``), which takes its KV along. Whatever happens, there is exactly
one ``Ended`` or ``Failed``.
"""

import dataclasses
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from gateway.core import salts
from gateway.core.errors import (
    AttemptsExhausted,
    GatewayError,
    InvalidRequest,
    Overloaded,
    StreamTaken,
    Unavailable,
)
from messages.codec import count_tokens, unpack_tokens
from messages.common import FailReason, Generation, Logprobs, WorkerAddress
from messages.gateway_to_router import Computed, Finished, Held, PlacementWanted, Prefilled
from messages.gateway_to_worker import Abort, EndAck, Generate, Prefill, TokensWanted
from messages.ids import Address, Attempt, RequestId, WorkerId
from messages.router_to_gateway import MoveWanted, Placed, Rejected, WorkerLost
from messages.sampling import FinishReason, SamplingParams
from messages.worker_to_gateway import Adopted, AttemptFailed, Superseded, TokenChunk
from runtime.core.actions import Send, WakeAt


class Status(StrEnum):
    PLACING = "placing"
    """The router is asked for workers."""
    STARTING = "starting"
    """A worker has the request; no token of this attempt is there yet."""
    STREAMING = "streaming"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    """The client went away."""

    @property
    def over(self) -> bool:
        return not _MOVES[self]


_ENDS = frozenset({Status.FINISHED, Status.FAILED, Status.CANCELLED})
_MOVES: dict[Status, frozenset[Status]] = {
    Status.PLACING: _ENDS | {Status.STARTING},
    Status.STARTING: _ENDS | {Status.STREAMING, Status.PLACING},
    Status.STREAMING: _ENDS | {Status.PLACING, Status.STARTING},
    Status.FINISHED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}


class Chunk(NamedTuple):
    """Tokens came from ``worker``."""

    worker: WorkerId
    chunk: TokenChunk


class Tick(NamedTuple):
    """The time that a ``WakeAt`` asked for has come."""


class StopMatched(NamedTuple):
    """The text contains a stop string: no more tokens are wanted."""


class ClientGone(NamedTuple):
    """Nobody reads the answer any more."""


class RouterRestarted(NamedTuple):
    """Another process is the router now: it has never heard of this request."""


class ShutDown(NamedTuple):
    """The gateway stops: the client gets an error now."""


Event = (
    Placed
    | Rejected
    | Chunk
    | AttemptFailed
    | Superseded
    | WorkerLost
    | MoveWanted
    | Tick
    | StopMatched
    | ClientGone
    | RouterRestarted
    | ShutDown
)


class Deliver(NamedTuple):
    """These tokens are the client's next ones."""

    tokens: list[int]
    logprobs: Logprobs | None
    """One entry a token."""
    prompt_logprobs: Logprobs | None
    finish: FinishReason | None
    """Set with the last tokens; ``Ended`` follows."""
    cached_tokens: int = 0
    """Tokens of the prompt that did not have to be computed; said once."""


class Ended(NamedTuple):
    reason: FinishReason


class Failed(NamedTuple):
    error: GatewayError


Action = Send | WakeAt | Deliver | Ended | Failed


FAILURE = 1.0
"""What an attempt counts that has failed, or whose worker has died with it: another one may die of the request too."""
MISHAP = 1 / 4
"""What it counts where a worker was silent, and may be back, or was stopped: that is not the request's doing. It counts
at all because a request that makes every worker hang must end too."""
KEPT_FROM = (FailReason.REFUSED, FailReason.TRANSFER, FailReason.SLOW)
"""Why an attempt's KV did not get from its prefill worker to its decode worker, or not in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTimeouts:
    """Seconds."""

    ask_again: float = 0.25
    """Until a placement or start message without an effect is sent again; doubles each time."""
    ask_again_most: float = 8.0
    placement: float = 120.0
    """Until a request that the router does not answer fails. Longer than the router lets a new one wait; a further
    attempt waits at the head of its line for as long as the workers that live are full."""
    first_token: float = 120.0
    """Until an attempt without any token is given up. Long, since it may wait its turn in a prefill worker's queue, and
    since the router tells when that worker is lost."""
    silence: float = 5.0
    """Until a stream that has fallen silent is asked for its tokens; doubles each time, up to ``ask_again_most``."""
    progress: float = 120.0
    """Until an attempt whose tokens stop coming is given up. Long, since it may wait for room in a busy decode worker,
    and since the router tells when that worker is lost."""
    gap: float = 0.25
    """Until missing tokens are asked for again."""


class Session:
    """``handle(event, now)``; ``now`` in seconds never goes back. Nothing happens after ``Ended`` or ``Failed``."""

    def __init__(
        self,
        request: RequestId,
        prompt: bytes,
        sampling: SamplingParams,
        *,
        gateway: Address,
        router: Address,
        tenant: str,
        cache_salt: str = "",
        traced: bool = False,
        description: bytes = b"",
        timeouts: SessionTimeouts,
        max_attempts: int,
    ) -> None:
        """``prompt``: packed token ids, at least one. ``cache_salt``: the client's own; see ``salts``. ``traced``: the
        workers tell what they do when. ``description``: see ``Generation``."""
        self.request = request
        self.prompt = prompt
        self.sampling = sampling
        self.generated = bytearray()
        """The transcript: packed ids of every token delivered."""
        self.status = Status.PLACING
        self.attempt = Attempt(0)
        self._asked = Attempt(0)  # the last attempt asked for: this one, or the one that this one shall move to
        self.placed: Placed | None = None
        """Of this attempt, or of the last one when the session is over."""
        self.kv_bytes = 0
        """KV bytes that moved between workers for this request, all attempts together."""
        self.prompt_logprobs: Logprobs | None = None
        self.cached_tokens = 0
        """Of the prompt, at the first attempt."""
        self.finish: FinishReason | None = None
        """That a worker has sent; a stop string ends a request without it."""
        self.late_chunks = 0
        self.repeated_chunks = 0
        self.bad_chunks = 0
        self._gateway = gateway
        self._router = router
        self._tenant = tenant
        self._salt = salts.cache_salt(tenant, cache_salt)
        self._traced = traced
        self.description = description
        self._timeouts = timeouts
        self._max_attempts = max_attempts
        self._spent = 0.0  # of max_attempts
        self._avoid: dict[WorkerId, None] = {}
        self._cut: dict[tuple[WorkerId, WorkerId], None] = {}  # between which KV did not get through
        self._computed: Computed | None = None  # by the last prefill worker that is not to blame for a failed attempt
        self._placed_tokens = 0  # of this attempt's prompt, what was generated before counted in
        self._mailboxes: dict[WorkerId, Address] = {}  # of all attempts' workers
        self._moves = False  # whether this attempt takes a running one over from a worker that is drained
        self._decode_streams = False  # whether decode has sent tokens of this attempt: prefill is done
        self._attempt_kv_bytes = 0
        self._logprobs: list[Logprobs] = []  # one entry a chunk of what was generated
        self._begun = False  # whether anything was delivered
        self._prompt_logprobs_due = sampling.prompt_logprobs is not None
        self._again_at = self._again_after = 0.0
        self._give_up_at = 0.0
        self._gap_at: float | None = None
        self._wake_at = float("inf")  # the earliest wake that the shell owes
        self._story: deque[str] = deque(maxlen=64)

    @property
    def num_generated(self) -> int:
        return len(self.generated) // 4

    def transcript(self) -> Deliver | None:
        """Everything delivered so far, for who has not heard it; None where that is nothing."""
        if not self._begun:
            return None
        tokens = unpack_tokens(bytes(self.generated)).tolist()
        return Deliver(tokens, self._known_logprobs(), self.prompt_logprobs, self.finish, self.cached_tokens)

    def _known_logprobs(self) -> Logprobs | None:
        """Of all that was generated; None where they are not wanted, or a worker has left some out."""
        if not self._logprobs:
            return None
        logprobs = Logprobs.joined(self._logprobs)
        return logprobs if len(logprobs.sampled) == self.num_generated else None

    @property
    def held(self) -> Held | None:
        """What a router that was restarted does not know of it; None where nothing is placed."""
        placed = self.placed
        if placed is None or self.status.over:
            return None
        prefill = None if self._decode_streams or placed.prefill is None else placed.prefill
        return Held(
            request=self.request,
            attempt=self.attempt,
            prefill=None if prefill is None else (prefill.worker, prefill.epoch),
            decode=(placed.decode.worker, placed.decode.epoch),
            num_tokens=self._placed_tokens,
            max_new_tokens=max(0, count_tokens(self.prompt) + self.sampling.max_tokens - self._placed_tokens),
            prefilled=self.status is Status.STREAMING,
        )

    def start(self, now: float) -> list[Action]:
        """The first attempt."""
        return self._with_wake(self._place(now))

    def adopt(self, adopted: Adopted, now: float) -> list[Action]:
        """Instead of ``start``: go on with what another gateway has begun. Nothing of it is delivered again."""
        work, made = adopted.generation, adopted.tokens
        self._salt = work.cache_salt
        self.attempt = self._asked = adopted.attempt
        self.generated = bytearray(work.generated + made.tokens)
        self._logprobs = [part for part in (work.logprobs, made.logprobs) if part is not None]
        self.prompt_logprobs = work.prompt_logprobs or made.prompt_logprobs
        self._prompt_logprobs_due = self.sampling.prompt_logprobs is not None and self.prompt_logprobs is None
        self.cached_tokens = made.cached_tokens
        self.finish = made.finish
        self._begun = bool(self.generated) or made.finish is not None
        worker = adopted.worker
        self._mailboxes[worker.worker] = worker.mailbox
        self._move(Status.STARTING)
        self.placed = Placed(request=self.request, attempt=self.attempt, prefill=None, decode=worker, ticket=None)
        self._placed_tokens = work.num_tokens
        if not adopted.running:
            self._asked = Attempt(self.attempt + 1)  # the gateway before may have asked for that
            return self._with_wake(self._retry([], now, MISHAP))
        self._move(Status.STREAMING)
        self._decode_streams = True
        self._give_up_at = now + self._timeouts.progress
        self._ask_from(now, self._timeouts.silence)
        return self._with_wake([] if made.finish is None else self._complete(worker.worker, made.finish))

    def handle(self, event: Event, now: float) -> list[Action]:
        """What ``event`` calls for."""
        if isinstance(event, Chunk):
            return self._with_wake(self._chunk(event.worker, event.chunk, now))
        if isinstance(event, Tick):
            self._wake_at = float("inf")
        else:
            self._story.append(f"{now:.3f} {self.status} #{self.attempt}: {event!r:.200}")
        if self.status.over:
            return []
        return self._with_wake(self._dispatch(event, now))

    def _dispatch(self, event: Event, now: float) -> list[Action]:
        match event:
            case Placed():
                return self._on_placed(event, now)
            case Rejected() if event.attempt == self.attempt and self.status is Status.PLACING:
                return self._fail(_rejection(event))
            case AttemptFailed():
                return self._on_attempt_failed(event, now)
            case Superseded() if event.attempt + 1 >= self.attempt:
                return self._taken(event)
            case WorkerLost():
                return self._on_worker_lost(event, now)
            case MoveWanted():
                return self._on_move_wanted(event)
            case Tick():
                return self._on_tick(now)
            case StopMatched():
                return [*self._abort(keep=bool(self.description)), *self._end(Status.FINISHED, FinishReason.STOP)]
            case ClientGone():
                return [*self._abort(), *self._end(Status.CANCELLED, FinishReason.ABORT)]
            case RouterRestarted() if self.status is Status.PLACING:
                self._ask_from(now, self._timeouts.ask_again)
                return [self._placement_wanted(self._computed)]
            case ShutDown():
                return self._fail(Unavailable("the server is shutting down", retry_after=1.0))
        return []

    # Attempts

    def _place(self, now: float) -> list[Action]:
        self.attempt = self._asked = Attempt(self._asked + 1)
        self._change_workers(None)
        self._give_up_at = now + self._timeouts.placement
        self._ask_from(now, self._timeouts.ask_again)
        return [self._placement_wanted(self._computed)]

    def _placement_wanted(self, computed: Computed | None, *, moving: bool = False) -> Send:
        wanted = PlacementWanted(
            request=self.request,
            attempt=self._asked,
            gateway=self._gateway,
            tenant=self._tenant,
            num_tokens=count_tokens(self.prompt) + self.num_generated,
            max_new_tokens=max(0, self.sampling.max_tokens - self.num_generated),
            avoid=tuple(self._avoid),
            cut=tuple(self._cut),
            computed=computed,
            moving=moving,
        )
        return Send(self._router, wanted)

    def _on_move_wanted(self, event: MoveWanted) -> list[Action]:
        """The worker that sends the tokens shall be spared: ask for the next attempt, and take what comes meanwhile."""
        placed = self.placed
        if placed is None or (placed.decode.worker, placed.decode.epoch) != (event.worker, event.epoch):
            return []
        if not self._decode_streams:
            return []  # its KV is on the way there; this is said again
        if self._asked == self.attempt:
            self._asked = Attempt(self.attempt + 1)  # it is nobody's fault, and costs nothing
        num_tokens = count_tokens(self.prompt) + self.num_generated
        return [self._placement_wanted(Computed(event.worker, event.epoch, num_tokens), moving=True)]

    def _on_placed(self, placed: Placed, now: float) -> list[Action]:
        moves = self.status is Status.STREAMING and self._asked != self.attempt
        if placed.attempt == self.attempt and self.status is Status.STREAMING:
            return [self._prefilled()]  # the router has missed it
        if placed.attempt != self._asked or not (moves or self.status is Status.PLACING):
            return []
        self._moves = moves
        self._move(Status.STARTING)
        self.attempt = self._asked
        self._change_workers(placed)
        self._placed_tokens = count_tokens(self.prompt) + self.num_generated
        for worker in self._workers():
            self._mailboxes[worker.worker] = worker.mailbox
        self._give_up_at = now + self._timeouts.first_token
        self._ask_from(now, self._timeouts.ask_again)
        return [self._start_message(placed)]

    def _prefilled(self) -> Send:
        return Send(self._router, Prefilled(request=self.request, attempt=self.attempt))

    def _change_workers(self, placed: Placed | None) -> None:
        self.placed = placed
        self._decode_streams = False
        self._attempt_kv_bytes = 0
        self._gap_at = None

    def _start_message(self, placed: Placed) -> Send:
        sampling = self.sampling
        if sampling.prompt_logprobs is not None and not self._prompt_logprobs_due:
            sampling = _without_prompt_logprobs(sampling)
        work = Generation(
            prompt=self.prompt,
            sampling=sampling,
            generated=bytes(self.generated),
            cache_salt=self._salt,
            traced=self._traced,
            description=self.description,
            logprobs=self._known_logprobs() if self.description else None,
            prompt_logprobs=self.prompt_logprobs if self.description else None,
        )
        if placed.prefill is None or placed.ticket is None:
            message: Any = Generate(request=self.request, attempt=self.attempt, gateway=self._gateway, generation=work)
            return Send(placed.decode.mailbox, message)
        message = Prefill(
            request=self.request,
            attempt=self.attempt,
            gateway=self._gateway,
            generation=work,
            decode=placed.decode,
            ticket=placed.ticket,
        )
        return Send(placed.prefill.mailbox, message)

    def _on_attempt_failed(self, event: AttemptFailed, now: float) -> list[Action]:
        if event.attempt != self.attempt or self.placed is None:
            return []
        decode = self.placed.decode.worker
        if event.worker != decode and self._decode_streams:
            return []  # the prefill worker has done its part, whatever became of it since
        if not event.reason.retryable:
            return self._fail(InvalidRequest("the request does not fit: " + event.detail, code="capacity_exceeded"))
        if event.reason in KEPT_FROM and self.placed.prefill is not None:
            self._cut[self.placed.prefill.worker, decode] = None
        match event.reason:
            case FailReason.REFUSED | FailReason.PEER_LOST:
                blamed = [decode]
            case FailReason.TRANSFER:
                blamed = [event.worker, decode]
            case FailReason.SLOW:
                return self._retry([decode], now, MISHAP)
            case FailReason.STOPPING:
                return self._retry([event.worker], now, MISHAP)
            case FailReason.ORPHANED | FailReason.UNKNOWN:
                return self._retry([], now, MISHAP)
            case _:
                blamed = [event.worker]
        return self._retry(blamed, now)

    def _on_worker_lost(self, event: WorkerLost, now: float) -> list[Action]:
        lost = [worker for worker in self._workers() if (worker.worker, worker.epoch) == (event.worker, event.epoch)]
        if not lost or self.placed is None:
            return []
        if lost[0] is not self.placed.decode and self._decode_streams:
            return []  # the prefill worker has done its part
        if event.dead:
            return self._retry([event.worker], now)
        return self._retry([], now, MISHAP)  # it may be back by now, and is placed on only if so

    def _retry(self, blamed: list[WorkerId], now: float, cost: float = FAILURE) -> list[Action]:
        actions = self._abort()
        if self._moves and not self._decode_streams:
            blamed, cost = [], MISHAP  # it ran where it was
        self._spent += cost
        if self._spent >= self._max_attempts:
            message = f"all {self.attempt} attempts to run the request failed"
            return [*actions, *self._end(Status.FAILED, AttemptsExhausted(message, retry_after=1.0))]
        self._avoid.update(dict.fromkeys(blamed))
        prefill = self.placed.prefill if self.placed is not None else None
        if prefill is not None:
            self._computed = Computed(prefill.worker, prefill.epoch, self._placed_tokens)
        if self._computed is not None and self._computed.worker in self._avoid:
            self._computed = None
        self._move(Status.PLACING)
        return [*actions, *self._place(now)]

    def _on_tick(self, now: float) -> list[Action]:
        if now >= self._give_up_at:
            if self.status is Status.PLACING:
                return self._fail(Unavailable("no worker could be assigned in time", retry_after=1.0))
            suspects = self._workers()[-1:] if self._decode_streams else self._workers()
            return self._retry([worker.worker for worker in suspects], now)
        if self._gap_at is not None and now >= self._gap_at:
            return self._ask_for_tokens(now)
        if now >= self._again_at:
            self._again_after = min(2 * self._again_after, self._timeouts.ask_again_most)
            self._again_at = now + self._again_after
            return self._ask_again()
        return []

    def _ask_again(self) -> list[Action]:
        """Whoever owes an answer. Until decode has sent a token it may be that the hand-over has failed, which the
        prefill worker says once more if it gets its order once more; or that decode has failed, or goes on behind a
        first token that was lost. One that has not heard of the attempt yet says nothing."""
        placed = self.placed
        if placed is None:
            return [self._placement_wanted(self._computed)]
        again = self.status is Status.STARTING or (placed.prefill is not None and not self._decode_streams)
        return [*([self._start_message(placed)] if again else []), self._tokens_wanted(placed)]

    # Tokens

    def _chunk(self, worker: WorkerId, chunk: TokenChunk, now: float) -> list[Action]:
        placed = self.placed
        if self.status.over or placed is None or chunk.attempt != self.attempt:
            self.late_chunks += 1
            mailbox = self._mailboxes.get(worker)
            return [] if mailbox is None else [answer_to_unwanted(mailbox, chunk)]
        # Decode has the whole KV before it sends anything.
        self._decode_streams = self._decode_streams or worker == placed.decode.worker
        have = self.num_generated
        prompt_logprobs = chunk.prompt_logprobs if self._prompt_logprobs_due else None
        if chunk.index > have:
            return self._ask_for_tokens(now) if self._gap_at is None or now >= self._gap_at else []
        end = chunk.index + count_tokens(chunk.tokens)
        if end < have or (end == have and chunk.finish is None and prompt_logprobs is None):
            self.repeated_chunks += bool(chunk.tokens)  # without any, it says that there is nothing new
            return []
        if worker not in self._mailboxes or not self._sound(chunk, end):
            self.bad_chunks += 1
            return []
        return self._take(worker, chunk, prompt_logprobs, have - chunk.index, now)

    def _take(
        self, worker: WorkerId, chunk: TokenChunk, prompt_logprobs: Logprobs | None, known: int, now: float
    ) -> list[Action]:
        """Deliver the chunk's tokens, but for the first ``known``."""
        actions: list[Action] = []
        if self.status is Status.STARTING:
            self._move(Status.STREAMING)
            actions.append(self._prefilled())
        self.kv_bytes += max(0, chunk.kv_bytes - self._attempt_kv_bytes)
        self._attempt_kv_bytes = max(self._attempt_kv_bytes, chunk.kv_bytes)
        self._give_up_at = now + self._timeouts.progress
        self._ask_from(now, self._timeouts.silence)
        self._gap_at = None
        self._prompt_logprobs_due = self._prompt_logprobs_due and prompt_logprobs is None
        fresh = chunk.tokens[4 * known :]
        self.generated += fresh
        logprobs = None if chunk.logprobs is None else _suffix(chunk.logprobs, known)
        cached = chunk.cached_tokens if self.attempt == 1 else 0  # a further attempt finds what this one computed
        self._note(logprobs, prompt_logprobs, chunk.finish, cached)
        actions.append(Deliver(unpack_tokens(fresh).tolist(), logprobs, prompt_logprobs, chunk.finish, cached))
        return actions if chunk.finish is None else [*actions, *self._complete(worker, chunk.finish)]

    def _complete(self, worker: WorkerId, reason: FinishReason) -> list[Action]:
        """Every token is here."""
        ack = EndAck(request=self.request, attempt=self.attempt, keep=bool(self.description))
        actions: list[Action] = [Send(self._mailboxes[worker], ack)]
        if self.placed is not None and self.placed.decode.worker != worker:
            # Prefill tells it too, but once: were that lost, it would keep for minutes what it has promised.
            actions.append(Send(self.placed.decode.mailbox, Abort(request=self.request, attempt=self.attempt)))
        return [*actions, *self._end(Status.FINISHED, reason)]

    def _note(
        self, logprobs: Logprobs | None, prompt_logprobs: Logprobs | None, finish: FinishReason | None, cached: int
    ) -> None:
        """What the transcript has besides tokens."""
        self._begun = True
        if logprobs is not None:
            self._logprobs.append(logprobs)
        self.prompt_logprobs = prompt_logprobs or self.prompt_logprobs
        self.finish = finish
        self.cached_tokens = max(self.cached_tokens, cached)

    def _sound(self, chunk: TokenChunk, end: int) -> bool:
        """Whether a worker in its senses can have sent this."""
        logprobs = chunk.logprobs
        return (
            end <= self.sampling.max_tokens
            and all(token >= 0 for token in unpack_tokens(chunk.tokens).tolist())
            and (logprobs is None or _lengths(logprobs) == {end - chunk.index})
            and (chunk.prompt_logprobs is None or _lengths(chunk.prompt_logprobs) == {count_tokens(self.prompt) - 1})
        )

    def _ask_for_tokens(self, now: float) -> list[Action]:
        assert self.placed is not None
        self._gap_at = now + self._timeouts.gap
        return [self._tokens_wanted(self.placed)]

    def _tokens_wanted(self, placed: Placed) -> Send:
        wanted = TokensWanted(
            request=self.request, attempt=self.attempt, index=self.num_generated, gateway=self._gateway
        )
        return Send(placed.decode.mailbox, wanted)

    # Ends

    def _taken(self, event: Superseded) -> list[Action]:
        """Another gateway goes on with what ran as ``event.attempt``, two attempts on: a move of it, or what was placed
        in its stead, is older than that, and not known there."""
        error = StreamTaken("another gateway goes on with this stream")
        if event.attempt < self.attempt:
            return self._fail(error)
        self._move(Status.FAILED)
        return [Failed(error)]

    def _fail(self, error: GatewayError) -> list[Action]:
        return [*self._abort(), *self._end(Status.FAILED, error)]

    def _abort(self, *, keep: bool = False) -> list[Action]:
        """Workers of this attempt shall drop it."""
        abort = Abort(request=self.request, attempt=self.attempt, keep=keep)
        return [Send(worker.mailbox, abort) for worker in self._workers()]

    def _end(self, status: Status, outcome: FinishReason | GatewayError) -> list[Action]:
        self._move(status)
        finished = Send(self._router, Finished(request=self.request, attempt=self._asked))
        return [finished, Failed(outcome) if isinstance(outcome, GatewayError) else Ended(outcome)]

    def _workers(self) -> list[WorkerAddress]:
        """Of this attempt, decode last."""
        if self.placed is None:
            return []
        return [worker for worker in (self.placed.prefill, self.placed.decode) if worker is not None]

    def _move(self, status: Status) -> None:
        if status not in _MOVES[self.status]:
            story = "\n  ".join(self._story)
            raise AssertionError(f"request {self.request} cannot go from {self.status} to {status}:\n  {story}")
        self._story.append(f"{self.status} -> {status}")
        self.status = status

    # Time

    def _ask_from(self, now: float, after: float) -> None:
        self._again_after = after
        self._again_at = now + after

    def _with_wake(self, actions: list[Action]) -> list[Action]:
        """Ask for a wake if the next deadline comes before the wake that was asked for last."""
        if self.status.over:
            return actions
        due = min(self._give_up_at, self._again_at)
        if self._gap_at is not None:
            due = min(due, self._gap_at)
        if due < self._wake_at:
            self._wake_at = due
            actions.append(WakeAt(due))
        return actions


def answer_to_unwanted(worker: Address, chunk: TokenChunk) -> Send:
    """What a worker hears that sends tokens nobody waits for, so that it keeps no request that nobody wants."""
    if chunk.finish is None:
        return Send(worker, Abort(request=chunk.request, attempt=chunk.attempt))
    return Send(worker, EndAck(request=chunk.request, attempt=chunk.attempt, keep=True))  # it may not be the first ack


def _rejection(rejected: Rejected) -> GatewayError:
    if rejected.unavailable:
        return Unavailable(rejected.detail or "no worker is there", retry_after=rejected.retry_after)
    if rejected.retry_after is not None:
        return Overloaded(rejected.detail or "no capacity", retry_after=rejected.retry_after)
    return InvalidRequest(rejected.detail or "the request cannot be placed", code="not_placeable")


def _without_prompt_logprobs(sampling: SamplingParams) -> SamplingParams:
    return dataclasses.replace(sampling, prompt_logprobs=None)


def _lengths(logprobs: Logprobs) -> set[int]:
    return {len(logprobs.sampled), len(logprobs.ranks), len(logprobs.top_ids), len(logprobs.top_logprobs)}


def _suffix(logprobs: Logprobs, first: int) -> Logprobs:
    if first == 0:
        return logprobs
    return Logprobs(
        sampled=logprobs.sampled[first:],
        ranks=logprobs.ranks[first:],
        top_ids=logprobs.top_ids[first:],
        top_logprobs=logprobs.top_logprobs[first:],
    )

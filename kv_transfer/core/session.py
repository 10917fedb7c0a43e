"""Both ends of one hand-over, as two state machines without I/O.

The life of a transfer:

1. The prefill worker opens it when the first chunk of the prompt is scheduled (``SendSession.open``).
2. The decode worker reserves blocks and accepts, or refuses (``ReceiveSession`` is made with the blocks).
3. Before a chunk is computed, the blocks that it will finish are pushed live (``SendSession.computing``): each layer
   leaves when it is there. What was computed before the accept is pushed whole. Digests are taken of what is final
   (``SendSession.computed``). When a chunk fails the transfer is given up, so what it left half-written never counts.
4. With the first token the sender ends the transfer: count and digest of every block (``SendSession.end``).
5. When all has landed, the receiver takes digests of what stands in its own pool; what is missing or differs is asked
   for again, and what is right is acked. Only then may decode read the blocks, and only then may prefill free its own.
6. Either side may give up at any point. The sender confirms with ``TransferClosed`` that it writes no more; until
   then, or until its process is known to be gone, the blocks of a one-sided receiver stay in quarantine. A sender that
   is only silent may be in the middle of a write.

Every message is idempotent and is sent again until it is answered, so a lossy link costs time only.
"""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

import numpy as np

from kv_transfer.core.digest import DIGEST_BYTES, mismatches
from kv_transfer.core.events import Blocks, Cancelled, Landed, Pushed, PushFailed, TransferKey
from kv_transfer.core.lanes import Route
from kv_transfer.core.trace import PushTrace, TransferTrace
from messages.codec import pack_tokens, unpack_tokens
from messages.common import KVEndpoint
from messages.decode_to_prefill import BlocksWanted, CancelTransfer, TransferAccepted, TransferAcked, TransferRefused
from messages.ids import Address
from messages.prefill_to_decode import EndTransfer, FirstToken, OpenTransfer, TransferClosed, TransferProgress

Reply = (
    OpenTransfer | TransferProgress | EndTransfer | TransferClosed
    | TransferAccepted | TransferAcked | BlocksWanted | CancelTransfer
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferTimeouts:
    """Seconds."""

    resend: float = 0.5
    """An unanswered message is sent again after this."""
    open: float = 120.0
    """The receiver may let an open wait this long for free blocks. Long, for that a peer is lost is told by
    ``PeerLost``, and that a gateway wants no more by ``Abort``."""
    lease: float = 120.0
    """A landing that hears nothing for this long is given up: the sender may be computing, but not for ever."""
    progress: float = 10.0
    """After this long without progress the transfer has failed. Half as often a sender that goes on says so."""


# Actions beside Reply, which goes to the peer's mailbox.


class Push(NamedTuple):
    """Have every rank push its lanes of these."""

    key: TransferKey
    route: Route
    first: int
    source: Blocks
    target: Blocks
    live: bool = False
    """Whether the step that is to run next makes them final: then each layer is pushed when it is there."""


class CancelPushes(NamedTuple):
    """Stop every rank's sender; answered by ``Cancelled``."""

    key: TransferKey
    transport: str


class TakeDigests(NamedTuple):
    """Hash blocks of the own pools as the receiver stores them; answered by ``Digested``."""

    key: TransferKey
    route: Route
    first: int
    blocks: Blocks


class OpenLanding(NamedTuple):
    """Let the sequence's blocks ``first``, ... land in ``blocks``; answered by ``LandingOpened``."""

    key: TransferKey
    route: Route
    first: int
    blocks: Blocks


class CloseLanding(NamedTuple):
    """Nothing more shall land for the key."""

    key: TransferKey


class LookForWriters(NamedTuple):
    """See whether the processes behind all of ``writers`` are gone; answered by ``WritersGone``, or not at all."""

    key: TransferKey
    writers: tuple[KVEndpoint, ...]


class Outcome(Enum):
    """How a session ended; its blocks belong to the caller again."""

    DONE = auto()
    """Sender: acked, the source may be freed. Receiver: verified, the blocks may be read."""
    REFUSED = auto()
    FAILED = auto()
    CLOSED = auto()
    """The caller, or the peer, gave it up."""


class Ended(NamedTuple):
    """Given exactly once by each session: no one touches its blocks any more."""

    key: TransferKey
    outcome: Outcome
    detail: str = ""
    retryable: bool = True


class Digested(NamedTuple):
    """Event: the digests that ``TakeDigests`` asked for."""

    key: TransferKey
    first: int
    digests: bytes


class LandingOpened(NamedTuple):
    """Event: what is pushed for ``key`` from now on lands."""

    key: TransferKey


class WritersGone(NamedTuple):
    """Event: no process that wrote for ``key`` exists any more, nor any of its threads."""

    key: TransferKey


Action = Reply | Push | CancelPushes | TakeDigests | OpenLanding | CloseLanding | LookForWriters | Ended


class SendState(Enum):
    IDLE = auto()
    OPENING = auto()
    PUSHING = auto()
    ENDING = auto()
    CLOSING = auto()
    """Given up; waits until the transport writes no more."""
    CLOSED = auto()


_SEND_MOVES = {
    SendState.IDLE: {SendState.OPENING, SendState.CLOSED},
    SendState.OPENING: {SendState.PUSHING, SendState.CLOSED},
    SendState.PUSHING: {SendState.ENDING, SendState.CLOSING},
    SendState.ENDING: {SendState.PUSHING, SendState.CLOSING, SendState.CLOSED},
    SendState.CLOSING: {SendState.CLOSED},
    SendState.CLOSED: set(),
}


@dataclass(slots=True)
class _Asked:
    """A push, as far as it is known."""

    first: int
    count: int
    live: bool
    asked: float
    done: Pushed | None = None

    def trace(self, computed: float, num_blocks: int) -> PushTrace:
        """``computed``: when the first token was known; ``num_blocks``: of the sequence."""
        if self.done is None:
            return PushTrace(self.first, self.count, self.live, self.asked, float("nan"), 0, 0)
        num_bytes, left = self.done.num_bytes, self.done.at
        # Of the prompt's last step the transport itself knows what left before its last layer.
        of_last_step = self.live and self.first + self.count == num_blocks
        hidden = num_bytes if left <= computed and not of_last_step else self.done.early_bytes
        return PushTrace(self.first, self.count, self.live, self.asked, left, num_bytes, hidden)


class SendSession:
    """The prefill worker's end. The blocks given to ``computed`` stay unchanged until ``Ended``."""

    def __init__(self, key: TransferKey, open_message: OpenTransfer, route: Route, timeouts: TransferTimeouts) -> None:
        self.key = key
        self.state = SendState.IDLE
        self._open_message = open_message
        self._route = route
        self._timeouts = timeouts
        self._target: Blocks = np.empty(0, np.int32)
        self._cached = 0
        self._source: Blocks = np.empty(0, np.int32)
        self._ready = 0  # leading blocks of the sequence whose KV is final
        self._asked = 0  # leading blocks whose push has been asked for; live, before they are final
        self._hashed = 0  # leading blocks whose digests have been asked for
        self._unpushed = 0  # blocks asked for and not yet reported
        self._digests: dict[int, bytes] = {}  # by first block
        self._digested = 0
        self._pushes: dict[tuple[int, int, int], _Asked] = {}  # by first block, count and round
        self._opened_at = self._accepted_at = self._computed_at = self._acked_at = float("nan")
        self._first: FirstToken | None = None
        self._round = 0
        self._resend_at = float("inf")
        self._deadline = float("inf")
        self._tell_at = float("inf")
        self._detail = ""
        self._outcome = Outcome.CLOSED

    def _move(self, state: SendState) -> None:
        if state not in _SEND_MOVES[self.state]:
            raise AssertionError(f"transfer {self.key} cannot go from {self.state.name} to {state.name}")
        self.state = state

    def open(self, now: float) -> list[Action]:
        """Ask the decode worker for room."""
        self._move(SendState.OPENING)
        self._opened_at = now
        self._resend_at, self._deadline = now + self._timeouts.resend, now + self._timeouts.open
        return [self._open_message]

    def computing(self, blocks: Blocks, coming: int, now: float) -> list[Action]:
        """The sequence owns ``blocks``, and the step that is to run next makes the leading ``coming`` of them final.

        ``computed`` follows when it has; if it fails, ``give_up``.
        """
        self._source = blocks
        if self.state is not SendState.PUSHING:
            return []
        return self._push(coming, now, live=True)

    def computed(self, blocks: Blocks, ready: int, now: float) -> list[Action]:
        """The sequence owns ``blocks``, and the KV of the leading ``ready`` of them is final."""
        self._source, self._ready = blocks, ready
        return self._push_ready(now)

    def end(self, first: FirstToken, now: float) -> list[Action]:
        """The prompt is computed, and this is the token after it."""
        self._first, self._computed_at = first, now
        if self._cached > self._ready:
            detail = f"decode says that it has {self._cached} blocks, of {self._ready}"
            return self.give_up(detail, Outcome.FAILED)
        return self._end_if_pushed(now)

    def handle(
        self,
        event: TransferAccepted | TransferRefused | TransferAcked | BlocksWanted | CancelTransfer | Pushed | PushFailed
        | Cancelled | Digested,
        now: float,
    ) -> list[Action]:  # fmt: skip
        """One event of this transfer; whatever comes too late or twice changes nothing."""
        match event:
            case TransferAccepted() if self.state is SendState.OPENING:
                return self._accepted(event, now)
            case TransferRefused() if self.state is SendState.OPENING:
                return self._close(Outcome.REFUSED, event.detail, retryable=event.retryable)
            case TransferAcked() if self.state is SendState.ENDING:
                self._acked_at = now
                return self._close(Outcome.DONE, "")
            case BlocksWanted() if self.state is SendState.ENDING and event.round == self._round:
                return self._push_again(unpack_tokens(event.indices), now)
            case CancelTransfer():
                return self._cancelled_by_peer(event)
            case Pushed() if self.state is SendState.PUSHING:
                self._unpushed -= event.count
                self._pushes[event.first, event.count, self._round].done = event
                self._deadline = now + self._timeouts.progress if self._unpushed else float("inf")
                return self._end_if_pushed(now) or self._progressed(now)
            case PushFailed() if self.state is SendState.PUSHING:
                return self.give_up(event.detail, Outcome.FAILED)
            case Digested() if self.state is SendState.PUSHING:
                self._digests[event.first] = event.digests
                self._digested += len(event.digests) // DIGEST_BYTES
                return self._end_if_pushed(now)
            case Cancelled() if self.state is SendState.CLOSING:
                return self._close(self._outcome, self._detail)
        return []

    def tick(self, now: float) -> list[Action]:
        """Send again what is unanswered, or give up."""
        if self.state in (SendState.IDLE, SendState.CLOSING, SendState.CLOSED):
            return []
        if now >= self._deadline:
            return self.give_up(f"no progress while {self.state.name.lower()}", Outcome.FAILED)
        if now < self._resend_at:
            return []
        self._resend_at = now + self._timeouts.resend
        if self.state is SendState.OPENING:
            return [self._open_message]
        return [self._end_message()] if self.state is SendState.ENDING else []

    @property
    def wake_at(self) -> float:
        """When ``tick`` has something to do at the latest."""
        if self.state in (SendState.IDLE, SendState.CLOSING, SendState.CLOSED):
            return float("inf")
        return min(self._resend_at, self._deadline)

    @property
    def trace(self) -> TransferTrace:
        """How it went so far."""
        return TransferTrace(
            key=self.key,
            opened=self._opened_at,
            accepted=self._accepted_at,
            computed=self._computed_at,
            acked=self._acked_at,
            num_blocks=len(self._target),
            cached_blocks=self._cached,
            repairs=max(0, self._round - 1),
            pushes=tuple(push.trace(self._computed_at, len(self._source)) for push in self._pushes.values()),
        )

    def give_up(self, detail: str, outcome: Outcome = Outcome.CLOSED) -> list[Action]:
        """Stop, from whatever state; ``Ended`` follows at once or when the transport has stopped."""
        if self.state in (SendState.CLOSING, SendState.CLOSED):
            return []
        self._outcome, self._detail = outcome, detail
        if self.state in (SendState.IDLE, SendState.OPENING):
            return self._close(outcome, detail)
        self._move(SendState.CLOSING)
        return [CancelPushes(self.key, self._route.transport)]

    def _accepted(self, event: TransferAccepted, now: float) -> list[Action]:
        self._target, self._cached = unpack_tokens(event.blocks), event.cached_blocks
        self._asked = self._hashed = self._digested = self._cached
        self._accepted_at = now
        self._move(SendState.PUSHING)
        self._resend_at, self._deadline = float("inf"), float("inf")  # compute sets the pace until the end
        self._tell_at = now + self._timeouts.progress / 2
        return self._push_ready(now) or self._end_if_pushed(now)

    def _push_ready(self, now: float) -> list[Action]:
        """Push and hash what is final, but for what has been asked for before."""
        if self.state is not SendState.PUSHING:
            return []
        actions = self._push(self._ready, now, live=False)
        if self.state is SendState.PUSHING and self._ready > self._hashed:
            first, self._hashed = self._hashed, self._ready
            actions.append(TakeDigests(self.key, self._route, first, self._source[first : self._ready]))
        if actions and self.state is SendState.PUSHING:
            self._deadline = now + self._timeouts.progress  # of live pushes too: their last layer has just come
        return actions

    def _push(self, end: int, now: float, *, live: bool) -> list[Action]:
        """Push the blocks up to ``end`` that have not been asked for."""
        if end <= self._asked:
            return []
        first, self._asked = self._asked, end
        source = self._source[first:end]
        target = self._target[first - self._cached : end - self._cached]
        if len(target) != len(source):
            return self.give_up(f"decode reserved {len(self._target)} blocks, too few", Outcome.FAILED)
        return [self._pushing(first, source, target, now, live=live)]

    def _pushing(self, first: int, source: Blocks, target: Blocks, now: float, *, live: bool = False) -> Push:
        self._unpushed += len(source)
        self._pushes[first, len(source), self._round] = _Asked(first, len(source), live, now)
        return Push(self.key, self._route, first, source, target, live)

    def _push_again(self, indices: Blocks, now: float) -> list[Action]:
        wanted = np.unique(indices)
        if not len(wanted) or wanted[0] < self._cached or wanted[-1] >= self._asked:
            return self.give_up("decode asked for blocks that are not part of the transfer", Outcome.FAILED)
        self._move(SendState.PUSHING)
        self._deadline = now + self._timeouts.progress
        # One push a run of consecutive indices; a digest fails rarely, so this list is short.
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
        return [self._pushing(int(run[0]), self._source[run], self._target[run - self._cached], now) for run in runs]

    def _end_if_pushed(self, now: float) -> list[Action]:
        complete = self._unpushed == 0 and self._asked == self._digested == self._ready
        if self._first is None or self.state is not SendState.PUSHING or not complete:
            return []
        self._move(SendState.ENDING)
        self._round += 1
        self._resend_at, self._deadline = now + self._timeouts.resend, now + self._timeouts.progress
        return [self._end_message()]

    def _progressed(self, now: float) -> list[Action]:
        """Renew the lease at the other end, now and then: a long prompt takes longer than that."""
        if now < self._tell_at:
            return []
        self._tell_at = now + self._timeouts.progress / 2
        return [TransferProgress(request=self.key.request, attempt=self.key.attempt)]

    def _end_message(self) -> EndTransfer:
        assert self._first is not None
        return EndTransfer(
            request=self.key.request,
            attempt=self.key.attempt,
            mailbox=self._open_message.prefill.mailbox,
            round=self._round,
            first=self._first,
            num_blocks=self._asked - self._cached,
            digests=b"".join(self._digests[first] for first in sorted(self._digests)),
        )

    def _cancelled_by_peer(self, event: CancelTransfer) -> list[Action]:
        if self.state is SendState.CLOSED:
            return [self._closed_message(event.detail)]
        return self.give_up(event.detail or "decode cancelled the transfer", Outcome.FAILED)

    def _closed_message(self, detail: str) -> TransferClosed:
        return TransferClosed(request=self.key.request, attempt=self.key.attempt, reason=detail[:2000])

    def _close(self, outcome: Outcome, detail: str, *, retryable: bool = True) -> list[Action]:
        told = self.state is not SendState.IDLE and outcome not in (Outcome.DONE, Outcome.REFUSED)
        self._move(SendState.CLOSED)
        ended = Ended(self.key, outcome, detail, retryable)
        return [self._closed_message(detail), ended] if told else [ended]


class ReceiveState(Enum):
    PROMISED = auto()
    """Blocks are reserved, and nobody can write into them before every rank lets data land."""
    LANDING = auto()
    VERIFYING = auto()
    """Nobody writes: a two-sided receiver has closed the landing, a one-sided one has the sender's word."""
    QUARANTINED = auto()
    """Given up; a one-sided writer could still write."""
    CLOSED = auto()


_RECEIVE_MOVES = {
    ReceiveState.PROMISED: {ReceiveState.LANDING, ReceiveState.CLOSED},
    ReceiveState.LANDING: {ReceiveState.VERIFYING, ReceiveState.QUARANTINED, ReceiveState.CLOSED},
    ReceiveState.VERIFYING: {
        ReceiveState.PROMISED,
        ReceiveState.LANDING,
        ReceiveState.QUARANTINED,
        ReceiveState.CLOSED,
    },
    ReceiveState.QUARANTINED: {ReceiveState.CLOSED},
    ReceiveState.CLOSED: set(),
}
MAX_REPAIRS = 2
"""Times that bad blocks are asked for again before the transfer has failed."""


@dataclass(slots=True)
class ReceiveSession:
    """The decode worker's end: ``blocks`` are reserved for the sequence's blocks ``cached``, ``cached + 1``, ..."""

    key: TransferKey
    mailbox: Address
    """The receiver's own."""
    blocks: Blocks
    cached: int
    route: Route
    """From the sender to here."""
    one_sided: bool
    timeouts: TransferTimeouts
    writers: tuple[KVEndpoint, ...] = ()
    """Where the blocks come from, as far as the sender has said it."""
    state: ReceiveState = ReceiveState.PROMISED
    first: FirstToken | None = None
    repairs: int = 0
    _writer_dead: bool = False
    """Its supervisor says so; what is sent to it nobody reads."""
    _end: EndTransfer | None = None
    _wanted: BlocksWanted | None = None
    """The repair last asked for; ends of that round and before are answered by it and not believed."""
    _deadline: float = float("inf")
    _resend_at: float = float("inf")
    _outcome: Outcome = Outcome.CLOSED
    _detail: str = ""
    _landed: np.ndarray[tuple[int], np.dtype[np.bool_]] = field(init=False)

    def __post_init__(self) -> None:
        self._landed = np.zeros(len(self.blocks), np.bool_)

    def _move(self, state: ReceiveState) -> None:
        if state not in _RECEIVE_MOVES[self.state]:
            raise AssertionError(f"landing {self.key} cannot go from {self.state.name} to {state.name}")
        self.state = state

    def accept(self, now: float) -> list[Action]:
        """Open the landing. ``TransferAccepted`` goes out when that is done, and again for a repeated
        ``OpenTransfer``."""
        self._deadline = now + self.timeouts.lease
        return [OpenLanding(self.key, self.route, self.cached, self.blocks)]

    def handle(
        self,
        event: (
            LandingOpened
            | OpenTransfer
            | TransferProgress
            | EndTransfer
            | TransferClosed
            | Landed
            | Digested
            | WritersGone
        ),
        now: float,
    ) -> list[Action]:
        """One event of this transfer, which renews the lease; what comes too late or twice changes nothing else."""
        if self.state not in (ReceiveState.QUARANTINED, ReceiveState.CLOSED):
            self._deadline = now + self.timeouts.lease
        match event:
            case LandingOpened() if self.state is ReceiveState.PROMISED:
                self._move(ReceiveState.LANDING)
                return [self._wanted or self._accepted()]
            case OpenTransfer() if self.state is ReceiveState.LANDING:
                return [self._accepted()]
            case Landed() if self.state is ReceiveState.LANDING:
                self._landed[event.indices - self.cached] = True
                return self._verify_if_landed()
            case EndTransfer() if self.state is ReceiveState.LANDING:
                return self._ended_by_peer(event, now)
            case Digested() if self.state is ReceiveState.VERIFYING:
                return self._verified(event.digests, now)
            case TransferClosed() if self.state is not ReceiveState.CLOSED:
                if self.state is not ReceiveState.QUARANTINED:
                    self._outcome, self._detail = Outcome.CLOSED, event.reason
                return self._close()
            case WritersGone() if self.state is ReceiveState.QUARANTINED:
                return self._close()
        return []

    def peer_lost(self, *, dead: bool, now: float) -> list[Action]:
        """The sender has left the membership; if it is ``dead``, one of its processes at least has ended. Others may
        still write, so ``writers`` are looked for where that can be done."""
        if not dead:
            return self.give_up("the prefill worker fell silent", Outcome.FAILED, now=now)
        if self.state is ReceiveState.CLOSED:
            return []
        self._writer_dead = True
        if self.state is not ReceiveState.QUARANTINED:
            self._outcome, self._detail = Outcome.FAILED, "the prefill worker was lost"
            if not self._writable or not self.writers:
                return self._close()
            self._move(ReceiveState.QUARANTINED)
            self._deadline = float("inf")
        elif not self.writers:
            return self._close()
        self._resend_at = now + self.timeouts.resend
        return [CloseLanding(self.key), LookForWriters(self.key, self.writers)]

    def give_up(self, detail: str, outcome: Outcome = Outcome.CLOSED, *, now: float) -> list[Action]:
        """Stop, from whatever state; ``Ended`` follows at once, or when a one-sided sender has confirmed."""
        if self.state in (ReceiveState.QUARANTINED, ReceiveState.CLOSED):
            return []
        self._outcome, self._detail = outcome, detail
        if not self._writable:
            return [*self._close(), self._cancel()]
        self._move(ReceiveState.QUARANTINED)
        self._resend_at, self._deadline = now + self.timeouts.resend, float("inf")
        return [CloseLanding(self.key), self._cancel()]

    def tick(self, now: float) -> list[Action]:
        """Give up a transfer that stands still; ask again for the confirmation that ends a quarantine."""
        if now >= self._deadline:
            return self.give_up("no progress while landing", Outcome.FAILED, now=now)
        if now < self._resend_at:
            return []
        if self.state is ReceiveState.QUARANTINED:
            self._resend_at = now + self.timeouts.resend
            look: list[Action] = [LookForWriters(self.key, self.writers)] if self.writers else []
            return look if self._writer_dead else [self._cancel(), *look]
        self._resend_at = float("inf")
        missing = np.flatnonzero(~self._landed).astype(np.int32)
        return self._repair(missing, now) if len(missing) and self._end is not None else []

    @property
    def wake_at(self) -> float:
        """When ``tick`` has something to do at the latest."""
        return min(self._resend_at, self._deadline)

    @property
    def _writable(self) -> bool:
        """Whether closing the landing would not keep the sender from writing: it was told the blocks."""
        return self.one_sided and self.state is not ReceiveState.PROMISED

    def _ended_by_peer(self, event: EndTransfer, now: float) -> list[Action]:
        if event.num_blocks != len(self.blocks) or len(event.digests) != len(self.blocks) * DIGEST_BYTES:
            detail = f"the end names {event.num_blocks} blocks where {len(self.blocks)} were reserved"
            return self.give_up(detail, Outcome.FAILED, now=now)
        if self._wanted is not None and event.round <= self._wanted.round:
            return [self._wanted] if event.round == self._wanted.round else []
        if self._end is None and not self._landed.all():
            self._resend_at = now + self.timeouts.resend  # data may still be behind the end
        self._end = event
        if self.one_sided:
            self._landed[:] = True
        return self._verify_if_landed()

    def _verify_if_landed(self) -> list[Action]:
        if self._end is None or not self._landed.all():
            return []
        self._move(ReceiveState.VERIFYING)
        self._resend_at = float("inf")
        digests = TakeDigests(self.key, self.route, self.cached, self.blocks)
        # What lands late, or twice, must not land in what has been verified.
        return [digests] if self.one_sided else [CloseLanding(self.key), digests]

    def _verified(self, digests: bytes, now: float) -> list[Action]:
        assert self._end is not None
        bad = mismatches(self._end.digests, digests)
        if not len(bad):
            self.first, self._outcome = self._end.first, Outcome.DONE
            acked = TransferAcked(request=self.key.request, attempt=self.key.attempt)
            return [acked, *self._close()]
        repair = self._repair(bad, now)
        if self.state is not ReceiveState.VERIFYING:
            return repair  # asked for often enough
        if self.one_sided:
            self._move(ReceiveState.LANDING)
            return repair
        self._move(ReceiveState.PROMISED)  # the blocks are asked for when they can land
        return [OpenLanding(self.key, self.route, self.cached, self.blocks)]

    def _repair(self, places: Blocks, now: float) -> list[Action]:
        if self.repairs == MAX_REPAIRS:
            return self.give_up(f"{len(places)} blocks are still bad or missing", Outcome.FAILED, now=now)
        assert self._end is not None
        self.repairs += 1
        self._landed[places] = False
        indices = pack_tokens(places + self.cached)
        self._wanted = BlocksWanted(
            request=self.key.request, attempt=self.key.attempt, round=self._end.round, indices=indices
        )
        self._end = None  # the sender ends again when it has pushed them
        return [self._wanted]

    def _accepted(self) -> TransferAccepted:
        return TransferAccepted(
            request=self.key.request,
            attempt=self.key.attempt,
            blocks=pack_tokens(self.blocks),
            cached_blocks=self.cached,
        )

    def _cancel(self) -> CancelTransfer:
        return CancelTransfer(
            request=self.key.request, attempt=self.key.attempt, mailbox=self.mailbox, detail=self._detail[:2000]
        )

    def _close(self) -> list[Action]:
        self._move(ReceiveState.CLOSED)
        self._resend_at = self._deadline = float("inf")
        return [CloseLanding(self.key), Ended(self.key, self._outcome, self._detail)]

"""The prefill worker's end of one hand-over, as a state machine without I/O; see ``kv_transfer.core.session``."""

from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from kv_transfer.core.digest import DIGEST_BYTES
from kv_transfer.core.events import Blocks, Cancelled, Live, Pushed, PushFailed, TransferKey
from kv_transfer.core.lanes import Route
from kv_transfer.core.session import Action, CancelPushes, Digested, Ended, Outcome, Push, TakeDigests, TransferTimeouts
from kv_transfer.core.trace import PushTrace, TransferTrace
from messages.codec import unpack_tokens
from messages.decode_to_prefill import (
    BlocksWanted,
    CancelTransfer,
    TransferAccepted,
    TransferAcked,
    TransferPending,
    TransferRefused,
)
from messages.prefill_to_decode import EndTransfer, FirstToken, OpenTransfer, TransferClosed, TransferProgress

GRACE = 0.25
"""Of its patience a session has so much more to look again where it could not look in time."""


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
        self._coming = 0  # leading blocks that are final when the step that runs is through; 0 between steps
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
        self._answer_by = float("inf")  # when the peer is beyond reach, unless it answers something
        self._patience = self._look_at = float("inf")
        self._watched_at, self._left = 0.0, 0  # since when only pushes are missing; blocks left then
        self._was_late = False
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
        self._answer_by = now + self._timeouts.answer
        return [self._open_message]

    def computing(self, blocks: Blocks, coming: int, now: float) -> list[Action]:
        """The sequence owns ``blocks``, and the step that is to run next makes the leading ``coming`` of them final.

        ``computed`` follows when it has; if it fails, ``give_up``. An accept in between comes while the step runs.
        """
        self._source, self._coming = blocks, coming
        if self.state is not SendState.PUSHING:
            return []
        return self._push(coming, now, Live.NEXT)

    def computed(self, blocks: Blocks, ready: int, now: float) -> list[Action]:
        """The sequence owns ``blocks``, and the KV of the leading ``ready`` of them is final."""
        self._source, self._ready, self._coming = blocks, ready, 0
        return self._push_ready(now)

    def end(self, first: FirstToken, now: float, patience: float = float("inf")) -> list[Action]:
        """The prompt is computed, and this is the token after it.

        ``patience``: seconds after which ``drags`` tells whether the rest will take as long again.
        """
        self._first, self._computed_at = first, now
        self._patience = patience
        self._watch(now)
        if self._cached > self._ready:
            detail = f"decode says that it has {self._cached} blocks, of {self._ready}"
            return self.give_up(detail, Outcome.FAILED)
        return self._end_if_pushed(now)

    def handle(
        self,
        event: TransferAccepted | TransferPending | TransferRefused | TransferAcked | BlocksWanted | CancelTransfer
        | Pushed | PushFailed | Cancelled | Digested,
        now: float,
    ) -> list[Action]:  # fmt: skip
        """One event of this transfer; whatever comes too late or twice changes nothing."""
        match event:
            case TransferAccepted() if self.state is SendState.OPENING:
                return self._accepted(event, now)
            case TransferPending() if self.state in (SendState.OPENING, SendState.ENDING):
                self._answer_by = now + self._timeouts.answer
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

    def drags(self, now: float) -> bool:
        """Whether what has not left yet, at the pace of what has since only pushes were missing, takes longer than
        there is patience for.

        Asked late, it answers a little later still, once: what held up who asks may have held up the pushes too.
        """
        if self.state is not SendState.PUSHING or now < self._look_at:
            return False
        grace = GRACE * self._patience
        if now - self._look_at > grace and not self._was_late:
            self._was_late, self._look_at = True, now + grace
            return False
        self._look_at = now + self._patience
        gone = self._left - self._unpushed
        slow = gone <= 0 or self._unpushed / gone * (now - self._watched_at) > self._patience
        return slow and self._unpushed > 0

    @property
    def stands_still(self) -> bool:
        """Whether nothing at all has left since only pushes were missing."""
        return self._unpushed >= self._left

    def _watch(self, now: float) -> None:
        """See from now on how fast pushes leave, if there is room for them and the prompt is computed."""
        if self.state is SendState.PUSHING and self._first is not None:
            self._watched_at, self._left, self._look_at = now, self._unpushed, now + self._patience
            self._was_late = False

    def tick(self, now: float) -> list[Action]:
        """Send again what is unanswered, or give up."""
        if self.state in (SendState.IDLE, SendState.CLOSING, SendState.CLOSED):
            return []
        if now >= self._answer_by:
            return self.give_up("decode does not answer", Outcome.FAILED)
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
        look_at = self._look_at if self.state is SendState.PUSHING else float("inf")
        return min(self._resend_at, self._deadline, self._answer_by, look_at)

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
        self._resend_at = self._deadline = self._answer_by = float("inf")  # compute sets the pace until the end
        self._tell_at = now + self._timeouts.progress / 2
        actions = self._push_ready(now)
        if self.state is SendState.PUSHING:
            actions += self._push(self._coming, now, Live.RUNNING)
        self._watch(now)
        return actions or self._end_if_pushed(now)

    def _push_ready(self, now: float) -> list[Action]:
        """Push and hash what is final, but for what has been asked for before."""
        if self.state is not SendState.PUSHING:
            return []
        actions = self._push(self._ready, now, Live.NO)
        if self.state is SendState.PUSHING and self._ready > self._hashed:
            first, self._hashed = self._hashed, self._ready
            actions.append(TakeDigests(self.key, self._route, first, self._source[first : self._ready], sent=True))
        if actions and self.state is SendState.PUSHING:
            self._deadline = now + self._timeouts.progress  # of live pushes too: their last layer has just come
        return actions

    def _push(self, end: int, now: float, live: Live) -> list[Action]:
        """Push the blocks up to ``end`` that have not been asked for."""
        if end <= self._asked:
            return []
        first, self._asked = self._asked, end
        source = self._source[first:end]
        target = self._target[first - self._cached : end - self._cached]
        if len(target) != len(source):
            return self.give_up(f"decode reserved {len(self._target)} blocks, too few", Outcome.FAILED)
        return [self._pushing(first, source, target, now, live)]

    def _pushing(self, first: int, source: Blocks, target: Blocks, now: float, live: Live = Live.NO) -> Push:
        self._unpushed += len(source)
        self._pushes[first, len(source), self._round] = _Asked(first, len(source), live is not Live.NO, now)
        return Push(self.key, self._route, first, source, target, live)

    def _push_again(self, indices: Blocks, now: float) -> list[Action]:
        wanted = np.unique(indices)
        if not len(wanted) or wanted[0] < self._cached or wanted[-1] >= self._asked:
            return self.give_up("decode asked for blocks that are not part of the transfer", Outcome.FAILED)
        self._move(SendState.PUSHING)
        self._deadline, self._answer_by = now + self._timeouts.progress, float("inf")
        # One push a run of consecutive indices; a digest fails rarely, so this list is short.
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
        pushes = [self._pushing(int(run[0]), self._source[run], self._target[run - self._cached], now) for run in runs]
        self._watch(now)
        return list(pushes)

    def _end_if_pushed(self, now: float) -> list[Action]:
        complete = self._unpushed == 0 and self._asked == self._digested == self._ready
        if self._first is None or self.state is not SendState.PUSHING or not complete:
            return []
        self._move(SendState.ENDING)
        self._round += 1
        self._resend_at, self._deadline = now + self._timeouts.resend, now + self._timeouts.progress
        self._answer_by = now + self._timeouts.answer
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
        epoch = self._open_message.prefill.epoch
        return TransferClosed(request=self.key.request, attempt=self.key.attempt, reason=detail[:2000], epoch=epoch)

    def _close(self, outcome: Outcome, detail: str, *, retryable: bool = True) -> list[Action]:
        told = self.state is not SendState.IDLE and outcome not in (Outcome.DONE, Outcome.REFUSED)
        self._move(SendState.CLOSED)
        ended = Ended(self.key, outcome, detail, retryable)
        return [self._closed_message(detail), ended] if told else [ended]

"""The decode worker's end of one hand-over, as a state machine without I/O; see ``kv_transfer.core.session``."""

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from kv_transfer.core.digest import DIGEST_BYTES, mismatches
from kv_transfer.core.events import Blocks, Landed, TransferKey
from kv_transfer.core.lanes import Route
from kv_transfer.core.session import (
    Action,
    CloseLanding,
    Digested,
    Ended,
    LandingOpened,
    LookForWriters,
    OpenLanding,
    Outcome,
    TakeDigests,
    TransferTimeouts,
    WritersGone,
)
from messages.codec import pack_tokens
from messages.common import KVEndpoint
from messages.decode_to_prefill import BlocksWanted, CancelTransfer, TransferAccepted, TransferAcked, TransferPending
from messages.ids import Address
from messages.prefill_to_decode import EndTransfer, FirstToken, OpenTransfer, TransferClosed, TransferProgress


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
            case OpenTransfer() if self.state is ReceiveState.PROMISED:
                return [self._pending()]
            case EndTransfer() if self.state in (ReceiveState.VERIFYING, ReceiveState.PROMISED):
                return [self._pending()]
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
        again, self._end = self._end is not None, event
        if self.one_sided:
            self._landed[:] = True
        return self._verify_if_landed() or ([self._pending()] if again else [])

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

    def _pending(self) -> TransferPending:
        return TransferPending(request=self.key.request, attempt=self.key.attempt)

    def _cancel(self) -> CancelTransfer:
        return CancelTransfer(
            request=self.key.request, attempt=self.key.attempt, mailbox=self.mailbox, detail=self._detail[:2000]
        )

    def _close(self) -> list[Action]:
        self._move(ReceiveState.CLOSED)
        self._resend_at = self._deadline = float("inf")
        return [CloseLanding(self.key), Ended(self.key, self._outcome, self._detail)]

"""One hand-over: what its two ends, ``sending`` and ``receiving``, want done and hear, and how it ended.

The life of a transfer:

1. The prefill worker opens it when the first chunk of the prompt is scheduled (``SendSession.open``).
2. The decode worker reserves blocks and accepts, or refuses (``ReceiveSession`` is made with the blocks).
3. Before a chunk is computed, the blocks that it will finish are pushed live (``SendSession.computing``): each layer
   leaves when it is there. Where the accept comes while the chunk is computed, they are pushed live from then on. What
   was computed before the accept is pushed whole. Digests are taken of what is final (``SendSession.computed``). When a
   chunk fails the transfer is given up, so what it left half-written never counts.
4. With the first token the sender ends the transfer: count and digest of every block (``SendSession.end``).
5. When all has landed, the receiver takes digests of what stands in its own pool; what is missing or differs is asked
   for again, and what is right is acked. Only then may decode read the blocks, and only then may prefill free its own.
6. Either side may give up at any point. The sender confirms with ``TransferClosed`` that it writes no more; until
   then, or until its process is known to be gone, the blocks of a one-sided receiver stay in quarantine. A sender that
   is only silent may be in the middle of a write.

Every message is idempotent and is sent again until it is answered, so a lossy link costs time only.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from kv_transfer.core.events import Blocks, Live, TransferKey
from kv_transfer.core.lanes import Route
from messages.common import KVEndpoint
from messages.decode_to_prefill import BlocksWanted, CancelTransfer, TransferAccepted, TransferAcked, TransferPending
from messages.prefill_to_decode import EndTransfer, OpenTransfer, TransferClosed, TransferProgress

Reply = (
    OpenTransfer | TransferProgress | EndTransfer | TransferClosed
    | TransferAccepted | TransferPending | TransferAcked | BlocksWanted | CancelTransfer
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferTimeouts:
    """Seconds."""

    resend: float = 0.5
    """An unanswered message is sent again after this."""
    answer: float = 2.0
    """After so long without any answer, not even ``TransferPending``, the way to the peer is cut. Longer than a step
    takes, for between two of them a worker answers."""
    open: float = 120.0
    """The receiver may let an open wait this long for free blocks. Long, for that a peer is lost is told by
    ``PeerLost``, and that a gateway wants no more by ``Abort``."""
    lease: float = 120.0
    """A landing that hears nothing for this long is given up: the sender may be computing, but not for ever."""
    progress: float = 10.0
    """A push that its transport says nothing of for this long has failed, and so has an end whose blocks stay
    unverified. Half as often a sender that goes on says so. Long, for pushes wait for each other; a transport finds
    sooner that a peer takes nothing."""


# Actions beside Reply, which goes to the peer's mailbox.


class Push(NamedTuple):
    """Have every rank push its lanes of these."""

    key: TransferKey
    route: Route
    first: int
    source: Blocks
    target: Blocks
    live: Live = Live.NO


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
    sent: bool = False
    """Whether the own pools are those at the beginning of the route, not those at its end."""


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

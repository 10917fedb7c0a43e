"""Blocks promised to attempts whose KV is on its way, and the queue of attempts that wait for such a promise.

What the pool has cached of a sequence is not sent: its leading blocks are shared, and only those behind them promised.
While one transfer brings blocks that another one needs too, that one waits a moment for them.
Where decode had better compute a prompt itself it offers that to the sender, and gets ready for the transfer all the
same; ``TailYielded`` then ends it, and the prompt is the caller's to run.
Promised blocks are held in the pool. They become a sequence's own when the KV is verified, and go back to the pool when
the transfer ends otherwise; those that a one-sided writer could still reach stay in quarantine until it has confirmed.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.core.blocks import BlockPool
from engine.core.ownership import BlockState
from engine.core.prefix import BlockHashes
from engine.core.scheduler import Promise
from kv_transfer.core.events import Blocks, Landed, TransferKey
from kv_transfer.core.lanes import Route
from kv_transfer.core.receiving import ReceiveSession, ReceiveState
from kv_transfer.core.session import Action as SessionAction
from kv_transfer.core.session import (
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
from kv_transfer.core.stats import TransferStats
from kv_transfer.core.ways import KINDS, endpoints, route
from messages.codec import count_tokens, unpack_tokens
from messages.common import AbortReason, KVRank, TransferCounts
from messages.decode_to_prefill import CancelTransfer, TailOffered, TransferAcked, TransferPending, TransferRefused
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.prefill_to_decode import (
    EndTransfer,
    FirstToken,
    OpenTransfer,
    TailYielded,
    TransferClosed,
    TransferProgress,
)
from runtime.core.actions import ForgetPeer, Send
from runtime.core.disaggregation import Reason
from runtime.core.probe import NO_ROOM

BLOCKS_OF = {
    ReceiveState.PROMISED: BlockState.PROMISED,
    ReceiveState.LANDING: BlockState.LANDING,
    ReceiveState.VERIFYING: BlockState.LANDED,
    ReceiveState.QUARANTINED: BlockState.QUARANTINED,
    ReceiveState.CLOSED: BlockState.HELD,
}
"""What the blocks of a transfer are while it is in a state."""
MAX_WAITING = 4096
"""Opens that wait for blocks; further ones are refused."""
SHARE_WITHIN = 1.0
"""Seconds that a transfer waits for blocks that another one is bringing, before it has them sent too."""
REMEMBERED = 4096
"""Finished transfers whose end is acked again should the ack have been lost."""


class KVLanded(NamedTuple):
    """The KV of ``order`` stands verified in ``blocks``, which are the caller's from now on."""

    order: OpenTransfer
    blocks: Blocks
    num_cached: int
    """Leading blocks that were here already."""
    hashes: BlockHashes
    first: FirstToken
    offered: Reason | None
    """Why the sender was offered to be spared this, if it was."""


class TailTaken(NamedTuple):
    """The prompt of ``order`` is to be computed here."""

    order: OpenTransfer
    reason: Reason


Offers = Callable[[OpenTransfer, int], Reason | None]
"""Why to offer to compute the prompt of an order, of which so many leading blocks are cached; None not to."""
HasRoom = Callable[[int, Promise, Iterable[Promise]], bool]
"""``Scheduler.has_room``."""
Action = Send | OpenLanding | CloseLanding | TakeDigests | LookForWriters | ForgetPeer
Step = Action | KVLanded | TailTaken


@dataclass(slots=True)
class _Reservation:
    order: OpenTransfer
    session: ReceiveSession
    cached: Blocks
    """Leading blocks of the sequence that were here already, and are held for it."""
    hashes: BlockHashes
    promised_at: float
    offered: Reason | None
    blocks_are: BlockState = BlockState.HELD
    aborted: AbortReason | None = None
    """Why it was given up, once it is."""
    quarantined_at: float = 0.0

    @property
    def num_blocks(self) -> int:
        return len(self.cached) + len(self.session.blocks)


@dataclass(slots=True)
class _Waiting:
    order: OpenTransfer
    since: float
    until: float
    hashes: BlockHashes


class Reservations:
    """All incoming transfers of one decode worker."""

    def __init__(
        self,
        mailbox: Address,
        kv: tuple[KVRank, ...],
        pool: BlockPool,
        *,
        timeouts: TransferTimeouts,
    ) -> None:
        """``kv``: where this worker's KV stands, and the ways into it."""
        self._mailbox = mailbox
        self._kv = kv
        self._pool = pool
        self._timeouts = timeouts
        self._open: dict[TransferKey, _Reservation] = {}
        self._waiting: OrderedDict[RequestId, _Waiting] = OrderedDict()
        """The newest attempt of each; in line, which is also by deadline."""
        self._probes: list[RequestId] = []
        """Probes that have come since ``admit``: it promises them blocks now, or refuses them."""
        self._landing: dict[bytes, TransferKey] = {}
        """The names of blocks that are on their way, and with which transfer."""
        self._landed: dict[TransferKey, None] = {}
        self._stats = TransferStats()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, key: TransferKey) -> bool:
        """Whether blocks are promised to ``key``, or it waits for some."""
        waiting = self._waiting.get(key.request)
        return key in self._open or (waiting is not None and waiting.order.attempt == key.attempt)

    def order(self, request: RequestId) -> OpenTransfer | None:
        """Of the attempt whose blocks are promised, or that waits for some."""
        waiting = self._waiting.get(request)
        if waiting is not None:
            return waiting.order
        live = [each for key, each in self._open.items() if key.request == request and each.aborted is None]
        return live[0].order if live else None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def blocks_held(self) -> int:
        return sum(reservation.num_blocks for reservation in self._open.values())

    def _orders(self) -> list[OpenTransfer]:
        return [each.order for each in self._open.values()] + [each.order for each in self._waiting.values()]

    def gateways(self) -> list[Address]:
        """Of all orders."""
        return [order.gateway for order in self._orders()]

    def of(self, gateway: Address) -> list[TransferKey]:
        """Its attempts."""
        return [TransferKey(order.request, order.attempt) for order in self._orders() if order.gateway == gateway]

    def counts(self, now: float) -> TransferCounts:
        """For the worker's report."""
        quarantined = [each for each in self._open.values() if each.blocks_are is BlockState.QUARANTINED]
        return self._stats.counts(
            in_flight=len(self._open) - len(quarantined),
            quarantined_blocks=sum(len(each.session.blocks) for each in quarantined),
            quarantine_seconds=sum(now - each.quarantined_at for each in quarantined),
        )

    def check_integrity(self) -> None:
        """Every block into which KV is on its way belongs to a transfer, and is what that one says."""
        for key, reservation in self._open.items():
            states = self._pool.states(reservation.session.blocks)
            assert (states == BLOCKS_OF[reservation.session.state]).all(), f"the blocks of {key} are {states.tolist()}"
        promised = sum(len(reservation.session.blocks) for reservation in self._open.values())
        _, incoming = self._pool.num_claimed()
        assert incoming == promised, f"{incoming} blocks are promised, {promised} of them to a transfer"

    @property
    def wake_at(self) -> float:
        sessions = min((reservation.session.wake_at for reservation in self._open.values()), default=float("inf"))
        return min(sessions, self._first_deadline())

    def opened(self, order: OpenTransfer, now: float) -> list[Step]:
        """A sender asks for room. It waits its turn; ``admit`` gives it."""
        if len(self._waiting) == MAX_WAITING:
            return [self.refuse(order, "too many transfers wait for blocks")]
        self._waiting.pop(order.request, None)  # an older attempt; this one comes after those that were there
        hashes = BlockHashes(order.generation.cache_salt, self._pool.block_size)
        if self._pool.caching:
            hashes.extend(unpack_tokens(order.generation.prompt + order.generation.generated))
        self._waiting[order.request] = _Waiting(order, now, now + self._timeouts.open, hashes)
        if order.probe:
            self._probes.append(order.request)
        return []

    def repeated(self, order: OpenTransfer, now: float) -> list[Step]:
        """A sender asks again, or late."""
        key = TransferKey(order.request, order.attempt)
        if key in self._open:
            return self._steps(key, self._open[key].session.handle(order, now), now)
        if order.request in self._waiting and self._waiting[order.request].order.attempt == order.attempt:
            return [Send(order.prefill.mailbox, TransferPending(request=order.request, attempt=order.attempt))]
        return [self.refuse(order, "this attempt is over")]

    def refuse(self, order: OpenTransfer, detail: str, *, retryable: bool = True) -> Send:
        refused = TransferRefused(
            request=order.request, attempt=order.attempt, retryable=retryable, detail=detail[:2000]
        )
        return Send(order.prefill.mailbox, refused)

    def admit(self, room: int, has_room: HasRoom, now: float, offers: Offers | None = None) -> list[Step]:
        """Promise blocks to those that wait, in order, at most ``room`` of them and while the pool has blocks. A probe
        that would have to wait for them is refused."""
        steps: list[Step] = []
        for waiting in list(self._waiting.values()) if room > 0 else ():
            order, names = waiting.order, waiting.hashes.names
            cached = self._pool.match(names)
            if len(cached) < len(names) and names[len(cached)] in self._landing and now < waiting.since + SHARE_WITHIN:
                continue
            total = -(-order.generation.num_tokens // self._pool.block_size)
            needed = total - len(cached)
            if not has_room(needed + self._pool.num_unheld(cached), _promise(order, 0), self._promises()):
                if order.probe:
                    continue  # those behind it lose nothing by it
                break
            self._pool.share(cached)
            blocks = self._pool.allocate(needed)
            assert blocks is not None, "there was room"
            del self._waiting[order.request]
            offered = None
            if not order.probe:
                self._pool.looked_up(order.generation.num_tokens, len(cached) * self._pool.block_size)
                offered = offers(order, len(cached)) if offers is not None else None
            steps += self._open_session(waiting, cached, blocks, offered, now)
            room -= 1
            if not room:
                break
        return steps + self._refuse_probes()

    def _refuse_probes(self) -> list[Step]:
        """Those that got no blocks: they stand in nobody's way."""
        came, self._probes = self._probes, []
        left = [self._waiting.pop(request).order for request in came if request in self._waiting]
        return [self.refuse(order, NO_ROOM) for order in left]

    def _open_session(
        self, waiting: _Waiting, cached: Blocks, blocks: Blocks, offered: Reason | None, now: float
    ) -> list[Step]:
        order = waiting.order
        key = TransferKey(order.request, order.attempt)
        one_sided = KINDS[order.transport].one_sided
        writers = endpoints(order.ranks, order.transport) if one_sided else ()
        session = ReceiveSession(
            key, self._mailbox, blocks, len(cached), self.route(order), one_sided, self._timeouts, writers
        )
        self._open[key] = _Reservation(order, session, cached, waiting.hashes, now, offered)
        for name in waiting.hashes.names[len(cached) :]:
            self._landing.setdefault(name, key)
        accepted = self._steps(key, session.accept(now), now)
        if offered is None:
            return accepted
        offer = TailOffered(request=order.request, attempt=order.attempt, mailbox=self._mailbox)
        return [Send(order.prefill.mailbox, offer), *accepted]  # an accept that comes first would begin the pushes

    def _promises(self) -> list[Promise]:
        """What has been promised, and will run."""
        return [_promise(each.order, each.num_blocks) for each in self._open.values()]

    def route(self, order: OpenTransfer) -> Route:
        """The way of the KV of ``order`` into this worker's pools; raises ``CannotPair``."""
        return route(order.transport, order.ranks, self._kv)

    def handle(
        self,
        event: TransferProgress | EndTransfer | TransferClosed | LandingOpened | Landed | Digested | WritersGone,
        now: float,
    ) -> list[Step]:
        """A message of the sender, or an answer of the transport."""
        if isinstance(event, LandingOpened | Landed | Digested | WritersGone):
            key = event.key
        else:
            key = TransferKey(event.request, event.attempt)
        if key in self._open:
            reservation = self._open[key]
            if isinstance(event, TransferClosed) and event.epoch != reservation.order.prefill.epoch:
                return []
            return self._steps(key, reservation.session.handle(event, now), now, _reason(event))
        match event:
            case TransferClosed():
                self._forget_waiting(event.request, event.attempt)
            case EndTransfer() if key in self._landed:  # the ack was lost
                return [Send(event.mailbox, TransferAcked(request=key.request, attempt=key.attempt))]
            case EndTransfer():
                detail = "no such transfer"
                cancel = CancelTransfer(request=key.request, attempt=key.attempt, mailbox=self._mailbox, detail=detail)
                return [Send(event.mailbox, cancel)]
        return []

    def yielded(self, event: TailYielded, now: float) -> list[Step]:
        """The sender leaves the prompt to this worker, and writes nothing. Acked in any case: it holds nothing else."""
        key = TransferKey(event.request, event.attempt)
        acked = Send(event.mailbox, TransferAcked(request=key.request, attempt=key.attempt))
        reservation = self._open.get(key)
        if reservation is None:
            return [acked]
        order, reason = reservation.order, reservation.offered
        wanted = reservation.session.state in (ReceiveState.PROMISED, ReceiveState.LANDING)
        epoch = order.prefill.epoch
        closed = TransferClosed(request=key.request, attempt=key.attempt, reason="left to decode", epoch=epoch)
        steps = [acked, *self._steps(key, reservation.session.handle(closed, now), now, AbortReason.YIELDED)]
        return [*steps, TailTaken(order, reason)] if wanted and reason is not None else steps

    def give_up(self, request: RequestId, attempt: Attempt, detail: str, now: float) -> list[Step]:
        """End the transfers of every attempt of ``request`` up to ``attempt``."""
        self._forget_waiting(request, attempt)
        keys = [key for key in self._open if key.request == request and key.attempt <= attempt]
        return [step for key in keys for step in self._give_up(key, detail, now)]

    def give_up_all(self, detail: str, now: float) -> list[Step]:
        """End every transfer; those that wait are refused."""
        refusals: list[Step] = [self.refuse(waiting.order, detail) for waiting in self._waiting.values()]
        self._waiting.clear()
        return refusals + [step for key in list(self._open) for step in self._give_up(key, detail, now)]

    def _give_up(self, key: TransferKey, detail: str, now: float) -> list[Step]:
        return self._steps(key, self._open[key].session.give_up(detail, now=now), now, AbortReason.WITHDRAWN)

    def peer_lost(self, worker: WorkerId, epoch: Epoch, *, dead: bool, now: float) -> list[Step]:
        """A prefill worker is gone: nothing of it is waited for. If it is ``dead``, its quarantined blocks are safe."""
        for order in [waiting.order for waiting in self._waiting.values()]:
            if (order.prefill.worker, order.prefill.epoch) == (worker, epoch):
                del self._waiting[order.request]
        lost = [
            key
            for key, reservation in self._open.items()
            if (reservation.order.prefill.worker, reservation.order.prefill.epoch) == (worker, epoch)
        ]
        return [
            step
            for key in lost
            for step in self._steps(
                key, self._open[key].session.peer_lost(dead=dead, now=now), now, AbortReason.PEER_LOST
            )
        ]

    def tick(self, now: float) -> list[Step]:
        """Refuse those that have waited too long; let the sessions see the time."""
        steps: list[Step] = []
        while self._first_deadline() <= now:
            _, waiting = self._waiting.popitem(last=False)
            steps.append(self.refuse(waiting.order, "no KV blocks became free in time"))
        due = [key for key, reservation in self._open.items() if reservation.session.wake_at <= now]
        for key in due:
            steps += self._steps(key, self._open[key].session.tick(now), now, AbortReason.TIMEOUT)
        return steps

    def _first_deadline(self) -> float:
        """Until when the first in line may wait."""
        first = next(iter(self._waiting.values()), None)
        return float("inf") if first is None else first.until

    def _forget_waiting(self, request: RequestId, attempt: Attempt) -> None:
        """Attempts of ``request`` up to ``attempt`` wait no longer."""
        if request in self._waiting and self._waiting[request].order.attempt <= attempt:
            del self._waiting[request]

    def _steps(
        self,
        key: TransferKey,
        actions: Iterable[SessionAction],
        now: float,
        reason: AbortReason = AbortReason.INTEGRITY,
    ) -> list[Step]:
        """``reason``: why the transfer is given up, if it just was."""
        reservation = self._open[key]
        state = BLOCKS_OF[reservation.session.state]
        if state is not reservation.blocks_are:
            self._pool.move(reservation.session.blocks, state)
            if state is BlockState.QUARANTINED:
                reservation.aborted, reservation.quarantined_at = reason, now
                self._expect_no_more(key)  # what may still be written is never believed
            elif reservation.blocks_are is BlockState.QUARANTINED:
                self._stats.quarantine_seconds += now - reservation.quarantined_at
            reservation.blocks_are = state
        steps: list[Step] = []
        for action in actions:
            match action:
                case Ended(outcome=Outcome.DONE):
                    self._closed(key)
                    self._count(reservation, now, None)
                    self._remember(key)
                    assert reservation.session.first is not None
                    blocks = np.concatenate([reservation.cached, reservation.session.blocks])
                    landed = (
                        len(reservation.cached),
                        reservation.hashes,
                        reservation.session.first,
                        reservation.offered,
                    )
                    steps.append(KVLanded(reservation.order, blocks, *landed))
                case Ended():
                    self._closed(key)
                    self._count(reservation, now, reservation.aborted or reason)
                    self._pool.free(reservation.session.blocks)
                    self._pool.free(reservation.cached)
                case OpenLanding() | CloseLanding() | TakeDigests() | LookForWriters():
                    steps.append(action)
                case message:
                    steps.append(Send(reservation.order.prefill.mailbox, message))  # type: ignore[arg-type]
        return steps

    def _count(self, ended: _Reservation, now: float, aborted: AbortReason | None) -> None:
        if not ended.order.probe:
            self._stats.received(ended.session.repairs, now - ended.promised_at, aborted)

    def _closed(self, key: TransferKey) -> None:
        self._expect_no_more(key)
        del self._open[key]

    def _expect_no_more(self, key: TransferKey) -> None:
        """Who needs the blocks of this transfer waits for them no longer."""
        reservation = self._open[key]
        for name in reservation.hashes.names[len(reservation.cached) :]:
            if self._landing.get(name) == key:
                del self._landing[name]

    def _remember(self, key: TransferKey) -> None:
        self._landed[key] = None
        if len(self._landed) > REMEMBERED:
            del self._landed[next(iter(self._landed))]


def _reason(event: object) -> AbortReason:
    """Why a transfer is given up with ``event``, if it is."""
    return AbortReason.PEER if isinstance(event, TransferClosed) else AbortReason.INTEGRITY


def _promise(order: OpenTransfer, num_blocks: int) -> Promise:
    return Promise(order.generation.sampling, count_tokens(order.generation.generated), num_blocks)

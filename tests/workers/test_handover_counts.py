"""Promise: a worker's report says how its hand-overs went: what was hidden, what was repaired, why one was given up."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from decode_worker.core.reservation import Reservations
from engine.core.blocks import BlockPool
from engine.core.sequence import Sequence
from kv_transfer.core.digest import DIGEST_BYTES
from kv_transfer.core.events import Cancelled, Landed, Pushed, PushFailed
from kv_transfer.core.session import Digested, LandingOpened, TransferTimeouts, WritersGone
from messages.codec import pack_tokens
from messages.common import AbortCounts, TransferCounts
from messages.decode_to_prefill import BlocksWanted, CancelTransfer, TransferAccepted, TransferAcked, TransferRefused
from messages.prefill_to_decode import EndTransfer, FirstToken, TransferClosed
from messages.sampling import SamplingParams
from prefill_worker.core.handoff import Handoffs
from tests.workers.test_machines import ATTEMPT, DECODE, KEY_OF_TRANSFER, OPEN, ORDER, PREFILL, REQUEST, SOURCE

KEY = KEY_OF_TRANSFER
GOOD, BAD = bytes(2 * DIGEST_BYTES), bytes([1]) * 2 * DIGEST_BYTES
BLOCKS = pack_tokens([0, 1])
TIMEOUTS = TransferTimeouts()


def counts(**fields: Any) -> TransferCounts:
    aborts = AbortCounts(**{reason: 1 for reason in [fields.pop("aborted", None)] if reason})
    return TransferCounts(aborts=aborts, **fields)


def handoff() -> Handoffs:
    """A hand-over of two blocks that was opened at 1 s."""
    pool = BlockPool(8, 16)
    handoffs = Handoffs(PREFILL, SOURCE, pool, TIMEOUTS)
    blocks = pool.allocate(2)
    seq = Sequence(REQUEST, np.ones(20, np.int32), SamplingParams(max_tokens=5), blocks=blocks)
    handoffs.open(ORDER, seq, 1.0)
    return handoffs


def pushing() -> Handoffs:
    """Accepted at 2 s, pushes asked for at 2 s, the prompt computed at 4 s."""
    handoffs = handoff()
    handoffs.handle(TransferAccepted(REQUEST, ATTEMPT, BLOCKS, 0), 2.0)
    handoffs.computed(KEY, 1, 2.0)
    handoffs.computed(KEY, 2, 4.0)
    handoffs.end(KEY, FirstToken(1), 4.0)
    return handoffs


def pushed(handoffs: Handoffs) -> Handoffs:
    """The first block left at 3 s, while the prompt was computed; the second at 5 s."""
    for first, at in ((0, 3.0), (1, 5.0)):
        handoffs.handle(Pushed(KEY, first, 1, 100, 0, at), at)
        handoffs.handle(Digested(KEY, first, bytes(DIGEST_BYTES)), at)
    return handoffs


def test_a_sender_counts_its_seconds_what_was_hidden_and_repairs() -> None:
    handoffs = pushed(pushing())
    assert handoffs.counts(5.0) == counts(in_flight=1)
    handoffs.handle(BlocksWanted(REQUEST, ATTEMPT, 1, pack_tokens([1])), 6.0)
    handoffs.handle(Pushed(KEY, 1, 1, 100, 0, 7.0), 7.0)
    handoffs.handle(TransferAcked(REQUEST, ATTEMPT), 8.0)
    assert handoffs.counts(9.0) == counts(seconds=5.0, hidden_bytes=100, repairs=1)


@pytest.mark.parametrize(
    ("made", "give_up", "reason"),
    [
        (handoff, lambda h: h.handle(TransferRefused(REQUEST, ATTEMPT, True, "full"), 3.0), "refused"),
        (handoff, lambda h: h.tick(1.0 + TIMEOUTS.open), "timeout"),
        (handoff, lambda h: h.give_up(KEY, "aborted"), "withdrawn"),
        (pushing, lambda h: h.give_up(KEY, "aborted"), "withdrawn"),
        (pushing, lambda h: h.handle(PushFailed(KEY, "gone"), 5.0), "transport"),
        (pushing, lambda h: h.peer_lost(DECODE.worker, DECODE.epoch, dead=True), "peer_lost"),
        (pushing, lambda h: h.handle(CancelTransfer(REQUEST, ATTEMPT, DECODE.mailbox, "no"), 5.0), "peer"),
        (lambda: pushed(pushing()), lambda h: h.tick(5.0 + TIMEOUTS.progress), "timeout"),
        (
            lambda: pushed(pushing()),
            lambda h: h.handle(BlocksWanted(REQUEST, ATTEMPT, 1, pack_tokens([9])), 6.0),
            "integrity",
        ),
    ],
)
def test_a_sender_counts_why_it_was_given_up(
    made: Callable[[], Handoffs], give_up: Callable[[Handoffs], Any], reason: str
) -> None:
    handoffs = made()
    give_up(handoffs)
    handoffs.give_up(KEY, "too late to matter") if KEY in handoffs else None
    handoffs.handle(Cancelled(KEY), 7.0)
    assert KEY not in handoffs
    assert handoffs.counts(9.0) == counts(aborted=reason)


def landing(*, one_sided: bool = False) -> Reservations:
    """Two blocks, promised at 1 s."""
    pool = BlockPool(8, 16)
    reservations = Reservations(DECODE.mailbox, DECODE.kv, pool, timeouts=TIMEOUTS)
    reservations.opened(OPEN if one_sided else replace(OPEN, transport="zmq"), 0.0)
    reservations.admit(1, lambda *_: True, 1.0)
    reservations.handle(LandingOpened(KEY), 1.0)
    return reservations


def end(reservations: Reservations, number: int, now: float, digests: bytes = GOOD) -> None:
    """All lands, ends, and is hashed."""
    reservations.handle(LandingOpened(KEY), now)
    reservations.handle(Landed(KEY, np.arange(2, dtype=np.int32)), now)
    reservations.handle(EndTransfer(REQUEST, ATTEMPT, PREFILL.mailbox, number, FirstToken(7), 2, digests), now)
    reservations.handle(Digested(KEY, 0, GOOD), now)


def test_a_receiver_counts_its_seconds_and_repairs() -> None:
    reservations = landing()
    end(reservations, 1, 2.0, BAD)
    assert reservations.counts(2.0) == counts(in_flight=1)
    end(reservations, 2, 4.0)
    assert reservations.counts(9.0) == counts(seconds=3.0, repairs=1)


def still_bad(reservations: Reservations) -> None:
    for number in (1, 2, 3):
        end(reservations, number, 2.0, BAD)


@pytest.mark.parametrize(
    ("give_up", "reason", "repairs"),
    [
        (lambda r: r.give_up(REQUEST, ATTEMPT, "aborted", 3.0), "withdrawn", 0),
        (lambda r: r.give_up_all("stopping", 3.0), "withdrawn", 0),
        (lambda r: r.handle(TransferClosed(REQUEST, ATTEMPT, "given up", PREFILL.epoch), 3.0), "peer", 0),
        (lambda r: r.peer_lost(PREFILL.worker, PREFILL.epoch, dead=False, now=3.0), "peer_lost", 0),
        (lambda r: r.tick(1.0 + TIMEOUTS.lease), "timeout", 0),
        (still_bad, "integrity", 2),
    ],
)
def test_a_receiver_counts_why_it_was_given_up(
    give_up: Callable[[Reservations], Any], reason: str, repairs: int
) -> None:
    reservations = landing()
    give_up(reservations)
    assert reservations.counts(9.0) == counts(aborted=reason, repairs=repairs)


def test_quarantine_is_counted_while_it_lasts_and_after_it() -> None:
    reservations = landing(one_sided=True)
    reservations.peer_lost(PREFILL.worker, PREFILL.epoch, dead=False, now=3.0)
    assert reservations.counts(5.0) == counts(quarantined_blocks=2, quarantine_seconds=2.0)
    reservations.handle(WritersGone(KEY), 6.0)
    assert reservations.counts(9.0) == counts(quarantine_seconds=3.0, aborted="peer_lost")

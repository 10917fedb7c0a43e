"""Promise: blocks that a peer could still write into are nobody else's."""

import sys

import pytest

from decode_worker.core.reservation import Reservations, Step
from engine.core.blocks import BlockPool
from kv_transfer.core.events import TransferKey
from kv_transfer.core.session import LandingOpened, LookForWriters, OpenLanding, TransferTimeouts, WritersGone
from kv_transfer.core.ways import endpoints
from messages.codec import pack_tokens
from messages.common import Generation, KVRank, KVWay, Ticket, WorkerAddress
from messages.decode_to_prefill import TransferPending, TransferRefused
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.prefill_to_decode import OpenTransfer, TransferClosed
from messages.sampling import SamplingParams
from runtime.core.actions import Send
from tests.kv_transfer.kv_pair import shard_of_bytes

PREFILL = WorkerAddress(WorkerId("prefill-0"), Epoch(1), Address("tcp://127.0.0.1:1"))
SHARD = shard_of_bytes(512)
WAYS = (KVWay("shm", "/proc/1/fd/3#" + "0" * 32 + ":4096"), KVWay("zmq", "tcp://127.0.0.1:9"))
KV = (KVRank(SHARD, 8, "host", WAYS),)


def order(number: int, attempt: int = 1, *, transport: str = "shm") -> OpenTransfer:
    return OpenTransfer(
        request=RequestId(f"{number:032x}"),
        attempt=Attempt(attempt),
        prefill=PREFILL,
        gateway=Address("tcp://127.0.0.1:2"),
        generation=Generation(pack_tokens([1] * 40), SamplingParams(max_tokens=5)),
        transport=transport,
        ranks=KV,
        ticket=Ticket(PREFILL.worker, PREFILL.epoch, WorkerId("decode-0"), Epoch(2), bytes(32)),
    )


KEY = TransferKey(order(1).request, Attempt(1))


def made(*, num_blocks: int = 8) -> tuple[Reservations, BlockPool]:
    pool = BlockPool(num_blocks, 16)
    return Reservations(Address("tcp://127.0.0.1:3"), KV, pool, timeouts=TransferTimeouts()), pool


def admit(reservations: Reservations, pool: BlockPool, room: int = 1, now: float = 0.0) -> list[Step]:
    return reservations.admit(room, lambda needed, *_: needed <= pool.num_free, now)


@pytest.mark.parametrize(
    "how", ["the writer says so", "its supervisor says so, and no process of it is left", "its process is not there"]
)
def test_the_blocks_of_a_silent_writer_are_free_when_it_has_surely_ended(how: str) -> None:
    reservations, pool = made()
    reservations.opened(order(1), 0.0)
    admit(reservations, pool)
    reservations.handle(LandingOpened(KEY), 0.0)
    reservations.peer_lost(PREFILL.worker, PREFILL.epoch, dead=False, now=5.0)
    assert pool.counts().held == reservations.blocks_held == 3
    match how:
        case "the writer says so":
            another = TransferClosed(order(1).request, Attempt(1), "nothing is being sent", Epoch(PREFILL.epoch + 1))
            assert reservations.handle(another, 6.0) == []  # a process that has taken its place knows nothing of it
            assert pool.counts().held == 3
            reservations.handle(TransferClosed(order(1).request, Attempt(1), "stopped", PREFILL.epoch), 6.0)
        case "its supervisor says so, and no process of it is left":
            (_, look) = reservations.peer_lost(PREFILL.worker, PREFILL.epoch, dead=True, now=6.0)
            assert look == LookForWriters(KEY, endpoints(KV, "shm")), "another rank of it may still write"
            assert pool.counts().held == 3
            reservations.handle(WritersGone(KEY), 6.0)
        case _:
            reservations.handle(WritersGone(KEY), 6.0)
    assert pool.counts().held == reservations.blocks_held == 0


def test_only_what_comes_by_a_one_sided_transport_needs_quarantine() -> None:
    """A worker under ``auto`` takes transfers by either, at once."""
    reservations, pool = made()
    for each in (order(1), order(2, transport="zmq")):
        reservations.opened(each, 0.0)
        admit(reservations, pool, now=4.0)  # the second waits no longer for what the first is bringing
        reservations.handle(LandingOpened(TransferKey(each.request, each.attempt)), 4.0)
    assert pool.counts().held == 6
    reservations.peer_lost(PREFILL.worker, PREFILL.epoch, dead=False, now=5.0)
    assert pool.counts().held == reservations.blocks_held == 3
    reservations.handle(WritersGone(KEY), 6.0)
    assert pool.counts().held == 0


@pytest.mark.parametrize("how", ["the sender falls silent", "the attempt is given up", "it makes no progress"])
def test_nobody_waits_for_blocks_that_a_quarantined_transfer_was_to_bring(how: str) -> None:
    reservations, pool = made()
    reservations.opened(order(1), 0.0)
    admit(reservations, pool)
    reservations.handle(LandingOpened(KEY), 0.0)
    now, again = 0.1, order(2)
    match how:
        case "the sender falls silent":
            again = order(1, attempt=2)
            reservations.peer_lost(PREFILL.worker, PREFILL.epoch, dead=False, now=now)
        case "the attempt is given up":
            reservations.give_up(*KEY, "the gateway wants no more of it", now)
        case _:
            now = TransferTimeouts().lease
            reservations.tick(now)
    assert reservations.blocks_held == 3, "its own are in quarantine"
    reservations.opened(again, now)
    (landing,) = admit(reservations, pool, now=now)
    assert isinstance(landing, OpenLanding) and landing.key == TransferKey(again.request, again.attempt)
    reservations.opened(order(3), now)
    assert admit(reservations, pool, now=now) == [], "which the next one waits for"
    reservations.handle(WritersGone(KEY), now)
    assert admit(reservations, pool, now=now) == [], "the end of the quarantine is not the end of the other"


def test_those_that_wait_get_their_blocks_in_turn_a_newer_attempt_at_the_end_of_the_line() -> None:
    reservations, pool = made(num_blocks=4)
    for each in (order(1), order(2), order(3), order(1, attempt=2)):
        reservations.opened(each, 0.0)
    assert reservations.num_waiting == 3
    admitted = []
    while reservations.num_waiting:
        (blocks,) = (step for step in admit(reservations, pool) if isinstance(step, OpenLanding))
        admitted.append(blocks.key)
        reservations.give_up(*blocks.key, "next", 0.0)
        reservations.handle(TransferClosed(*blocks.key, "stopped", PREFILL.epoch), 0.0)
    assert admitted == [(order(number).request, attempt) for number, attempt in ((2, 1), (3, 1), (1, 2))]
    assert pool.counts().held == 0


def test_who_waits_is_refused_when_its_time_is_up_and_forgotten_when_it_is_lost() -> None:
    reservations, _ = made(num_blocks=1)
    for number in range(3):
        reservations.opened(order(number), float(number))
    limit = TransferTimeouts().open
    assert reservations.wake_at == limit
    assert [type(step.message) for step in reservations.tick(limit) if isinstance(step, Send)] == [TransferRefused]
    reservations.handle(TransferClosed(order(1).request, Attempt(1), "stopped", PREFILL.epoch), limit)
    assert reservations.num_waiting == 1
    reservations.peer_lost(PREFILL.worker, PREFILL.epoch, dead=True, now=limit)
    assert reservations.num_waiting == 0 and reservations.wake_at == float("inf")


def test_asking_again_costs_the_same_however_many_wait() -> None:
    """Each of them asks again every half second, from the step loop."""
    lookups = []
    for waiting in (16, 1024):
        reservations, _ = made(num_blocks=1)
        for number in range(waiting):
            reservations.opened(order(number), 0.0)
        last = order(waiting - 1)
        calls = 0

        def count(_frame: object, _event: str, _argument: object) -> None:
            nonlocal calls
            calls += 1

        sys.setprofile(count)
        try:
            (pending,) = reservations.repeated(last, 0.5)
        finally:
            sys.setprofile(None)
        lookups.append(calls)
        assert isinstance(pending, Send) and isinstance(pending.message, TransferPending)
    assert lookups[0] == lookups[1]

"""Promise: blocks that a peer could still write into are nobody else's."""

import pytest

from decode_worker.core.reservation import Reservations
from engine.core.blocks import BlockPool
from kv_transfer.core.events import TransferKey
from kv_transfer.core.session import TransferTimeouts, WriterGone
from messages.codec import pack_tokens
from messages.common import Generation, KVEndpoint, Ticket, WorkerAddress
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.prefill_to_decode import OpenTransfer, TransferClosed
from messages.sampling import SamplingParams

PREFILL = WorkerAddress(WorkerId("prefill-0"), Epoch(1), Address("tcp://127.0.0.1:1"))
SOURCE = KVEndpoint("shm", "/proc/1/fd/3#" + "0" * 32 + ":4096", "layout", 8)


def order(number: int, attempt: int = 1) -> OpenTransfer:
    return OpenTransfer(
        request=RequestId(f"{number:032x}"),
        attempt=Attempt(attempt),
        prefill=PREFILL,
        gateway=Address("tcp://127.0.0.1:2"),
        generation=Generation(pack_tokens([1] * 40), SamplingParams(max_tokens=5)),
        transport="shm",
        layout="layout",
        sources=(SOURCE,),
        ticket=Ticket(PREFILL.worker, PREFILL.epoch, WorkerId("decode-0"), Epoch(2), bytes(32)),
    )


def made(*, one_sided: bool = True, num_blocks: int = 8) -> tuple[Reservations, BlockPool]:
    pool = BlockPool(num_blocks, 16)
    return Reservations(Address("tcp://127.0.0.1:3"), pool, one_sided=one_sided, timeouts=TransferTimeouts()), pool


@pytest.mark.parametrize("how", ["the writer says so", "its supervisor says so", "its process is not there"])
def test_the_blocks_of_a_silent_writer_are_free_when_it_has_surely_ended(how: str) -> None:
    reservations, pool = made()
    reservations.opened(order(1), 0.0)
    reservations.admit(1, 0.0)
    reservations.peer_lost(PREFILL.worker, PREFILL.epoch, dead=False, now=5.0)
    assert pool.counts().held == reservations.blocks_held == 3
    match how:
        case "the writer says so":
            reservations.handle(TransferClosed(order(1).request, Attempt(1), "stopped"), 6.0)
        case "its supervisor says so":
            reservations.peer_lost(PREFILL.worker, PREFILL.epoch, dead=True, now=6.0)
        case _:
            reservations.handle(WriterGone(TransferKey(order(1).request, Attempt(1))), 6.0)
    assert pool.counts().held == reservations.blocks_held == 0


def test_a_two_sided_receiver_needs_no_quarantine() -> None:
    reservations, pool = made(one_sided=False)
    reservations.opened(order(1), 0.0)
    reservations.admit(1, 0.0)
    reservations.peer_lost(PREFILL.worker, PREFILL.epoch, dead=False, now=5.0)
    assert pool.counts().held == 0

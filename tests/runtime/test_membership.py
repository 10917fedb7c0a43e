"""Promise: a worker that is about to be silent says so, and a router that knows nothing of it hears of it soon."""

from messages.common import BlockCounts, CacheCounts, Role, TransferCounts, WorkerAddress
from messages.ids import Address, Epoch, WorkerId
from messages.worker_to_router import Register, Report
from runtime.core.membership import ANNOUNCED, REGISTER_EVERY, REPORT_EVERY, Membership
from runtime.core.pace import FIRST_STEP, StepPace

BLOCKS = BlockCounts(free=1, held=0, cached=0, total=1)
GATEWAYS = (Address("tcp://g:1"), Address("tcp://g:2"), Address("tcp://g:1"))


def member() -> Membership:
    address = WorkerAddress(WorkerId("c0"), Epoch(1), Address("tcp://c0:1"))
    return Membership(address, Role.COLOCATED, Address("tcp://r:1"), bytes(32), max_num_seqs=8, max_model_len=64)


def reported(membership: Membership, now: float) -> list[Report | Register]:
    sends = membership.report(
        BLOCKS, CacheCounts(), TransferCounts, running=0, waiting=0, left=0, gateways=lambda: GATEWAYS, now=now
    )
    return [send.message for send in sends if isinstance(send.message, Report | Register)]


def test_a_long_step_is_announced_before_it_begins_and_the_report_after_it_takes_that_back() -> None:
    membership = member()
    assert membership.announce(3.0) == [], "the first report comes before the first step"
    (first,) = reported(membership, 0.0)
    assert membership.announce(ANNOUNCED - 0.01) == []
    (send,) = membership.announce(3.0)
    assert isinstance(first, Report) and isinstance(send.message, Report)
    assert (send.message.busy_for, send.message.number) == (3.0, first.number + 1)
    (after,) = reported(membership, 3.0)
    assert isinstance(after, Report) and (after.busy_for, after.number) == (0.0, first.number + 2)


def test_every_half_second_the_router_hears_again_who_this_is_and_whose_requests_are_here() -> None:
    membership = member()
    said = [reported(membership, 1.001 * REPORT_EVERY * step) for step in range(3 * REGISTER_EVERY)]
    whole = [messages for messages in said if any(isinstance(message, Register) for message in messages)]
    assert len(whole) == 3
    assert [message.gateways for messages in said for message in messages if isinstance(message, Report)].count(
        GATEWAYS[:2]
    ) == 3


def test_what_a_step_will_take_is_told_by_those_before_it() -> None:
    pace = StepPace(1.0, most=4096)
    assert pace.expected(1) == FIRST_STEP
    pace.took(1, 0.05)
    assert pace.expected(8) == 0.05
    pace.took(1000, 0.5)
    assert (pace.expected(2000), pace.expected(1)) == (1.0, 0.05)
    pace.took(1000, 2.0)
    assert pace.expected(1000) == 2.0, "the machine has become slower"

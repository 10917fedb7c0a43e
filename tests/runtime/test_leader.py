"""Promise: only what a rank does can end its group."""

from collections.abc import Iterator

import pytest
import zmq

from engine.core.errors import GroupLost
from kv_transfer.core.events import TransferKey
from kv_transfer.core.session import CloseLanding
from messages.codec import decoder_for
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.leader_to_rank import Command, Dismissed
from runtime.core.rank_wire import RANK_COMMANDS, RANK_EVENTS
from runtime.leader import RANK_MESSAGES, Leader
from runtime.mailbox import QUEUED_MESSAGES, Mailbox, bind_pull

CLOSE = CloseLanding(TransferKey(RequestId("f" * 32), Attempt(1)))


@pytest.fixture
def mailboxes() -> Iterator[tuple[Mailbox, Mailbox]]:
    with (
        Mailbox("127.0.0.1", decoder_for(*RANK_MESSAGES)) as own,
        Mailbox("127.0.0.1", decoder_for(Command, Dismissed)) as others,
    ):
        yield own, others


@pytest.fixture
def nobody() -> Iterator[Address]:
    """Connects, and takes nothing."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = bind_pull(context, "127.0.0.1")
    address = Address(socket.get_string(zmq.LAST_ENDPOINT))
    socket.close(0)
    yield address
    context.term()


def leader_of(mailbox: Mailbox, rank: Address) -> Leader:
    leader = Leader(mailbox, WorkerId("decode-0"), Epoch(1), 2, b"k" * 32, commands=RANK_COMMANDS, events=RANK_EVENTS)
    leader._ranks[1] = rank
    return leader


def stuff(mailbox: Mailbox, to: Address) -> None:
    """Send to a peer that takes nothing until messages are dropped."""
    close = Command(worker=WorkerId("x"), epoch=Epoch(1), kind="x", body=b"")
    for _ in range(QUEUED_MESSAGES + 1):
        mailbox.send(to, close)
    assert mailbox.outbox.dropped


def test_a_gateway_that_takes_nothing_does_not_end_a_group(mailboxes: tuple[Mailbox, Mailbox], nobody: Address) -> None:
    own, others = mailboxes
    leader = leader_of(own, others.address)
    stuff(own, nobody)
    leader.command(1, CLOSE)
    (command,) = others.receive(5.0)
    assert RANK_COMMANDS.unpack(command.kind, command.body) == CLOSE


def test_a_rank_that_takes_nothing_ends_its_group(mailboxes: tuple[Mailbox, Mailbox], nobody: Address) -> None:
    own, _ = mailboxes
    leader = leader_of(own, nobody)
    with pytest.raises(GroupLost, match="rank 1 of 2"):
        for _ in range(QUEUED_MESSAGES + 1):
            leader.command(1, CLOSE)
    leader.close()  # all that there is to give back is given back


def test_a_group_may_be_closed_twice(mailboxes: tuple[Mailbox, Mailbox]) -> None:
    own, others = mailboxes
    leader = leader_of(own, others.address)
    leader.close()
    (dismissed,) = others.receive(5.0)
    assert isinstance(dismissed, Dismissed)
    own.close()
    leader.close()
    assert own.outbox.unreachable == 0

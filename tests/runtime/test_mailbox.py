"""Promise: typed messages between processes; malformed frames and threads do no harm."""

import threading

import pytest
import zmq

from messages.codec import decoder_for, encode
from messages.gateway_to_worker import Abort, EndAck
from messages.ids import Address, Attempt, RequestId
from runtime.mailbox import MAX_PEERS, Mailbox

ABORT = Abort(RequestId("r"), Attempt(1))


def test_messages_arrive_in_order() -> None:
    with Mailbox("127.0.0.1", decoder_for(Abort)) as there, Mailbox("127.0.0.1", decoder_for(EndAck)) as here:
        sent = [Abort(RequestId("r"), Attempt(number)) for number in range(1, 301)]
        for message in sent:
            here.send(there.address, message)
        got: list[Abort] = []
        while len(got) < len(sent):
            batch = there.receive(5)
            assert batch, "nothing came within 5 s"
            got += batch
        assert got == sent


def test_a_malformed_frame_is_dropped_and_counted() -> None:
    with Mailbox("127.0.0.1", decoder_for(Abort)) as there:
        stranger = zmq.Context()
        socket = stranger.socket(zmq.PUSH)
        socket.connect(there.address)
        for frame in (b"nonsense", encode(EndAck(RequestId("r"), Attempt(1))), encode(ABORT)):
            socket.send(frame)
        got: list[Abort] = []
        while not got:
            got += there.receive(5)
        assert got == [ABORT]
        assert there.malformed == 2
        socket.close(0)
        stranger.term()


def test_an_empty_frame_from_outside_does_not_stop_the_mailbox() -> None:
    with Mailbox("127.0.0.1", decoder_for(Abort)) as there:
        stranger = zmq.Context()
        socket = stranger.socket(zmq.PUSH)
        socket.connect(there.address)
        socket.send(b"")
        socket.send(encode(ABORT))
        got: list[Abort] = []
        while not got:
            got += there.receive(5)
        assert got == [ABORT]
        socket.close(0)
        stranger.term()


def test_another_thread_can_post_and_wakes_the_receiver() -> None:
    with Mailbox("127.0.0.1", decoder_for(Abort)) as there:
        poster = threading.Thread(target=there.post, args=("hello",))
        poster.start()
        assert there.receive(5) == ["hello"]
        poster.join()


@pytest.mark.parametrize("address", ["nonsense", "", "tcp://999.1.1.1:5", "tcp://localhost", "ftp://127.0.0.1:1"])
def test_what_cannot_be_connected_to_is_counted_and_the_mailbox_closes_all_the_same(address: str) -> None:
    with Mailbox("127.0.0.1", decoder_for(Abort)) as here:
        for _ in range(3):
            here.send(Address(address), ABORT)
        here.send(here.address, ABORT)
        assert here.receive(5) == [ABORT]
        assert here.outbox.unreachable in (0, 3)  # libzmq looks at some addresses later, and then silently


def test_a_mailbox_closes_also_after_what_is_no_address_at_all() -> None:
    with Mailbox("127.0.0.1", decoder_for(Abort)) as here, pytest.raises(TypeError):
        here.send(None, ABORT)  # type: ignore[arg-type]


def test_more_addresses_than_sockets_cost_only_the_oldest_their_own() -> None:
    with Mailbox("127.0.0.1", decoder_for(Abort)) as here:
        for port in range(1000, 1000 + 3 * MAX_PEERS):
            here.send(Address(f"tcp://127.0.0.1:{port}"), ABORT)
            here.send(here.address, ABORT)
        got = 0
        while got < 3 * MAX_PEERS:
            batch = here.receive(5)
            assert batch, "nothing came within 5 s"
            got += len(batch)
        assert here.outbox.num_peers <= MAX_PEERS


def test_a_flood_of_malformed_frames_is_no_flood_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with Mailbox("127.0.0.1", decoder_for(Abort)) as there, Mailbox("127.0.0.1", decoder_for(Abort)) as here:
        for number in range(1, 1001):
            here.send(there.address, EndAck(RequestId("r"), Attempt(number)))
        here.send(there.address, ABORT)
        while there.receive(5) != [ABORT]:
            pass
        assert there.malformed == 1000
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 10  # 1, 2, 4, ... 512
    assert "512 so far" in warnings[-1]


def test_nothing_to_receive_is_an_empty_list_in_time() -> None:
    with Mailbox("127.0.0.1", decoder_for(Abort)) as there:
        assert there.receive(0) == []

"""Promise: typed messages between processes; malformed frames and threads do no harm."""

import threading

import zmq

from messages.codec import decoder_for, encode
from messages.gateway_to_worker import Abort, EndAck
from messages.ids import Attempt, RequestId
from runtime.mailbox import Mailbox

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


def test_nothing_to_receive_is_an_empty_list_in_time() -> None:
    with Mailbox("127.0.0.1", decoder_for(Abort)) as there:
        assert there.receive(0) == []

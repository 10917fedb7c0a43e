"""Promise: whatever comes to a zmq receiver's port, it goes on; whatever a link does, a sender answers."""

import pickle
import random
import socket
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import zmq

from kv_transfer.core.events import Cancelled, Pushed, PushFailed
from kv_transfer.core.frames import MAX_PARTS, DataHeader, decode_taken
from kv_transfer.curve import CurveKeys
from kv_transfer.transports.zmq import WINDOW_BYTES, ZmqReceiver, ZmqSender
from messages.codec import encode
from messages.common import KVEndpoint
from messages.ids import Attempt, RequestId
from tests.kv_transfer.kv_pair import ALL, Events, Pair, key, scattered, shard_of_bytes

BLOCK = 4096
SHARD = shard_of_bytes(BLOCK)
BLOCKS = np.arange(4, dtype=np.int32)


class Stranger:
    """A peer that sends what it likes."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.RCVTIMEO, 10_000)
        self._socket.connect(address)
        self._number = 0

    def send(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def settle(self) -> None:
        """Return when the receiver has dealt with everything sent before."""
        self._number += 1
        number = 2**40 + self._number
        self.send(encode(header(key(99), number=number)), bytes(BLOCK))
        while decode_taken(self._socket.recv()).number != number:
            pass

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()


class Canary:
    """Unpickling it touches a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def header(of: tuple[RequestId, Attempt], number: int = 0, **changes: int) -> DataHeader:
    fields = {
        "first": 0,
        "count": 1,
        "block_bytes": BLOCK,
        "first_layer": 0,
        "num_layers": 1,
        "first_head": 0,
        "num_heads": 1,
    } | changes
    return DataHeader(*of, number=number, **fields)


def receiver_of(pair: Pair) -> ZmqReceiver:
    assert isinstance(pair.receiver, ZmqReceiver)
    return pair.receiver


def assert_works(pair: Pair, number: int) -> None:
    rows = scattered(number, 5)
    pair.open(key(number), 0, rows)
    pair.push(key(number), 0, rows, rows)
    assert pair.sent.next() == Pushed(key(number), 0, 5)
    np.testing.assert_array_equal(pair.there[rows], pair.here[rows])


def test_malformed_messages_are_dropped_and_counted(make_pair: Any, tmp_path: Path) -> None:
    pair: Pair = make_pair("zmq", False, 64, BLOCK)
    receiver, rng = receiver_of(pair), random.Random(0)
    pair.open(key(), 0, BLOCKS)
    good, canary = encode(header(key())), pickle.dumps(Canary(tmp_path / "canary"))
    bad: list[list[bytes]] = [
        [b""],
        [good],
        [b"", good, bytes(BLOCK)],
        [good, bytes(BLOCK - 1)],
        [good, bytes(BLOCK + 1)],
        [good, b"", bytes(BLOCK)],
        [good, bytes(BLOCK), bytes(BLOCK)],
        [good, *[b"x"] * (2 * MAX_PARTS)],
        [encode(header(key(), count=2**16)), bytes(BLOCK)],
        [encode(header(key(), block_bytes=1)), b"1"],
        [encode(header(key(), block_bytes=2 * BLOCK)), bytes(2 * BLOCK)],
        [good + b"\0", bytes(BLOCK)],
        [canary, bytes(BLOCK)],
        [good, canary],
        [msgspec.msgpack.encode(msgspec.to_builtins(header(key())) | {"first": msgspec.msgpack.Ext(1, canary)})],
        *([rng.randbytes(rng.randrange(200)), bytes(BLOCK)] for _ in range(200)),
    ]
    stranger = Stranger(pair.to.address)
    for message in bad:
        stranger.send(*message)
    stranger.settle()
    assert receiver.malformed == len(bad)
    assert receiver.dropped == 1  # that of settle
    assert not pair.there.any() and pair.received.empty
    assert not (tmp_path / "canary").exists()
    assert_works(pair, 2)
    stranger.close()


def test_blocks_that_are_not_open_are_dropped_and_counted(make_pair: Any) -> None:
    pair: Pair = make_pair("zmq", False, 64, BLOCK)
    pair.open(key(), 2, BLOCKS)
    stranger = Stranger(pair.to.address)
    data = bytes([1]) * BLOCK
    for wrong in (
        header(key(), first=1), header(key(), first=6), header(key(), first=2**22), header(key(5), first=2),
        header(key(1, attempt=2), first=2),
    ):  # fmt: skip
        stranger.send(encode(wrong), data)
    stranger.send(encode(header(key(), first=4, count=3)), data * 3)
    stranger.settle()
    assert receiver_of(pair).dropped == 7 and not pair.there.any()
    stranger.send(encode(header(key(), first=4, count=2)), data, data)
    stranger.settle()
    assert pair.there[2:4].all() and not np.delete(pair.there, [2, 3], axis=0).any()
    stranger.close()


def test_a_part_that_is_too_large_costs_the_peer_its_connection(make_pair: Any) -> None:
    pair: Pair = make_pair("zmq", False, 64, BLOCK)
    stranger = Stranger(pair.to.address)
    stranger.settle()
    stranger.send(encode(header(key())), bytes(8 << 20))
    assert_works(pair, 2)
    stranger.close()
    with socket.create_connection(tuple(pair.to.address.removeprefix("tcp://").split(":")), 5) as raw:  # type: ignore[arg-type]
        raw.sendall(random.Random(1).randbytes(4096))
        assert_works(pair, 3)


def test_a_receiver_listens_on_the_host_that_it_was_given_or_says_why_not(make_pair: Any) -> None:
    pair: Pair = make_pair("zmq", False)
    assert pair.to.address.startswith("tcp://127.0.0.1:")
    with pytest.raises(zmq.ZMQError):
        ZmqReceiver(pair.there, "203.0.113.7", pair.to.shard, print, CurveKeys.make())


class Silent:
    """Something that listens, and takes nothing."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = KVEndpoint("zmq", f"tcp://127.0.0.1:{self._socket.getsockname()[1]}", SHARD, 64)

    def close(self) -> None:
        self._socket.close()


def test_a_peer_that_takes_nothing_fails_what_is_pushed_to_it_and_nothing_else(make_pair: Any) -> None:
    pair: Pair = make_pair("zmq", False, 64, BLOCK)
    silent, events = Silent(), Events()
    sender = ZmqSender(pair.here, SHARD, events.put, stalled_after=0.2)
    for number in (1, 2, 2):
        sender.push(key(number), silent.endpoint, ALL, 0, BLOCKS, BLOCKS)
    pair.open(key(4), 0, BLOCKS)
    sender.push(key(4), pair.to, ALL, 0, BLOCKS, BLOCKS)
    assert events.next() == Pushed(key(4), 0, 4)
    assert [event.key for event in (events.next(), events.next(), events.next())] == [key(1), key(2), key(2)]
    sender.push(key(1), silent.endpoint, ALL, 0, BLOCKS, BLOCKS)
    sender.cancel(key(1))
    assert events.next() == Cancelled(key(1))
    sender.push(key(1), silent.endpoint, ALL, 0, BLOCKS, BLOCKS)
    sender.forget(silent.endpoint)
    assert isinstance(events.next(), PushFailed)
    sender.shutdown()
    silent.close()
    assert events.empty


def test_a_link_that_nothing_goes_over_any_more_is_closed_and_opened_again_when_something_does(make_pair: Any) -> None:
    pair: Pair = make_pair("zmq", False, 64, BLOCK)
    events, port = Events(), int(pair.to.address.rpartition(":")[2])
    sender = ZmqSender(pair.here, SHARD, events.put, kept_for=0.1)
    for number in (1, 2):
        pair.open(key(number), 0, BLOCKS)
        sender.push(key(number), pair.to, ALL, 0, BLOCKS, BLOCKS)
        assert events.next() == Pushed(key(number), 0, 4)
        deadline = time.monotonic() + 10
        while connections_to(port):
            assert time.monotonic() < deadline
    sender.shutdown()


def connections_to(port: int) -> list[Any]:
    connections = psutil.Process().net_connections("tcp")
    return [each for each in connections if each.raddr and each.raddr.port == port and each.status == "ESTABLISHED"]


def test_a_cancel_over_a_stalled_link_is_answered_when_its_socket_is_given_up() -> None:
    """A ROUTER that never answers has taken the messages into its queues, like a host that was cut off."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    pool, events = np.ones((64, 1 << 20), np.uint8), Events()
    shard = shard_of_bytes(1 << 20)
    sender = ZmqSender(pool, shard, events.put, stalled_after=0.3)
    to = KVEndpoint("zmq", f"tcp://127.0.0.1:{port}", shard, 64)
    blocks = np.arange(64, dtype=np.int32)
    for number in (1, 2):
        sender.push(key(number), to, ALL, 0, blocks, blocks)
    received = 0
    while received < WINDOW_BYTES:  # the window, and no more than that
        received += sum(len(frame) for frame in router.recv_multipart()[2:])
    assert received == WINDOW_BYTES and not router.poll(50)
    sender.cancel(key(1))
    assert {type(event): event.key for event in (events.next(), events.next())} == {
        Cancelled: key(1),
        PushFailed: key(2),
    }
    sender.shutdown()
    router.close(0)
    context.term()
    assert events.empty


def test_a_sender_that_is_shut_down_with_work_to_do_stops() -> None:
    silent, events = Silent(), Events()
    sender = ZmqSender(np.ones((64, BLOCK), np.uint8), SHARD, events.put)
    sender.push(key(), silent.endpoint, ALL, 0, BLOCKS, BLOCKS)
    sender.shutdown()
    silent.close()
    assert events.empty

"""Promise (rows 3 and 9): between hosts only members of the cluster come in, and nobody reads what they say; without
keys everything is on loopback."""

import contextlib
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from kv_transfer import curve
from kv_transfer.core.events import Pushed, PushFailed
from kv_transfer.curve import CurveKeys, Exposed
from kv_transfer.transports.build import allocate_pool, make_receiver, make_sender
from kv_transfer.transports.zmq import MESSAGE_BYTES, ZmqReceiver, ZmqSender
from messages.codec import decoder_for, encode
from messages.common import KVEndpoint
from messages.gateway_to_worker import Abort
from messages.ids import Address, Attempt, RequestId
from runtime.mailbox import AsyncMailbox, Mailbox
from tests.kv_transfer.kv_pair import ALL, Events, key, shard_of_bytes

KEYS = CurveKeys.make()
ABORT = Abort(RequestId("r"), Attempt(1))
OUTSIDE = ["203.0.113.7", "0.0.0.0", "::", "2001:db8::7", "no-such-host.invalid"]
SHARD = shard_of_bytes(4096)
BLOCKS = np.arange(4, dtype=np.int32)
DROPPED = {zmq.Event.HANDSHAKE_FAILED_AUTH, zmq.Event.HANDSHAKE_FAILED_NO_DETAIL, zmq.Event.HANDSHAKE_FAILED_PROTOCOL}


def mailbox(keys: CurveKeys | None = KEYS) -> Mailbox:
    return Mailbox("127.0.0.1", decoder_for(Abort), curve=keys)


def no_key(_: Any) -> None:
    """CURVE is not even tried."""


def wrong_server_key(stranger: Any) -> None:
    """Of another cluster."""
    curve.connect(stranger, "tcp://127.0.0.1:9", CurveKeys.make())


def own_key(stranger: Any) -> None:
    """Somebody who has learned the public key, and proves to be somebody."""
    other = CurveKeys.make()
    stranger.set(zmq.CURVE_SERVERKEY, KEYS.public)
    stranger.set(zmq.CURVE_PUBLICKEY, other.public)
    stranger.set(zmq.CURVE_SECRETKEY, other.secret)


def claimed_key(stranger: Any) -> None:
    """Somebody who has learned the public key, and says that it is his own."""
    own_key(stranger)
    stranger.set(zmq.CURVE_PUBLICKEY, KEYS.public)


STRANGERS = [no_key, wrong_server_key, own_key, claimed_key]


@contextlib.contextmanager
def refused(kind: int, address: str, disguise: Callable[[Any], None], *frames: bytes) -> Iterator[None]:
    """A stranger who has been dropped in the handshake, and still tries."""
    context = zmq.Context()
    stranger = context.socket(kind)
    stranger.set(zmq.LINGER, 0)
    disguise(stranger)
    monitor = stranger.get_monitor_socket()
    try:
        stranger.connect(address)
        with contextlib.suppress(zmq.Again):
            stranger.send_multipart(frames, zmq.NOBLOCK)
        seen = set()
        while not seen & DROPPED:
            assert monitor.poll(10_000), f"nobody refused it: {seen}"
            seen.add(recv_monitor_message(monitor)["event"])
            assert zmq.Event.HANDSHAKE_SUCCEEDED not in seen
        yield
    finally:
        stranger.disable_monitor()
        monitor.close(0)
        stranger.close()
        context.term()


def test_members_of_a_cluster_hear_each_other() -> None:
    with mailbox() as there, mailbox() as here:
        here.send(there.address, ABORT)
        assert there.receive(10) == [ABORT]
        there.post("its own events need no key")
        assert there.receive(10) == ["its own events need no key"]


@pytest.mark.parametrize("disguise", STRANGERS)
def test_who_is_no_member_is_heard_by_nobody(disguise: Callable[[Any], None]) -> None:
    with (
        mailbox() as there,
        mailbox() as here,
        refused(zmq.PUSH, there.address, disguise, encode(Abort(RequestId("forged"), Attempt(1)))),
    ):
        here.send(there.address, ABORT)
        assert there.receive(10) == [ABORT]
        assert there.malformed == 0


def test_a_member_speaks_to_nobody_who_only_listens_where_a_member_did() -> None:
    """Its message waits, and never leaves."""
    with mailbox() as here, socket.create_server(("127.0.0.1", 0)) as impostor:
        here.send(Address(f"tcp://127.0.0.1:{impostor.getsockname()[1]}"), Abort(RequestId("canary"), Attempt(1)))
        connection, _ = impostor.accept()
        with connection:
            connection.settimeout(10)
            # A greeting that says CURVE, then a WELCOME that nobody can make without the cluster's secret key.
            connection.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE".ljust(54, b"\0") + b"\x01")
            heard = _all_of(connection, b"\x04\xa8\x07WELCOME" + bytes(160))
        assert b"HELLO" in heard and b"canary" not in heard


def _all_of(connection: socket.socket, answer: bytes) -> bytes:
    """What comes until the other end hangs up; ``answer`` is sent once HELLO has come."""
    heard = b""
    while part := connection.recv(4096):
        if b"HELLO" in part:
            connection.sendall(answer)
        heard += part
    return heard


def test_nobody_between_two_members_can_read_what_they_say() -> None:
    canary = "a prompt that nobody else shall read"
    with mailbox() as there, mailbox() as here, Wire(there.address) as wire:
        here.send(wire.address, Abort(RequestId(canary), Attempt(1)))
        assert there.receive(10) == [Abort(RequestId(canary), Attempt(1))]
        assert b"CURVE" in wire.passed and canary.encode() not in wire.passed
    with mailbox(None) as there, mailbox(None) as here, Wire(there.address) as wire:
        here.send(wire.address, Abort(RequestId(canary), Attempt(1)))
        assert there.receive(10)
        assert canary.encode() in wire.passed, "the wire shows nothing at all"


class Wire:
    """Somebody on the way to ``address``, who keeps all that passes."""

    def __init__(self, address: str) -> None:
        self._to = ("127.0.0.1", int(address.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address(f"tcp://127.0.0.1:{self._listener.getsockname()[1]}")
        self.passed = b""
        self._threads = [threading.Thread(target=self._pass_on)]

    def _pass_on(self) -> None:
        connection, _ = self._listener.accept()
        with connection, socket.create_connection(self._to) as onward:
            back = threading.Thread(target=self._copy, args=(onward, connection))
            back.start()
            self._copy(connection, onward)
            back.join()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.passed += data
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "Wire":
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()


def test_kv_moves_between_members_in_messages_of_any_size() -> None:
    memory = allocate_pool("zmq", 4, MESSAGE_BYTES)  # a block is the largest message that there is
    shard = shard_of_bytes(MESSAGE_BYTES)
    source, events = np.random.default_rng(0).integers(0, 256, memory.pool.shape, np.uint8), Events()
    receiver = make_receiver("zmq", "127.0.0.1", memory, shard, Events().put, KEYS)
    sender = make_sender("zmq", source, shard, events.put, KEYS)
    receiver.open(key(), 0, BLOCKS, (ALL,))
    sender.push(key(), receiver.endpoint, ALL, 0, BLOCKS, BLOCKS)
    assert events.next() == Pushed(key(), 0, 4)
    assert np.array_equal(memory.pool, source)
    sender.shutdown()
    receiver.shutdown()
    memory.release()


@pytest.mark.parametrize("disguise", STRANGERS)
def test_kv_of_who_is_no_member_goes_nowhere(disguise: Callable[[Any], None]) -> None:
    memory, received = allocate_pool("zmq", 4, 4096), Events()
    receiver = ZmqReceiver(memory.pool, "127.0.0.1", SHARD, received.put, KEYS)
    receiver.open(key(), 0, BLOCKS, (ALL,))
    with refused(zmq.DEALER, receiver.endpoint.address, disguise, pickle.dumps("KV")):
        pass
    receiver.shutdown()
    assert received.empty and receiver.malformed == receiver.dropped == 0 and not memory.pool.any()
    memory.release()


def test_a_sender_of_another_cluster_hears_that_nothing_is_taken() -> None:
    memory, events = allocate_pool("zmq", 4, 4096), Events()
    receiver = ZmqReceiver(memory.pool, "127.0.0.1", SHARD, Events().put, KEYS)
    sender = ZmqSender(np.ones((4, 4096), np.uint8), SHARD, events.put, stalled_after=0.2, curve=CurveKeys.make())
    sender.push(key(), receiver.endpoint, ALL, 0, BLOCKS, BLOCKS)
    assert isinstance(events.next(), PushFailed)
    sender.shutdown()
    receiver.shutdown()
    assert not memory.pool.any()
    memory.release()


@pytest.mark.parametrize("host", OUTSIDE)
def test_without_keys_nothing_listens_but_on_loopback(host: str) -> None:
    pool = np.zeros((4, 4096), np.uint8)
    listeners: list[Callable[[], Any]] = [
        lambda: Mailbox(host, decoder_for(Abort)),
        lambda: AsyncMailbox(host, decoder_for(Abort)),
        lambda: ZmqReceiver(pool, host, SHARD, print),
    ]
    for listen in listeners:
        with pytest.raises(Exposed, match=r"without keys; run `baton keys`"):
            listen()


@pytest.mark.parametrize("host", OUTSIDE)
def test_what_cannot_be_encrypted_listens_on_loopback_whoever_has_keys(host: str) -> None:
    memory = allocate_pool("nccl", 4, 4096)
    with pytest.raises(Exposed, match=r"set kv\.transport to auto or zmq"):
        make_receiver("nccl", host, memory, SHARD, print, KEYS)
    memory.release()


@pytest.mark.parametrize(
    "address",
    [
        "tcp://169.254.169.254:80",
        "tcp://127.0.0.1:0;169.254.169.254:80",
        "tcp://[::ffff:169.254.169.254]:80",
        "tcp://localhost:80",
        "inproc://zeromq.zap.01",
        "ipc:///tmp/socket",
        "udp://127.0.0.1:80",
        "tcp://127.0.0.1:80\n",
        "tcp://127.0.0.1",
        "",
    ],
)
def test_without_keys_nothing_goes_anywhere_but_to_loopback(address: str) -> None:
    with mailbox(None) as here:
        assert not here.send(Address(address), ABORT)
        assert here.outbox.unreachable == 1
    for transport in ("zmq", "nccl"):
        events = Events()
        sender = make_sender(transport, np.ones((4, 4096), np.uint8), SHARD, events.put)
        sender.push(key(), KVEndpoint(transport, address, SHARD, 4), ALL, 0, BLOCKS, BLOCKS)
        assert isinstance(events.next(), PushFailed)
        sender.shutdown()


def test_nothing_is_left_of_a_socket_that_could_not_listen() -> None:
    threads = threading.active_count()
    with pytest.raises(zmq.ZMQError):
        Mailbox("203.0.113.7", decoder_for(Abort), curve=KEYS)
    with mailbox(), mailbox():
        assert threading.active_count() > threads
    for thread in threading.enumerate():
        if thread.name == "zmq-zap":
            thread.join(10)
    assert threading.active_count() == threads


def test_nothing_is_left_of_a_socket_that_nobody_could_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="new thread"):
        patch.setattr(threading.Thread, "start", no_more)
        mailbox()


def test_keys_are_checked() -> None:
    assert CurveKeys.of(KEYS.secret) == KEYS
    for wrong in (b"", b"x" * 39, b"x" * 41, b"~" * 40, "é".encode() * 20):
        with pytest.raises(ValueError):
            CurveKeys.of(wrong)


def test_the_library_is_no_older_than_the_flaws_that_were_mended_in_it() -> None:
    assert zmq.zmq_version_info() >= curve.LEAST_LIBZMQ == (4, 3, 3)

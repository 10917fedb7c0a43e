"""Promise: over torch.distributed, too, a peer that dies, stands still or talks nonsense costs only its own pushes."""

import contextlib
import gc
import os
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from itertools import repeat
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from engine.layer_gate import StepLayers
from kv_transfer.core.events import Cancelled, Pushed, PushFailed
from kv_transfer.core.frames import Meet
from kv_transfer.transports.copying import STEP_FAILED
from kv_transfer.transports.torch_distributed import TorchDistributedReceiver, TorchDistributedSender
from kv_transfer.transports.torch_group import Group
from kv_transfer.transports.torch_link import Link
from messages.codec import encode
from messages.common import KVEndpoint
from tests.kv_transfer.kv_pair import ALL, Events, key, shard_of_bytes
from tests.kv_transfer.test_live_pushes import until
from tests.kv_transfer.test_shared_memory import kill, line_of, start

BLOCK = 256 << 10
SHARD = shard_of_bytes(BLOCK)
BLOCKS = np.arange(64, dtype=np.int32)
STALLED_AFTER = 1.0
RECEIVER = """
import sys
import numpy as np
from kv_transfer.core.events import TransferKey
from kv_transfer.transports.build import allocate_pool, make_receiver
from tests.kv_transfer.kv_pair import ALL, key, shard_of_bytes
memory = allocate_pool("nccl", 64, 262144)
receiver = make_receiver("nccl", "127.0.0.1", memory, shard_of_bytes(262144), lambda event: None)
receiver.open(key(1), 0, np.arange(64, dtype=np.int32), (ALL,))
print(receiver.endpoint.address, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_receiver_that_stands_still_or_dies_fails_what_goes_there_and_nothing_else(
    fault: signal.Signals, make_pair: Any
) -> None:
    pair, process, events = make_pair("nccl", False, 64, BLOCK), start(RECEIVER), Events()
    sender = TorchDistributedSender(pair.here, SHARD, events.put, stalled_after=STALLED_AFTER)
    there = KVEndpoint("nccl", line_of(process), SHARD, 64)
    sender.push(key(1), there, ALL, 0, BLOCKS, BLOCKS)
    assert events.next() == Pushed(key(1), 0, 64)
    os.kill(process.pid, fault)
    sender.push(key(1), there, ALL, 0, BLOCKS, BLOCKS)
    sender.push(key(3), there, ALL, 0, BLOCKS, BLOCKS)
    sender.cancel(key(3))
    pair.open(key(2), 0, BLOCKS)
    sender.push(key(2), pair.to, ALL, 0, BLOCKS, BLOCKS)  # while the other link waits
    heard = {(type(event), event.key) for event in (events.next() for _ in range(3))}
    assert heard == {(PushFailed, key(1)), (Cancelled, key(3)), (Pushed, key(2))}
    np.testing.assert_array_equal(pair.there, pair.here)
    if fault is signal.SIGSTOP:
        os.kill(process.pid, signal.SIGCONT)
        sender.push(key(1), there, ALL, 0, BLOCKS, BLOCKS)  # over a group of its own
        assert events.next() == Pushed(key(1), 0, 64)
    kill(process)
    sender.shutdown()
    assert events.empty


def test_a_sender_that_talks_nonsense_or_nothing_is_hung_up_on(make_pair: Any) -> None:
    pair = make_pair("nccl", False, 64, BLOCK)
    events = Events()
    receiver = TorchDistributedReceiver(pair.there, "127.0.0.1", SHARD, events.put, stalled_after=0.2)
    host, port = receiver.endpoint.address.removeprefix("tcp://").split(":")
    for words in (b"", b"\x04\x00\x00\x00\xff\xff\xff\xff", b"\xff\xff\xff\xff"):
        with socket.create_connection((host, int(port)), 5) as connection:
            connection.sendall(words)
            while connection.recv(4096):  # what its group has to say, and then the end
                pass
    assert receiver.malformed == 2
    receiver.open(key(), 0, BLOCKS, (ALL,))
    pair.push(key(), 0, BLOCKS, BLOCKS, receiver.endpoint)
    assert pair.sent.next() == Pushed(key(), 0, 64)
    receiver.shutdown()
    np.testing.assert_array_equal(pair.there, pair.here)


def connect(receiver: TorchDistributedReceiver) -> socket.socket:
    host, port = receiver.endpoint.address.removeprefix("tcp://").split(":")
    return socket.create_connection((host, int(port)), 5)


def framed(message: Any) -> bytes:
    body = encode(message)
    return len(body).to_bytes(4, "little") + body


def hung_up_on(connection: socket.socket) -> bool:
    """Whether the connection has ended when its timeout has passed."""
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:  # it had not read everything
        pass
    return True


@pytest.mark.parametrize("values", [repeat(b"", 100), repeat(bytes(2048), 40)], ids=["frames", "bytes"])
def test_a_sender_that_says_more_than_a_meeting_needs_is_hung_up_on(values: Iterator[bytes]) -> None:
    receiver = TorchDistributedReceiver(np.zeros((64, BLOCK), np.uint8), "127.0.0.1", SHARD, print, stalled_after=60)
    with connect(receiver) as connection:
        connection.sendall(b"".join(framed(Meet(f"key {number}", value)) for number, value in enumerate(values)))
        assert hung_up_on(connection)
    receiver.shutdown()
    assert receiver.malformed == 1


@pytest.mark.parametrize(
    ("first", "then"),
    [(b"\x00\x0f\x00\x00", b"a"), (b"", framed(Meet("key")))],
    ids=["byte by byte", "frame by frame"],
)
def test_a_sender_that_never_ends_its_meeting_is_hung_up_on_in_time(first: bytes, then: bytes) -> None:
    receiver = TorchDistributedReceiver(np.zeros((64, BLOCK), np.uint8), "127.0.0.1", SHARD, print, stalled_after=0.5)
    with connect(receiver) as connection:
        connection.settimeout(0.1)  # which is the pace
        connection.sendall(first)
        for _ in range(30):
            if hung_up_on(connection):
                break
            with contextlib.suppress(ConnectionError):
                connection.sendall(then)
        else:
            pytest.fail("it is listened to for ever")
    receiver.shutdown()
    assert not receiver.malformed


def used() -> tuple[int, int]:
    """File descriptors and threads of this process, those of torch too."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@pytest.fixture
def without_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_meetings_that_fail_leave_nothing_at_the_sender(without_gc: None) -> None:
    events = Events()
    sender = TorchDistributedSender(np.zeros((64, BLOCK), np.uint8), SHARD, events.put, stalled_after=0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # its backlog lets anyone connect
        there = KVEndpoint("nccl", f"tcp://127.0.0.1:{silent.getsockname()[1]}", SHARD, 64)
        before = used()
        for _ in range(3):
            sender.push(key(), there, ALL, 0, BLOCKS, BLOCKS)
            assert "has taken nothing" in events.next().detail
        until(lambda: used() == before)
    sender.shutdown()


@pytest.mark.parametrize("words", [None, b"", b"\x04\x00\x00\x00\xff\xff\xff\xff"], ids=["gone", "silent", "nonsense"])
def test_meetings_that_fail_leave_nothing_at_the_receiver(words: bytes | None, without_gc: None) -> None:
    receiver = TorchDistributedReceiver(np.zeros((64, BLOCK), np.uint8), "127.0.0.1", SHARD, print, stalled_after=0.1)
    before = used()
    for _ in range(3):
        with connect(receiver) as connection:
            if words is None:
                connection.shutdown(socket.SHUT_WR)
            else:
                connection.sendall(words)
            assert hung_up_on(connection)
    until(lambda: used() == before)
    receiver.shutdown()


def test_a_peer_costs_what_the_bound_on_peers_reckons_with(make_pair: Any) -> None:
    pair = make_pair("nccl", False)
    pair.open(key(), 0, BLOCKS)
    files, threads = used()
    pair.push(key(), 0, BLOCKS, BLOCKS)
    assert pair.sent.next() == Pushed(key(), 0, 64)
    assert used() <= (files + 2 * 6, threads + 2 * 3)


def test_files_beyond_the_reach_of_select_are_files_too(make_pair: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"a process may have {hard} files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    pair = make_pair("nccl", False)
    pair.open(key(), 0, BLOCKS)
    taken = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while taken[-1] < 1024:
            taken.append(os.dup(taken[0]))
        connect(pair.receiver).close()  # accept has chosen its file before there were so many
        for _ in range(2):  # which it is idle between
            pair.push(key(), 0, BLOCKS, BLOCKS)
            assert pair.sent.next() == Pushed(key(), 0, 64)
        assert all(connection.fileno() > 1023 for connection in pair.receiver._connections)
    finally:
        for file in taken:
            os.close(file)
        pair.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("whose", ["kv-nccl-receive", "kv-nccl-link"])
def test_where_no_thread_can_be_had_a_push_fails_and_the_next_is_tried(
    whose: str, make_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, refused = threading.Thread.start, []

    def refuse_once(thread: threading.Thread) -> None:
        if thread.name == whose and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        started(thread)

    pair = make_pair("nccl", False)
    pair.open(key(), 0, BLOCKS)
    monkeypatch.setattr(threading.Thread, "start", refuse_once)
    pair.push(key(), 0, BLOCKS, BLOCKS)
    assert isinstance(pair.sent.next(), PushFailed)
    pair.push(key(), 0, BLOCKS, BLOCKS)
    assert pair.sent.next() == Pushed(key(), 0, 64)
    pair.close()


def test_a_step_that_fails_just_when_its_layer_is_to_leave_holds_up_no_other_push(
    make_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, ready = StepLayers(1), Link._ready

    def fails_when_it_is_seen(link: Link) -> Any:
        job = ready(link)
        if job is not None and job.live is layers:
            layers.fail()
        return job

    monkeypatch.setattr(Link, "_ready", fails_when_it_is_seen)
    pair = make_pair("nccl", False)
    layers.advance(1)
    pair.push(key(), 0, BLOCKS, BLOCKS, layers=layers)
    assert pair.sent.next() in (PushFailed(key(), STEP_FAILED), Pushed(key(), 0, 64))
    pair.push(key(2), 0, BLOCKS, BLOCKS)
    assert pair.sent.next() == Pushed(key(2), 0, 64)


def test_either_end_hears_within_half_a_minute_of_a_host_that_has_lost_power(make_pair: Any) -> None:
    pair = make_pair("nccl", False)
    pair.push(key(), 0, BLOCKS, BLOCKS)
    assert pair.sent.next() == Pushed(key(), 0, 64)
    for connection in (*pair.receiver._connections, *(link._connection for link in pair.sender._links.values())):
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, between, tries, unanswered = (
            connection.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        )
        assert idle + between * tries <= 30 and 0 < unanswered <= 30_000


def test_a_receiver_listens_on_the_address_that_it_was_given_alone(make_pair: Any) -> None:
    def listening() -> set[Any]:
        return {link.laddr for link in psutil.Process().net_connections("tcp") if link.status == psutil.CONN_LISTEN}

    before = listening()
    pair = make_pair("nccl", False)
    pair.open(key(), 0, BLOCKS)
    pair.push(key(), 0, BLOCKS, BLOCKS)
    assert pair.sent.next() == Pushed(key(), 0, 64)
    assert {address.ip for address in listening() - before} == {"127.0.0.1"}


def test_two_ends_always_meet(make_pair: Any) -> None:
    """torch's own store leaves one client in fifty unanswered."""
    pair = make_pair("nccl", False)
    pair.open(key(), 0, BLOCKS)
    for _ in range(100):
        events = Events()
        sender = TorchDistributedSender(pair.here, pair.to.shard, events.put)
        sender.push(key(), pair.to, ALL, 0, BLOCKS[:1], BLOCKS[:1])
        assert events.next() == Pushed(key(), 0, 1)
        sender.shutdown()


def test_what_is_no_address_of_a_receiver_is_refused(make_pair: Any) -> None:
    pair = make_pair("nccl", False)
    for address in ("tcp://127.0.0.1:1", "/proc/1/fd/2", "tcp://127.0.0.1"):
        pair.push(key(), 0, BLOCKS, BLOCKS, KVEndpoint("nccl", address, pair.to.shard, 64))
        assert isinstance(pair.sent.next(), PushFailed)


@pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="this torch has NCCL")
def test_a_torch_without_nccl_says_so() -> None:
    with pytest.raises(ValueError, match="needs nccl, which this build of torch has not"):
        TorchDistributedSender(np.zeros((1, BLOCK), np.uint8), SHARD, print, device=torch.device("cuda"))


def test_a_group_waits_for_its_own_gpu_and_not_for_the_thread_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes two GPUs to go wrong: so here is what torch.cuda is told, and nothing behind it."""
    current, recorded = [torch.device("cuda", 0)], []

    class Event:
        def record(self) -> None:
            recorded.append(current[-1])

        def query(self) -> bool:
            return True

    class Work:
        def wait(self, _: Any) -> None:
            pass

    @contextlib.contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", device)
    group = Group.__new__(Group)
    group._device = torch.device("cuda", 1)
    group.finish(Work(), 1.0)
    assert recorded == [torch.device("cuda", 1)]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL takes one GPU a rank")
def test_nccl_moves_what_gloo_moves() -> None:
    pools = [np.random.default_rng(seed).integers(0, 256, (64, BLOCK), np.uint8) for seed in (0, 1)]
    events = Events()
    receiver = TorchDistributedReceiver(
        pools[1], "127.0.0.1", SHARD, lambda _: None, device=torch.device("cuda", 1), stalled_after=30
    )
    sender = TorchDistributedSender(pools[0], SHARD, events.put, device=torch.device("cuda", 0), stalled_after=30)
    receiver.open(key(), 0, BLOCKS, (ALL,))
    sender.push(key(), receiver.endpoint, ALL, 0, BLOCKS, BLOCKS[::-1].copy())
    assert events.next() == Pushed(key(), 0, 64)
    sender.shutdown()
    receiver.shutdown()
    np.testing.assert_array_equal(pools[1], pools[0])

"""Promise: over torch.distributed, too, a peer that dies, stands still or talks nonsense costs only its own pushes."""

import os
import signal
import socket
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from kv_transfer.core.events import Cancelled, Pushed, PushFailed
from kv_transfer.transports.torch_distributed import TorchDistributedReceiver, TorchDistributedSender
from messages.common import KVEndpoint
from tests.kv_transfer.kv_pair import ALL, Events, key, shard_of_bytes
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

"""Promise: shared KV memory goes with its processes, and nobody writes into memory that is not the pool."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.shared_memory import owner_gone
from kv_transfer.core.events import Pushed, PushFailed
from kv_transfer.transports.base import TransportError
from kv_transfer.transports.build import make_sender
from kv_transfer.transports.memory import PeerMemory, SharedMemory
from kv_transfer.transports.shm import ShmReceiver, ShmSender
from messages.common import KVEndpoint
from tests.kv_transfer.kv_pair import ALL, Events, Pair, key, scattered, shard_of_bytes

ROOT = Path(__file__).parents[2]
BLOCK = 4096
SHARD = shard_of_bytes(BLOCK)

OWNER = """
from kv_transfer.transports.memory import SharedMemory
memory = SharedMemory(8, 4096)
print(memory.address, flush=True)
input()
"""
SENDER = """
import json, sys, queue
import numpy as np
from kv_transfer.core.events import TransferKey
from kv_transfer.transports.build import allocate_pool, make_sender
from tests.kv_transfer.kv_pair import ALL, KVEndpoint, shard_of_bytes
transport, address, target, block_bytes = json.loads(sys.argv[1])
memory = allocate_pool(transport, 64, block_bytes)
memory.pool[:] = 9
events = queue.SimpleQueue()
shard = shard_of_bytes(block_bytes)
sender = make_sender(transport, memory.pool, shard, events.put)
to = KVEndpoint(transport, address, shard, 64)
blocks = np.array(target, np.int32)
while True:
    sender.push(TransferKey(f"{1:032x}", 1), to, ALL, 0, blocks, blocks)
    events.get()
    print("pushed", flush=True)
"""


def start(code: str, *arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *(json.dumps(argument) for argument in arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(10)
    assert process.stdin and process.stdout
    process.stdin.close()
    process.stdout.close()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


@pytest.mark.parametrize("transport", ["shm", "nccl", "zmq"])
def test_a_killed_sender_leaves_nothing_and_does_not_hurt_the_receiver(transport: str, make_pair: Any) -> None:
    pair: Pair = make_pair(transport, False, 64, 1 << 20)
    rows = scattered(1, 20)
    pair.open(key(), 0, rows[:10])
    pair.open(key(2), 0, rows[10:])
    killed = start(SENDER, [transport, pair.to.address, rows[:10].tolist(), 1 << 20])
    assert line_of(killed) == "pushed"
    kill(killed)  # in the middle of the next one
    assert (pair.there[rows[:10]] == 9).all()
    assert not np.delete(pair.there, rows[:10], axis=0).any()
    pair.push(key(2), 0, rows[10:], rows[10:])
    assert pair.sent.next() == Pushed(key(2), 0, 10)
    np.testing.assert_array_equal(pair.there[rows[10:]], pair.here[rows[10:]])


def test_a_push_into_the_pool_of_a_dead_process_fails() -> None:
    owner = start(OWNER)
    to = KVEndpoint("shm", line_of(owner), SHARD, 8)
    pool, events, blocks = np.ones((8, BLOCK), np.uint8), Events(), np.arange(8, dtype=np.int32)
    sender, late = ShmSender(pool, SHARD, events.put), ShmSender(pool, SHARD, events.put)
    sender.push(key(), to, ALL, 0, blocks, blocks)
    assert events.next() == Pushed(key(), 0, 8)
    kill(owner)
    for each in (sender, late):  # one has the memory mapped, one has not
        each.push(key(), to, ALL, 0, blocks, blocks)
        failed = events.next()
        assert isinstance(failed, PushFailed) and failed.key == key()
        assert not num_pidfds()  # the mapping has gone with it
    for each in (sender, late):
        each.shutdown()


def test_a_dead_peer_that_nobody_told_of_is_let_go_when_another_comes() -> None:
    """Who stood still when a peer died, and was itself taken for lost, is never told."""
    first, second = start(OWNER), start(OWNER)
    pool, events, blocks = np.ones((8, BLOCK), np.uint8), Events(), np.arange(8, dtype=np.int32)
    sender = ShmSender(pool, SHARD, events.put)
    for owner in (first, second):
        sender.push(key(), KVEndpoint("shm", line_of(owner), SHARD, 8), ALL, 0, blocks, blocks)
        assert events.next() == Pushed(key(), 0, 8)
        assert num_pidfds() == 1
        kill(owner)
    sender.shutdown()
    assert not num_pidfds()


def num_pidfds() -> int:
    """Processes that this one has mapped a pool of."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += "pidfd" in os.readlink(f"/proc/self/fd/{fd}")
    return found


def test_a_writer_that_stands_still_is_not_taken_for_gone_and_a_dead_one_is() -> None:
    owner = start(OWNER)
    address = line_of(owner)
    assert not owner_gone(address)
    os.kill(owner.pid, signal.SIGSTOP)
    assert not owner_gone(address)
    os.kill(owner.pid, signal.SIGKILL)
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
    assert owner_gone(address)  # dead, and not yet buried
    kill(owner)
    assert owner_gone(address)


def test_a_pool_that_was_released_has_no_writer_any_more_and_nonsense_proves_nothing() -> None:
    memory = SharedMemory(8, BLOCK)
    assert not owner_gone(memory.address)
    receiver = ShmReceiver(memory, SHARD)
    assert not receiver.writer_gone(KVEndpoint("zmq", "tcp://127.0.0.1:1", SHARD, 8))
    memory.release()
    assert owner_gone(memory.address)
    assert receiver.writer_gone(KVEndpoint("shm", memory.address, SHARD, 8))
    assert not owner_gone("nonsense")


def test_a_recycled_descriptor_is_noticed() -> None:
    """The address of a pool that is gone may lead to whatever its process has opened since."""
    gone, other = SharedMemory(8, BLOCK), SharedMemory(8, BLOCK)
    address = gone.address
    fd = int(address.split("#")[0].rsplit("/", 1)[1])
    gone.release()
    try:
        os.dup2(int(other.address.split("#")[0].rsplit("/", 1)[1]), fd)
        with pytest.raises(TransportError, match="is not the shared memory that it was"):
            PeerMemory(address, 8, BLOCK)
    finally:
        os.close(fd)
    other.release()


def test_only_a_pool_of_the_right_size_that_cannot_shrink_is_mapped() -> None:
    memory = SharedMemory(8, BLOCK)
    path, identity = memory.address.split("#")
    nonce = identity.split(":")[0]
    for address, num_blocks in [
        (memory.address, 9),
        (f"{path}#{nonce}:{9 * BLOCK}", 9),
        (f"{path}#{'0' * 32}:{8 * BLOCK}", 8),
        (f"/proc/1/root/etc/passwd#{nonce}:{8 * BLOCK}", 8),
        (f"/proc/{2**31}/fd/3#{nonce}:{8 * BLOCK}", 8),
        (f"/proc/{2**22 + 1}/fd/3#{nonce}:{8 * BLOCK}", 8),
        ("", 8),
    ]:
        with pytest.raises(TransportError):
            PeerMemory(address, num_blocks, BLOCK)
    with pytest.raises(PermissionError):
        os.ftruncate(int(path.rsplit("/", 1)[1]), BLOCK)
    memory.release()

    unsealed = os.memfd_create(f"baton-{nonce}", os.MFD_CLOEXEC)
    os.ftruncate(unsealed, 8 * BLOCK)
    with pytest.raises(TransportError, match="could shrink"):
        PeerMemory(f"/proc/{os.getpid()}/fd/{unsealed}#{nonce}:{8 * BLOCK}", 8, BLOCK)
    os.close(unsealed)


@pytest.mark.parametrize("transport", ["inproc", "shm"])
def test_a_pool_of_another_block_size_is_not_written_to(transport: str, make_pair: Any) -> None:
    pair: Pair = make_pair(transport, False, 64, BLOCK)
    events, blocks = Events(), np.arange(4, dtype=np.int32)
    pair.open(key(), 0, blocks)
    for block_bytes in (BLOCK // 2, 2 * BLOCK):
        sender = make_sender(transport, np.ones((64, block_bytes), np.uint8), shard_of_bytes(block_bytes), events.put)
        for num_blocks in (32, 64, 128):
            sender.push(key(), msgspec.structs.replace(pair.to, num_blocks=num_blocks), ALL, 0, blocks, blocks)
            assert isinstance(events.next(), PushFailed)
        sender.shutdown()
    assert not pair.there.any()

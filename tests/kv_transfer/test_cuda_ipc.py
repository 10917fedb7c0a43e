"""Promise: KV goes from one process's GPU memory into another's, ordered behind what computes it; a peer that dies
costs only its own pushes. Without a GPU: what is no memory of a GPU is refused, before CUDA sees it."""

import hashlib
import json
import mmap
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.device_memory import HANDLE_BYTES, DeviceMemory, PeerDeviceMemory, look_up, publish
from engine.layer_gate import LayerGate
from engine.shared_memory import Shared, SharedMemoryError, owner_gone
from kv_transfer.core.events import Cancelled, Pushed, PushFailed
from kv_transfer.core.lanes import Heads, Layers, layout_of
from kv_transfer.transports.cuda_ipc import CudaIpcReceiver, CudaIpcSender, CudaMemory
from kv_transfer.transports.records import LaneCopy
from messages.common import KVEndpoint, KVShard
from tests.kv_transfer.kv_pair import ALL, Events, key, scattered, shard_of_bytes
from tests.kv_transfer.test_shared_memory import kill, line_of, num_pidfds, start

BLOCK, NUM_BLOCKS = 256 << 10, 64
SHARD = shard_of_bytes(BLOCK)
BLOCKS = np.arange(NUM_BLOCKS, dtype=np.int32)
HANDLE = bytes(range(HANDLE_BYTES))
RECEIVER = """
import hashlib, json, sys
import torch
from kv_transfer.transports.cuda_ipc import CudaMemory
num_blocks, block_bytes = json.loads(sys.argv[1])
memory = CudaMemory(num_blocks, block_bytes, torch.device("cuda", 0))
print(memory.address, flush=True)
for line in sys.stdin:
    print(hashlib.sha256(memory.pool.cpu().numpy().tobytes()).hexdigest(), flush=True)
memory.release()
"""
SENDER = """
import json, sys, queue
import numpy as np
import torch
from kv_transfer.core.events import TransferKey
from kv_transfer.transports.cuda_ipc import CudaIpcSender, CudaMemory
from messages.common import KVEndpoint
from tests.kv_transfer.kv_pair import ALL, shard_of_bytes
address, num_blocks, block_bytes, target = json.loads(sys.argv[1])
memory = CudaMemory(num_blocks, block_bytes, torch.device("cuda", 0))
memory.pool.fill_(9)
shard, events, blocks = shard_of_bytes(block_bytes), queue.SimpleQueue(), np.array(target, np.int32)
sender = CudaIpcSender(memory.pool, shard, events.put)
print(memory.address, flush=True)
while True:
    to = KVEndpoint("cuda_ipc", address, shard, num_blocks)
    sender.push(TransferKey(f"{1:032x}", 1), to, ALL, 0, blocks, blocks)
    print(type(events.get()).__name__, flush=True)
"""


def test_a_page_tells_of_the_memory_and_of_its_owner() -> None:
    page = publish(HANDLE, 8 * BLOCK)
    handle, process = look_up(page.address, 8 * BLOCK)
    os.close(process)
    assert handle == HANDLE
    assert not owner_gone(page.address)
    page.close()
    assert owner_gone(page.address)
    with pytest.raises(SharedMemoryError):
        look_up(page.address, 8 * BLOCK)


def test_what_is_no_memory_of_a_gpu_or_of_another_size_is_refused() -> None:
    page, other = publish(HANDLE, 8 * BLOCK), Shared(mmap.PAGESIZE)
    pool = Shared(8 * BLOCK)
    refusals = [
        (page.address, 9 * BLOCK, "is 2097152 bytes, not 2359296"),
        (other.address, 8 * BLOCK, "is none of a GPU"),
        (pool.address, 8 * BLOCK, "is not 4096 bytes"),
        (HANDLE.hex(), 8 * BLOCK, "is no address of shared memory"),
        ("", 8 * BLOCK, "is no address of shared memory"),
    ]
    for address, size, why in refusals:
        with pytest.raises(SharedMemoryError, match=why):
            look_up(address, size)
    assert not num_pidfds()
    for each in (page, other, pool):
        each.close()


def test_a_pool_in_host_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a pool on a GPU, not on cpu"):
        CudaIpcSender(torch.zeros((1, BLOCK), dtype=torch.uint8), SHARD, print)
    with pytest.raises(SharedMemoryError, match="cpu is no GPU of CUDA"):
        DeviceMemory(BLOCK, torch.device("cpu"))
    with pytest.raises(ValueError, match="needs blocks: 0 of"):
        CudaMemory(0, BLOCK, torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_where_there_is_no_gpu_it_is_said() -> None:
    page = publish(HANDLE, BLOCK)
    with pytest.raises(SharedMemoryError, match="torch sees no GPU here"):
        CudaMemory(1, BLOCK, torch.device("cuda"))
    with pytest.raises(SharedMemoryError, match="torch sees no GPU here"):
        PeerDeviceMemory(page.address, BLOCK, torch.device("cuda", 0))
    assert not num_pidfds()
    page.close()


# On a GPU: two processes, one card.

on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
gpu = pytest.mark.parametrize("_", [pytest.param(None, marks=on_a_gpu, id="gpu")])


class Peer:
    """Another process with a pool on the same GPU."""

    def __init__(self, shard: KVShard = SHARD, num_blocks: int = NUM_BLOCKS) -> None:
        self.process = start(RECEIVER, [num_blocks, layout_of(shard).block_bytes])
        self.to = KVEndpoint("cuda_ipc", line_of(self.process), shard, num_blocks)

    def holds(self, pool: Any) -> bool:
        """Whether its pool has these bytes."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return line_of(self.process) == hashlib.sha256(pool.tobytes()).hexdigest()


def random_pool(shard: KVShard = SHARD, num_blocks: int = NUM_BLOCKS) -> Any:
    return np.random.default_rng(0).integers(0, 256, (num_blocks, layout_of(shard).block_bytes), np.uint8)


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    kill(peer.process)


@gpu
def test_scattered_blocks_arrive_and_nothing_else_is_written(_: None, peer: Peer) -> None:
    here, events = random_pool(), Events()
    source, target = scattered(1, 40, NUM_BLOCKS), scattered(2, 40, NUM_BLOCKS)
    sender = CudaIpcSender(torch.from_numpy(here).cuda(), SHARD, events.put)
    sender.push(key(), peer.to, ALL, 0, source[:30], target[:30])
    sender.push(key(), peer.to, ALL, 30, source[30:], target[30:])
    sender.push(key(), peer.to, ALL, 40, source[:0], target[:0])
    assert [events.next() for _ in range(3)] == [Pushed(key(), 0, 30), Pushed(key(), 30, 10), Pushed(key(), 40, 0)]
    there = np.zeros_like(here)
    there[target] = here[source]
    assert peer.holds(there)
    sender.forget(peer.to)
    sender.push(key(), peer.to, ALL, 0, source, target)  # opened again
    assert events.next() == Pushed(key(), 0, 40)
    sender.shutdown()
    assert not num_pidfds()


@gpu
@pytest.mark.parametrize("target_dtype", ["bfloat16", "float16", "int8", "fp8"])
def test_heads_and_layers_land_where_the_host_would_put_them(_: None, target_dtype: str) -> None:
    shard = KVShard(3, 64, 16, "bfloat16", 4, 0, 4)
    into = KVShard(3, 64, 16, target_dtype, 4, 1, 2)  # type: ignore[arg-type]
    values = torch.randn((16, layout_of(shard).block_bytes // 2), generator=torch.Generator().manual_seed(1))
    values += values.sign() / 100  # none of which fp8 makes a zero, whose sign may differ
    here = values.to(torch.bfloat16).view(torch.uint8)
    there = np.zeros((16, layout_of(into).block_bytes), np.uint8)
    source, target, heads = scattered(1, 9, 16), scattered(2, 9, 16), Heads(1, 2)
    LaneCopy(here.numpy(), shard, into, heads).write(there, target, source)
    peer, events, gate = Peer(into, 16), Events(), LayerGate(3)
    sender = CudaIpcSender(here.cuda(), shard, events.put)
    sender.push(key(), peer.to, heads, 0, source, target, gate.upcoming)
    with gate.step() as layers:
        layers.advance(2)
        torch.cuda.synchronize()
    assert events.next() == Pushed(key(), 0, 9)
    assert peer.holds(there)
    sender.shutdown()
    kill(peer.process)


@gpu
def test_a_copy_waits_for_what_computes_the_blocks(_: None, peer: Peer) -> None:
    pool, events = torch.zeros((NUM_BLOCKS, BLOCK), dtype=torch.uint8, device="cuda"), Events()
    sender = CudaIpcSender(pool, SHARD, events.put)
    sender.push(key(), peer.to, ALL, 0, BLOCKS[:1], BLOCKS[:1])  # what is compiled once
    assert events.next() == Pushed(key(), 0, 1)
    for value in range(1, 6):
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        pool.fill_(value)
        sender.push(key(), peer.to, ALL, 0, BLOCKS, BLOCKS)
        assert events.next() == Pushed(key(), 0, NUM_BLOCKS)
        assert peer.holds(np.full((NUM_BLOCKS, BLOCK), value, np.uint8))
    sender.shutdown()


@gpu
def test_a_live_push_takes_no_layer_before_it_is_there_and_fails_with_its_step(_: None) -> None:
    shard = KVShard(4, 64, 16, "float16", 2, 0, 2)
    here, peer, events, gate = random_pool(shard), Peer(shard), Events(), LayerGate(4)
    pool = torch.zeros(here.shape, dtype=torch.uint8, device="cuda")
    sender = CudaIpcSender(pool, shard, events.put)
    layer_bytes = layout_of(shard).layer_bytes
    sender.push(key(), peer.to, Heads(0, 2), 0, BLOCKS, BLOCKS, gate.upcoming)
    with gate.step() as layers:
        for layer in range(4):
            part = Layers(layer * layer_bytes, (layer + 1) * layer_bytes)
            pool[:, slice(*part)] = torch.from_numpy(here[:, slice(*part)]).cuda()
            torch.cuda.synchronize()
            layers.advance(layer + 1)
    pushed = events.next()
    assert pushed == Pushed(key(), 0, NUM_BLOCKS) and pushed.num_bytes == here.nbytes
    assert peer.holds(here)
    sender.push(key(2), peer.to, Heads(0, 2), 0, BLOCKS, BLOCKS, gate.upcoming)
    with pytest.raises(RuntimeError, match="in the middle"), gate.step():
        raise RuntimeError("in the middle")
    assert isinstance(events.next(), PushFailed)
    assert peer.holds(here)
    sender.shutdown()
    kill(peer.process)


@gpu
def test_a_cancel_is_answered_once_and_nothing_is_written_after_it(_: None) -> None:
    shard, events = shard_of_bytes(1 << 20), Events()
    peer = Peer(shard)
    pool = torch.full((NUM_BLOCKS, 1 << 20), 3, dtype=torch.uint8, device="cuda")
    sender = CudaIpcSender(pool, shard, events.put)
    for _again in range(200):
        sender.push(key(), peer.to, ALL, 0, BLOCKS, BLOCKS)
    sender.cancel(key())
    events.until(Cancelled)
    pool.fill_(4)  # the blocks are the caller's again
    torch.cuda.synchronize()
    sender.cancel(key(2))
    assert events.next() == Cancelled(key(2))
    assert any(peer.holds(np.full((NUM_BLOCKS, 1 << 20), value, np.uint8)) for value in (3, 0))
    sender.shutdown()
    kill(peer.process)


@gpu
def test_a_receiver_that_dies_fails_what_goes_there_and_nothing_else(_: None, peer: Peer) -> None:
    here, events, other = random_pool(), Events(), Peer()
    sender = CudaIpcSender(torch.from_numpy(here).cuda(), SHARD, events.put)
    for to in (peer.to, other.to):
        sender.push(key(), to, ALL, 0, BLOCKS, BLOCKS)
        assert events.next() == Pushed(key(), 0, NUM_BLOCKS)
    for _again in range(200):
        sender.push(key(1), other.to, ALL, 0, BLOCKS, BLOCKS)
    kill(other.process)  # in the middle of them
    heard = [events.next() for _again in range(200)]
    assert isinstance(heard[-1], PushFailed) and {event.key for event in heard} == {key(1)}
    sender.push(key(2), other.to, ALL, 0, BLOCKS, BLOCKS)  # one that has to open it first
    assert isinstance(events.next(), PushFailed)
    sender.push(key(3), peer.to, ALL, 0, BLOCKS, BLOCKS[::-1].copy())
    assert events.next() == Pushed(key(3), 0, NUM_BLOCKS)
    assert peer.holds(here[::-1])
    sender.shutdown()
    assert not num_pidfds()


@gpu
def test_a_sender_that_is_killed_or_stopped_writes_nowhere_else_and_is_known_to_be_gone(_: None) -> None:
    memory = CudaMemory(NUM_BLOCKS, BLOCK, torch.device("cuda"))
    receiver = CudaIpcReceiver(memory, SHARD)
    rows = scattered(1, 20, NUM_BLOCKS)
    writer: subprocess.Popen[str] = start(SENDER, [receiver.endpoint.address, NUM_BLOCKS, BLOCK, rows.tolist()])
    address = line_of(writer)
    assert line_of(writer) == "Pushed"
    of = KVEndpoint("cuda_ipc", address, SHARD, NUM_BLOCKS)
    os.kill(writer.pid, signal.SIGSTOP)
    assert not receiver.writer_gone(of)
    kill(writer)
    assert receiver.writer_gone(of)
    there = memory.pool.cpu().numpy()
    assert (there[rows] == 9).all() and not np.delete(there, rows, axis=0).any()
    memory.release()


@gpu
def test_what_is_no_pool_of_a_gpu_fails_the_push_and_the_next_goes_through(_: None, peer: Peer) -> None:
    events, page = Events(), publish(HANDLE, NUM_BLOCKS * BLOCK)  # a handle that CUDA does not know
    own = CudaMemory(NUM_BLOCKS, BLOCK, torch.device("cuda"))
    sender = CudaIpcSender(own.pool, SHARD, events.put)
    for address in (page.address, own.address, json.dumps("nowhere"), str(Path("/proc/self/fd/0"))):
        sender.push(key(), KVEndpoint("cuda_ipc", address, SHARD, NUM_BLOCKS), ALL, 0, BLOCKS, BLOCKS)
        assert isinstance(events.next(), PushFailed)
    for source, target in ((BLOCKS, BLOCKS + 1), (BLOCKS - 1, BLOCKS), (BLOCKS, BLOCKS[:1])):
        sender.push(key(), peer.to, ALL, 0, source, target)
        assert isinstance(events.next(), PushFailed)
    sender.push(key(), peer.to, ALL, 0, BLOCKS, BLOCKS)
    assert events.next() == Pushed(key(), 0, NUM_BLOCKS)
    assert num_pidfds() == 1
    sender.shutdown()
    page.close()
    own.release()

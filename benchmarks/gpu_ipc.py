"""``cuda_ipc`` between two processes on one card: what arrives is compared, then timed, by ``benchmarks/gpu.py``.

Blocks of Llama 3.1 8B's shape in bf16, 2 MiB each, from and to scattered places. A push is timed from the call to its
``Pushed``: threads, events and the launch included.
"""

import hashlib
import json
import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_checks import Check
from benchmarks.gpu_rates import Rate
from kv_transfer.core.events import Pushed, TransferKey, TransportEvent
from kv_transfer.core.lanes import Heads, layout_of
from kv_transfer.transports.cuda_ipc import CudaIpcSender, CudaMemory
from messages.common import KVEndpoint, KVShard
from messages.ids import Attempt, RequestId

SHARD = KVShard(32, 128, 16, "bfloat16", 8, 0, 8)
NUM_BLOCKS, ROUNDS, WAIT = 512, 15, 60.0
KEY = TransferKey(RequestId("0" * 32), Attempt(1))
ALL, HALF = Heads(0, 8), Heads(2, 4)


def measure() -> tuple[Check, list[Rate]]:
    """Whether all blocks arrive as they were, and the times of pushes: bytes read and written, as of a copy."""
    block_bytes = layout_of(SHARD).block_bytes
    memory = torch.randint(0, 256, (NUM_BLOCKS, block_bytes), dtype=torch.uint8, device="cuda")
    source, target = (np.random.default_rng(seed).permutation(NUM_BLOCKS).astype(np.int32) for seed in (1, 2))
    events: queue.SimpleQueue[TransportEvent] = queue.SimpleQueue()
    sender = CudaIpcSender(memory, SHARD, events.put)
    with _receiver(block_bytes) as (child, address):
        to = KVEndpoint("cuda_ipc", address, SHARD, NUM_BLOCKS)

        def push(heads: Heads, count: int) -> float:
            begun = time.perf_counter()
            sender.push(KEY, to, heads, 0, source[:count], target[:count])
            event = events.get(timeout=WAIT)
            taken = time.perf_counter() - begun
            if event != Pushed(KEY, 0, count):
                raise RuntimeError(f"a push over cuda_ipc came to {event}")
            return taken

        push(ALL, NUM_BLOCKS)
        there = torch.empty_like(memory)
        there[torch.from_numpy(target).long()] = memory[torch.from_numpy(source).long()]
        same = _asked(child) == _digest(there)
        rates = []
        for name, heads, count in (
            (f"cuda_ipc of {NUM_BLOCKS} blocks", ALL, NUM_BLOCKS),
            (f"cuda_ipc of half the heads of {NUM_BLOCKS} blocks", HALF, NUM_BLOCKS),
            ("cuda_ipc of one block", ALL, 1),
        ):
            push(heads, count)
            taken = statistics.median(push(heads, count) for _ in range(ROUNDS))
            rates.append(Rate(name, taken, bytes=2 * count * layout_of(SHARD, heads).block_bytes))
        sender.shutdown()
    return Check("blocks pushed over cuda_ipc", 0.0 if same else 1.0, 0.0), rates


@contextmanager
def _receiver(block_bytes: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process with a pool on this GPU -> it, and the pool's address."""
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_ipc", json.dumps([NUM_BLOCKS, block_bytes])],
        cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:  # at whose end its input is closed, which ends it
        assert child.stdout
        yield child, child.stdout.readline().strip()


def _asked(child: "subprocess.Popen[str]") -> str:
    assert child.stdin and child.stdout
    child.stdin.write("\n")
    child.stdin.flush()
    return child.stdout.readline().strip()


def _digest(pool: torch.Tensor) -> str:
    return hashlib.sha256(pool.cpu().numpy()).hexdigest()


def _receive(num_blocks: int, block_bytes: int) -> None:
    """Says where its pool is; then, for each line, what is in it."""
    memory = CudaMemory(num_blocks, block_bytes, torch.device("cuda"))
    print(memory.address, flush=True)
    for _ in sys.stdin:
        print(_digest(memory.pool), flush=True)
    memory.release()


if __name__ == "__main__":
    _receive(*json.loads(sys.argv[1]))

"""KV blocks from one process's pool into another's: GB/s, and the latency of one block; a JSON line each.

    python benchmarks/kv_transfer.py [--transport shm] [--mib 64 256] [--repeat 9] [--into int8] [--heads 4]

Blocks of 2 MiB (16 tokens, 32 layers, 8 KV heads, head size 128, bf16), scattered at both ends. A push is timed from
the call to ``Pushed``, which over zmq comes when the receiver has written the blocks. Beside it stands one memcpy of as
many bytes, between two arrays of the sender, timed in turn with the pushes. Figures are medians; what has arrived is
compared by digest.

``--heads 4`` is a lane: the receiver is the first of two ranks, and has half of the heads. ``--into int8`` has the
sender convert. Sizes and GB/s are then still the sender's bytes of those heads; ``wire_mib`` is what has left it.
"""

import argparse
import json
import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# This file must not stand in for the package of the same name.
sys.path[0] = str(Path(__file__).parents[1])

import numpy as np  # noqa: E402

from engine.core.kv_layout import KVLayout  # noqa: E402
from kv_transfer.core.events import Blocks, Pool, Pushed, TransferKey  # noqa: E402
from kv_transfer.core.fanout import DigestLane  # noqa: E402
from kv_transfer.core.lanes import heads_of, layout_of, shard_of  # noqa: E402
from kv_transfer.transports.build import allocate_pool, make_receiver, make_sender  # noqa: E402
from kv_transfer.transports.memory import Mapped  # noqa: E402
from messages.common import KVEndpoint, KVShard  # noqa: E402
from messages.ids import Attempt, RequestId  # noqa: E402
from runtime.kv_port import LaneHasher  # noqa: E402

LAYOUT = KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
SHARD = shard_of(LAYOUT, LAYOUT.num_kv_heads)
NUM_BLOCKS = 192
DTYPES = ["float32", "bfloat16", "float16", "int8", "fp8"]
KEY = TransferKey(RequestId("b" * 32), Attempt(1))


def allocate(transport: str, block_bytes: int = LAYOUT.block_bytes) -> Mapped:
    memory = allocate_pool(transport, NUM_BLOCKS, block_bytes)
    assert isinstance(memory, Mapped)
    memory.wait_until_touched()
    return memory


def scattered(seed: int) -> Any:
    return np.random.default_rng(seed).permutation(NUM_BLOCKS).astype(np.int32)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def send(transport: str, address: str, sizes: list[int], repeat: int, into: str, heads: int) -> None:
    """The sender's process: print a line for each size in MiB, then the digests of what it has sent."""
    memory = allocate(transport)
    words = memory.pool.view(np.uint64)
    words[:] = np.arange(words.size, dtype=np.uint64).reshape(words.shape) * np.uint64(0x9E3779B97F4A7C15)
    memory.pool.view(np.uint16)[:] &= 0xBFFF  # bfloat16s below 2: all are numbers
    copy = np.zeros((max(sizes) << 20) // LAYOUT.block_bytes * LAYOUT.block_bytes, np.uint8)
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    sender = make_sender(transport, memory.pool, SHARD, events.put)
    target_shard = receiving(into, heads)
    to = KVEndpoint(transport, address, target_shard, NUM_BLOCKS)
    source, target = scattered(1), scattered(2)

    def push(count: int) -> int:
        sender.push(KEY, to, heads_of(target_shard), 0, source[:count], target[:count])
        event = events.get(timeout=60)
        if event != Pushed(KEY, 0, count):
            raise RuntimeError(str(event))
        num_bytes: int = event.num_bytes
        return num_bytes

    push(NUM_BLOCKS)  # the first touch of the peer's pages, connections
    for mib in sizes:
        count = (mib << 20) // LAYOUT.block_bytes
        size = count * LAYOUT.block_bytes * heads // LAYOUT.num_kv_heads
        flat = memory.pool.reshape(-1)[:size]
        pushes, copies = [], []
        for _ in range(repeat):
            copies.append(timed(lambda: np.copyto(copy[:size], flat)))  # noqa: B023
            pushes.append(timed(lambda: push(count)))  # noqa: B023
        pushed, copied = size / statistics.median(pushes) / 1e9, size / statistics.median(copies) / 1e9
        line = {
            "transport": transport, "mib": mib, "gb_s": round(pushed, 2),
            "best_gb_s": round(size / min(pushes) / 1e9, 2),
            "memcpy_gb_s": round(copied, 2), "of_memcpy": round(pushed / copied, 2),
            "into": into, "heads": heads, "wire_mib": round(push(count) / 2**20, 1),
        }  # fmt: skip
        print(json.dumps(line), flush=True)
    latencies = sorted(timed(lambda: push(1)) for _ in range(20 * repeat))
    p50, p99 = (round(latencies[int(len(latencies) * share)] * 1e6) for share in (0.5, 0.99))
    print(json.dumps({"transport": transport, "one_block_us": p50, "p99_us": p99}), flush=True)
    taken: list[bytes] = []
    seconds = timed(lambda: taken.append(lane_digests(memory.pool, SHARD, target_shard, source)))
    line = {
        "transport": transport,
        "digest_gb_s": round(memory.pool.nbytes * heads / LAYOUT.num_kv_heads / seconds / 1e9, 2),
        "digests": taken[0].hex(),
    }
    print(json.dumps(line), flush=True)
    sender.shutdown()


def receiving(dtype: str, heads: int) -> KVShard:
    """The receiver's shard: the first ``heads`` heads."""
    layout = KVLayout(LAYOUT.num_layers, heads, LAYOUT.head_dim, LAYOUT.block_size, dtype)
    return shard_of(layout, LAYOUT.num_kv_heads)


def lane_digests(pool: Pool, own: KVShard, target: KVShard, blocks: Blocks) -> bytes:
    """As a worker's hasher takes them."""
    return LaneHasher(pool, own).digests(DigestLane(KEY, 0, target, heads_of(target), 0, blocks))


def measure(transport: str, sizes: list[int], repeat: int, into: str, heads: int) -> None:
    """The receiver's process."""
    shard = receiving(into, heads)
    memory = allocate(transport, layout_of(shard).block_bytes)
    receiver = make_receiver(transport, "127.0.0.1", memory, shard, lambda _: None)
    receiver.open(KEY, 0, scattered(2), (heads_of(shard),))
    task = json.dumps([transport, receiver.endpoint.address, sizes, repeat, into, heads])
    with subprocess.Popen([sys.executable, __file__, "--send", task], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            figures = json.loads(line)
            if (sent := figures.pop("digests", None)) is not None:
                figures["arrived_whole"] = sent == lane_digests(memory.pool, shard, shard, scattered(2)).hex()
            print(json.dumps(figures), flush=True)
    if process.returncode:
        sys.exit(f"the sender of {transport} failed")
    receiver.shutdown()
    memory.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", nargs="+", default=["shm", "zmq"], choices=["shm", "zmq"])
    parser.add_argument("--mib", nargs="+", type=int, default=[64, 256], help="bytes of a sequence's KV")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--into", default="bfloat16", help="dtype of the receiver's KV", choices=DTYPES)
    parser.add_argument("--heads", type=int, default=LAYOUT.num_kv_heads, help="KV heads of the receiver")
    parser.add_argument("--send", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.send is not None:
        send(*json.loads(arguments.send))
        return
    if not all(2 <= mib <= NUM_BLOCKS * LAYOUT.block_bytes >> 20 for mib in arguments.mib):
        parser.error(f"--mib must be 2 to {NUM_BLOCKS * LAYOUT.block_bytes >> 20}")
    if not 1 <= arguments.heads <= LAYOUT.num_kv_heads:
        parser.error(f"--heads must be 1 to {LAYOUT.num_kv_heads}")
    for transport in arguments.transport:
        measure(transport, arguments.mib, arguments.repeat, arguments.into, arguments.heads)


if __name__ == "__main__":
    main()

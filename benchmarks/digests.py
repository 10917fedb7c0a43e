"""What the digests of a hand-over cost beside the prefill of its prompt; a JSON line a prompt length.

    python benchmarks/engine.py --make 135m DIR
    python benchmarks/digests.py --model DIR [--lengths 128 512 1024 2048] [--threads 2] [--repeat 5]

Prefill is the engine's time to the first token. A digest is taken twice of each block, in a thread beside the step
loop: by prefill chunk by chunk, by decode at the end. ``both`` counts all of that against the time to first token; what
can delay a token is ``decode`` and prefill's last chunk. Minima, in turns, for the machine may be busy.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

# This file must not stand in for a package.
sys.path[0] = str(Path(__file__).parents[1])

import numpy as np  # noqa: E402

from benchmarks.engine import Bench  # noqa: E402
from engine.runner import kv_layout  # noqa: E402
from kv_transfer.core.events import TransferKey  # noqa: E402
from kv_transfer.core.fanout import DigestLane  # noqa: E402
from kv_transfer.core.lanes import heads_of, shard_of  # noqa: E402
from messages.ids import Attempt, RequestId  # noqa: E402
from runtime.kv_port import LaneHasher  # noqa: E402

BLOCK_SIZE = 16
KEY = TransferKey(RequestId("d" * 32), Attempt(1))


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json and safetensors")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024, 2048], metavar="TOKENS")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    bench = Bench(options.model, options.dtype, options.threads)
    layout = kv_layout(bench.engine.runner.config, options.dtype, BLOCK_SIZE)
    shard = shard_of(layout, layout.num_kv_heads)
    num_blocks = -(-max(options.lengths) // BLOCK_SIZE)
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 256, (2 * num_blocks, layout.block_bytes), np.uint8)
    hasher = LaneHasher(pool, shard)
    bench.prefill(max(options.lengths))  # compiles, and touches all memory
    for length in options.lengths:
        count = -(-length // BLOCK_SIZE)
        prefill, digests = [], []
        for _ in range(options.repeat):
            prefill.append(length / bench.prefill(length))
            blocks = rng.permutation(len(pool))[:count].astype(np.int32)
            wanted = DigestLane(KEY, 0, shard, heads_of(shard), 0, blocks)
            digests.append(timed(lambda: hasher.digests(wanted)))  # noqa: B023
        figures = {
            "prompt_tokens": length,
            "kv_mib": round(count * layout.block_bytes / 2**20, 1),
            "prefill_ms": round(min(prefill) * 1e3, 1),
            "digest_ms": round(min(digests) * 1e3, 2),
            "gb_per_s": round(count * layout.block_bytes / min(digests) / 1e9, 1),
            "decode_percent": round(100 * min(digests) / min(prefill), 2),
            "both_percent": round(200 * min(digests) / min(prefill), 2),
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()

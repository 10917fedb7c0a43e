"""One end of another library's transfers, for ``benchmarks/kv_transfer.py --peer``: run by the Python that has it.

    PYTHON benchmarks/kv_peers.py nixl|mooncake num_blocks block_bytes

It starts its other end, prints the ways that it knows, and then answers each line ``[way, target blocks, source
blocks]`` with ``[seconds, CPU seconds of both ends]``, until its input ends. A transfer is timed from the call, with
block numbers that are new to the library, until the library says that it is done. Needs numpy and the library only.
"""

import base64
import hashlib
import json
import mmap
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np


def pool(num_blocks: int, block_bytes: int) -> Any:
    mapping = mmap.mmap(-1, num_blocks * block_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    made = np.frombuffer(mapping, np.uint8).reshape(num_blocks, block_bytes)
    made[:] = 1  # the first touch
    return made


class Nixl:
    """UCX chooses how, among what ``UCX_TLS`` leaves it; the target's progress thread does its part."""

    ways = ("write", "read")

    def __init__(self, rows: Any, name: str) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        self.agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
        size, start = rows.shape[1], rows.ctypes.data
        self.registered = self.agent.register_memory([(start, rows.nbytes, 0, "")], "DRAM")
        starts = start + np.arange(len(rows), dtype=np.uint64) * np.uint64(size)
        self.blocks = np.stack([starts, np.full_like(starts, size), np.zeros_like(starts)], axis=1)

    def address(self) -> Any:
        return base64.b64encode(self.agent.get_agent_metadata()).decode()

    def connect(self, address: Any, there: int) -> None:
        self.peer = self.agent.add_remote_agent(base64.b64decode(address))
        if isinstance(self.peer, bytes):
            self.peer = self.peer.decode()
        away = self.blocks.copy()
        away[:, 0] += np.uint64(there) - self.blocks[0, 0]
        self.here = self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", self.blocks, "DRAM")
        self.there = self.agent.prep_xfer_dlist(self.peer, away, "DRAM")

    def transfer(self, way: str, target: list[int], source: list[int]) -> None:
        handle = self.agent.make_prepped_xfer(
            way.upper(), self.here, np.array(source, np.int32), self.there, np.array(target, np.int32)
        )
        state = self.agent.transfer(handle)
        while state == "PROC":
            os.sched_yield()
            state = self.agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"nixl: {state}")
        self.agent.release_xfer_handle(handle)


class Mooncake:
    """The transfer engine over TCP, without a metadata server."""

    ways = ("write",)

    def __init__(self, rows: Any, name: str) -> None:
        os.environ.setdefault("GLOG_minloglevel", "2")
        from mooncake.engine import TransferEngine

        self.engine = TransferEngine()
        self.start, self.size = rows.ctypes.data, rows.shape[1]
        if self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
            raise RuntimeError("mooncake does not start")
        if self.engine.register_memory(self.start, rows.nbytes):
            raise RuntimeError("mooncake does not register the pool")

    def address(self) -> Any:
        return f"127.0.0.1:{self.engine.get_rpc_port()}"

    def connect(self, address: Any, there: int) -> None:
        self.peer, self.there = address, there

    def transfer(self, way: str, target: list[int], source: list[int]) -> None:
        failed = self.engine.batch_transfer_sync_write(
            self.peer,
            [self.start + block * self.size for block in source],
            [self.there + block * self.size for block in target],
            [self.size] * len(source),
        )
        if failed:
            raise RuntimeError(f"mooncake: {failed}")


PEERS = {"nixl": Nixl, "mooncake": Mooncake}


def say(value: Any) -> None:
    # Libraries write to standard output too.
    print("=" + json.dumps(value), flush=True)


def heard(stream: Any) -> Any:
    for line in stream:
        if line.startswith("="):
            return json.loads(line[1:])
    raise EOFError("the other end has gone")


def digest(rows: Any, blocks: list[int]) -> str:
    made = hashlib.blake2b()
    for block in blocks:
        made.update(rows[block])
    return made.hexdigest()


def hold(peer: str, num_blocks: int, block_bytes: int) -> None:
    """The other end: its pool is written to, or read."""
    rows = pool(num_blocks, block_bytes)
    end = PEERS[peer](rows, "target")
    say([end.address(), rows.ctypes.data])
    for line in sys.stdin:
        blocks = json.loads(line)
        say([digest(rows, blocks), time.process_time()])


def drive(peer: str, num_blocks: int, block_bytes: int) -> None:
    rows = pool(num_blocks, block_bytes)
    rows.view(np.uint64)[:] = np.random.default_rng(0).integers(1 << 60, size=rows.view(np.uint64).shape)
    command = [sys.executable, __file__, "--hold", peer, str(num_blocks), str(block_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None

        def away(blocks: list[int]) -> Any:
            print(json.dumps(blocks), file=other.stdin, flush=True)
            return heard(other.stdout)

        end = PEERS[peer](rows, "driver")
        end.connect(*heard(other.stdout))
        some = list(range(min(8, num_blocks)))
        end.transfer("write", some, some[::-1])
        if away(some)[0] != digest(rows, some[::-1]):
            raise RuntimeError(f"{peer} has moved something else")
        say([f"{peer} {way}" for way in end.ways])
        for line in sys.stdin:
            way, target, source = json.loads(line)
            busy = away([])[1] + time.process_time()
            start = time.perf_counter()
            end.transfer(way.split()[-1], target, source)
            seconds = time.perf_counter() - start
            say([seconds, away([])[1] + time.process_time() - busy])
        other.stdin.close()
        other.wait(30)
    os._exit(0)  # what their threads do at the end is not ours to wait for


if __name__ == "__main__":
    held = sys.argv[1] == "--hold"
    name, blocks, size = sys.argv[2:] if held else sys.argv[1:]
    (hold if held else drive)(name, int(blocks), int(size))

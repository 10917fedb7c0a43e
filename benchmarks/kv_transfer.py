"""KV blocks from one process's pool into another's, beside the limits and other libraries; JSON lines, then a table.

    python benchmarks/kv_transfer.py [--way shm zmq] [--mib 64 256 1024] [--block-kib 2048 32] [--repeat 9]
        [--peer PYTHON nixl] [--peer PYTHON mooncake] [--into int8] [--heads 4]

Ways take turns, in one run, with blocks scattered at both ends:

- ``memcpy``: one copy of as many bytes between two arrays of the sender, the limit on a host;
- ``tcp``: ``sendmsg`` of views of the pool over loopback, ``recvmsg_into`` the other pool, the limit between hosts;
- ``shm`` and ``zmq``: our transports, from ``push`` to ``Pushed`` (over zmq that is when the receiver has written the
  blocks), while another thread takes the sender's digests, as in a worker: the later of both counts. ``verified``
  adds what the receiver does then in a worker: hash what stands in its pool. Every transfer is verified, and blocks
  change from one to the next;
- ``zmq+curve``: the same, encrypted, as between hosts;
- ``--peer``: libraries of another Python, see ``kv_peers.py``, without digests, and stopped while it is not their turn;
  ``--peer-env UCX_TLS=tcp`` is for them.

Blocks of 2 MiB (16 tokens, 32 layers, 8 KV heads, head size 128, bf16), or of ``--block-kib`` 32, as where each layer
has a tensor for K and one for V. Figures are medians and bests; CPU is of both ends, in seconds a GB, and says more
than the rate where the machine has other work. ``one block`` is the latency of one, without digests.

``--heads 4`` is a lane: the receiver is the first of two ranks, and has half of the heads. ``--into int8`` has the
sender convert. Sizes and GB/s are then still the sender's bytes of those heads.
"""

import argparse
import json
import os
import queue
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# This file must not stand in for the package of the same name.
sys.path[0] = str(Path(__file__).parents[1])

import numpy as np  # noqa: E402

from engine.core.kv_layout import KVLayout  # noqa: E402
from kv_transfer.core.events import Blocks, Pushed, TransferKey  # noqa: E402
from kv_transfer.core.fanout import DigestLane  # noqa: E402
from kv_transfer.core.lanes import heads_of, layout_of, shard_of  # noqa: E402
from kv_transfer.curve import CurveKeys  # noqa: E402
from kv_transfer.transports.build import allocate_pool, make_receiver, make_sender  # noqa: E402
from kv_transfer.transports.memory import Mapped  # noqa: E402
from messages.common import KVEndpoint, KVShard  # noqa: E402
from messages.ids import Attempt, RequestId  # noqa: E402
from runtime.kv_port import LaneHasher  # noqa: E402

CURVE = "zmq+curve"
OURS = ("shm", "zmq", CURVE, "nccl")
DTYPES = ["float32", "bfloat16", "float16", "int8", "fp8"]
KEY = TransferKey(RequestId("b" * 32), Attempt(1))
LATENCIES = 20
"""Of one block, for each repetition."""
IOV_BYTES = 8 << 20
"""Handed to the kernel in one call."""


class Task(NamedTuple):
    """What both ends of ours have to know."""

    block_kib: int
    num_blocks: int
    into: str
    heads: int

    def shard(self, receiver: bool) -> KVShard:
        layers, tokens = (32, 16) if self.block_kib == 2048 else (1, self.block_kib // 4)
        heads, dtype = (self.heads, self.into) if receiver else (8, "bfloat16")
        return shard_of(KVLayout(layers, heads, 128, tokens, dtype), 8)

    def allocate(self, receiver: bool) -> Mapped:
        memory = allocate_pool("shm", self.num_blocks, layout_of(self.shard(receiver)).block_bytes)
        assert isinstance(memory, Mapped)
        memory.wait_until_touched()
        return memory


def blocks_of(seed: int, num_blocks: int, count: int) -> Any:
    return np.random.default_rng(seed).permutation(num_blocks)[:count].astype(np.int32)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def kind(way: str) -> str:
    """The transport's name."""
    return way.partition("+")[0]


def moved(call: Callable[[list[Any]], int], views: list[Any]) -> None:
    """Have ``call`` send, or fill, all of ``views``, some at a time."""
    at_once = max(1, min(1000, IOV_BYTES // len(views[0])))
    place = 0
    while place < len(views):
        some = views[place : place + at_once]
        place += len(some)
        while some:
            done = call(some)
            while some and done >= len(some[0]):
                done -= len(some.pop(0))
            if some and done:
                some[0] = some[0][done:]


class Sending:
    """The sender's process: answers ``[way, target, source, digests]`` with ``[seconds, CPU seconds, digests]``."""

    def __init__(self, task: Task, ports: dict[str, str]) -> None:
        self.memory = task.allocate(receiver=False)
        self.pool = self.memory.pool
        words = self.pool.view(np.uint64)
        words[:] = np.arange(words.size, dtype=np.uint64).reshape(words.shape) * np.uint64(0x9E3779B97F4A7C15)
        self.pool.view(np.uint16)[:] &= 0xBFFF  # bfloat16s below 2: all are numbers
        self.copy = np.zeros(self.pool.nbytes, np.uint8)
        self.shard, self.there = task.shard(receiver=False), task.shard(receiver=True)
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.to = {way: KVEndpoint(kind(way), ports[way], self.there, task.num_blocks) for way in OURS if way in ports}
        keys = CurveKeys.of(ports["secret"].encode())
        self.senders = {
            way: make_sender(kind(way), self.pool, self.shard, self.events.put, keys if way == CURVE else None)
            for way in self.to
        }
        self.socket = socket.create_connection(("127.0.0.1", int(ports["tcp"])))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.hasher, self.thread = LaneHasher(self.pool, self.shard), ThreadPoolExecutor(1)

    def digests(self, source: Blocks) -> bytes:
        return self.hasher.digests(DigestLane(KEY, 0, self.there, heads_of(self.there), 0, source))

    def run(self, way: str, target: Blocks, source: Blocks, digests: bool) -> bytes:
        taken = self.thread.submit(self.digests, source) if digests else None
        if way == "memcpy":
            size = len(source) * self.pool.shape[1]
            np.copyto(self.copy[:size], self.pool.reshape(-1)[:size])
        elif way == "tcp":
            moved(lambda views: self.socket.sendmsg(views), [memoryview(self.pool[block]) for block in source])
            self.socket.recv(1)
        else:
            self.senders[way].push(KEY, self.to[way], heads_of(self.there), 0, source, target)
            event = self.events.get(timeout=120)
            if not isinstance(event, Pushed):
                raise RuntimeError(str(event))
        return taken.result() if taken is not None else b""

    def serve(self) -> None:
        for line in sys.stdin:
            way, target, source, digests = json.loads(line)
            target, source = np.array(target, np.int32), np.array(source, np.int32)
            self.pool.view(np.uint16)[source, 0] += 1  # or the receiver could verify what came before
            made: list[bytes] = []
            busy = time.process_time()
            seconds = timed(lambda: made.append(self.run(way, target, source, digests)))  # noqa: B023
            print(json.dumps([seconds, time.process_time() - busy, made[0].hex()]), flush=True)
        for sender in self.senders.values():
            sender.shutdown()
        self.socket.close()
        self.memory.release()


class Receiving:
    """This process: its pool, a receiver for each way, and the sender's process."""

    def __init__(self, task: Task, ways: list[str], stack: ExitStack) -> None:
        self.memory, self.shard = task.allocate(receiver=True), task.shard(receiver=True)
        stack.callback(self.memory.release)
        self.hasher = LaneHasher(self.memory.pool, self.shard)
        self.receivers = []
        keys = CurveKeys.make()
        for way in ways:
            curve = keys if way == CURVE else None
            receiver = make_receiver(kind(way), "127.0.0.1", self.memory, self.shard, lambda _: None, curve)
            stack.callback(receiver.shutdown)
            self.receivers.append(receiver)
        self.rows: queue.SimpleQueue[Blocks] = queue.SimpleQueue()
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        ports = {way: each.endpoint.address for way, each in zip(ways, self.receivers, strict=True)}
        ports |= {"tcp": str(listener.getsockname()[1]), "secret": keys.secret.decode()}
        command = [sys.executable, __file__, "--send", json.dumps([task, ports])]
        self.sender, _ = stack.enter_context(piped(command))
        self.socket = stack.enter_context(listener.accept()[0])
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        """The receiver of raw TCP."""
        while True:
            rows = self.rows.get()
            moved(lambda views: self.socket.recvmsg_into(views)[0], [memoryview(self.memory.pool[row]) for row in rows])
            self.socket.send(b"!")

    def run(self, way: str, target: Blocks, source: Blocks, digests: bool) -> tuple[float, float, float]:
        """Seconds, those with the receiver's hashing, and CPU seconds."""
        busy = time.process_time()
        if way == "tcp":
            self.rows.put(target)
        for receiver in self.receivers:
            receiver.open(KEY, 0, target, (heads_of(self.shard),))
        seconds, cpu, sent = self.sender([way, target.tolist(), source.tolist(), digests])
        hashed = 0.0
        if digests:
            wanted = DigestLane(KEY, 0, self.shard, heads_of(self.shard), 0, target)
            stands: list[bytes] = []
            hashed = timed(lambda: stands.append(self.hasher.digests(wanted)))
            if stands[0].hex() != sent:
                sys.exit(f"{way} has not brought what was sent")
        return seconds, seconds + hashed, cpu + time.process_time() - busy


@contextmanager
def piped(
    command: list[str], mark: str = "", env: dict[str, str] | None = None
) -> Iterator[tuple[Callable[[Any], Any], int]]:
    """How to ask a process that answers a line of JSON with another, which begins with ``mark`` (asked None, it is only
    heard), and the id of its group of processes."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
        start_new_session=True,
    ) as process:

        def ask(value: Any) -> Any:
            assert process.stdin is not None and process.stdout is not None
            if value is not None:
                print(json.dumps(value), file=process.stdin, flush=True)
            for line in process.stdout:
                if line.startswith(mark):
                    return json.loads(line[len(mark) :])
            sys.exit(f"{' '.join(command[:3])} ... has ended")

        yield ask, process.pid
        assert process.stdin is not None
        process.stdin.close()


Run = Callable[[str, Any, Any, bool], tuple[float, float, float]]


def peers(arguments: argparse.Namespace, task: Task, stack: ExitStack) -> dict[str, Run]:
    """The ways of other libraries."""
    env = dict(pair.split("=", 1) for pair in arguments.peer_env)
    found: dict[str, Run] = {}
    script = str(Path(__file__).with_name("kv_peers.py"))
    for python, name in arguments.peer:
        command = [python, script, name, str(task.num_blocks), str(task.block_kib << 10)]
        ask, group = stack.enter_context(piped(command, "=", env))

        def run(
            way: str, target: Any, source: Any, digests: bool, ask: Any = ask, group: int = group
        ) -> tuple[float, float, float]:
            os.killpg(group, signal.SIGCONT)
            seconds, cpu = ask([way, target.tolist(), source.tolist()])
            os.killpg(group, signal.SIGSTOP)  # some poll without end, which would cost the others a processor
            return seconds, seconds, cpu

        stack.callback(os.killpg, group, signal.SIGCONT)
        found |= dict.fromkeys(ask(None), run)
        os.killpg(group, signal.SIGSTOP)
    return found


def measure(arguments: argparse.Namespace, block_kib: int, stack: ExitStack) -> Iterator[dict[str, Any]]:
    """Every size and way with blocks of one size."""
    num_blocks = (max(arguments.mib) << 10) // block_kib * 9 // 8
    task = Task(block_kib, num_blocks, arguments.into, arguments.heads)
    ours = Receiving(task, arguments.way, stack)
    limits = ["memcpy"] + (["tcp"] if task.heads == 8 and task.into == "bfloat16" else [])
    runs: dict[str, Run] = dict.fromkeys([*limits, *arguments.way], ours.run) | peers(arguments, task, stack)
    sizes = [(mib << 10) // block_kib for mib in arguments.mib]
    for count in [*sizes, 1]:
        results: dict[str, list[tuple[float, float, float]]] = {way: [] for way in runs}
        rounds = arguments.repeat if count > 1 else LATENCIES * arguments.repeat
        for number in range(rounds + 1):  # the first is for first touches, connections, mappings
            if sys.stderr.isatty():
                print(f"\r{block_kib} KiB x {count}: {number} of {rounds}\033[K", end="\r", file=sys.stderr)
            for way, run in runs.items():
                target, source = blocks_of(2 * number, num_blocks, count), blocks_of(2 * number + 1, num_blocks, count)
                results[way].append(run(way, target, source, way in OURS and count > 1))
        size = count * (block_kib << 10) * task.heads // 8
        for way, taken in results.items():
            yield figures(way, block_kib, size, taken[1:]) | {"into": task.into, "heads": task.heads}


def figures(way: str, block_kib: int, size: int, taken: list[tuple[float, float, float]]) -> dict[str, Any]:
    seconds, verified, cpu = (sorted(column) for column in zip(*taken, strict=True))
    line: dict[str, Any] = {"way": way, "block_kib": block_kib, "mib": size / 2**20}
    if len(taken) > LATENCIES - 1 and size <= 2 << 20:
        p50, p99 = (round(seconds[int(len(seconds) * share)] * 1e6) for share in (0.5, 0.99))
        return line | {"one_block_us": p50, "p99_us": p99, "best_us": round(seconds[0] * 1e6)}
    rate = {"gb_s": statistics.median(seconds), "best_gb_s": seconds[0]}
    if way in OURS:
        rate |= {"verified_gb_s": statistics.median(verified), "best_verified_gb_s": verified[0]}
    line |= {name: round(size / each / 1e9, 2) for name, each in rate.items()}
    return line | {"cpu_s_gb": round(cpu[0] / size * 1e9, 3)}


def table(lines: list[dict[str, Any]]) -> str:
    """GB/s, median (best), by way; then one block's latency."""
    shapes = sorted({(line["block_kib"], line["mib"]) for line in lines if "gb_s" in line}, reverse=True)
    singles = sorted({line["block_kib"] for line in lines}, reverse=True)
    heads = [f"{kib} KiB, {mib:g} MiB" for kib, mib in shapes] + [f"one of {kib} KiB, us" for kib in singles]
    rows = [["GB/s, median (best)", *heads]]
    for way in dict.fromkeys(line["way"] for line in lines):
        for kind, label in (("", way), ("verified_", f"{way}, verified")):
            cells = {
                (line["block_kib"], line["mib"]): f"{line[f'{kind}gb_s']} ({line[f'best_{kind}gb_s']})"
                for line in lines
                if line["way"] == way and f"{kind}gb_s" in line
            }
            if not cells:
                continue
            one = {
                line["block_kib"]: f"{line['one_block_us']} ({line['best_us']})"
                for line in lines
                if line["way"] == way and "one_block_us" in line and not kind
            }
            rows.append([label, *(cells.get(shape, "") for shape in shapes), *(one.get(kib, "") for kib in singles)])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", nargs="+", default=["shm", "zmq"], choices=OURS)
    parser.add_argument("--mib", nargs="+", type=int, default=[64, 256], help="bytes of a sequence's KV")
    parser.add_argument("--block-kib", nargs="+", type=int, default=[2048], help="2048, or a layer's: 4 a token")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--into", default="bfloat16", help="dtype of the receiver's KV", choices=DTYPES)
    parser.add_argument("--heads", type=int, default=8, choices=range(1, 9), help="KV heads of the receiver")
    parser.add_argument("--peer", nargs=2, action="append", default=[], metavar=("PYTHON", "NAME"))
    parser.add_argument("--peer-env", nargs="+", default=[], metavar="NAME=VALUE")
    parser.add_argument("--send", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.send is not None:
        task, ports = json.loads(arguments.send)
        Sending(Task(*task), ports).serve()
        return
    if any(kib % 4 or not 4 <= kib <= 2048 for kib in arguments.block_kib):
        parser.error("--block-kib must be a multiple of 4, up to 2048")
    if any(mib < 4 for mib in arguments.mib):
        parser.error("--mib must be 4 or more")
    lines: list[dict[str, Any]] = []
    for block_kib in arguments.block_kib:
        with ExitStack() as stack:
            for line in measure(arguments, block_kib, stack):
                print(json.dumps(line), flush=True)
                lines.append(line)
    print(table(lines))


if __name__ == "__main__":
    main()

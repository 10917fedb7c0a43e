"""How long the router takes: one JSON line.

    python benchmarks/routing.py --workers 1000 --requests 20000

Half of the workers prefill, half decode. ``place_us`` is the time of ``handle(PlacementWanted)`` in the core, ticket
included, without codec and sockets; a request is placed, prefilled and finished while a thousand others are in flight.

``overload`` is the core with every decode worker full, by its batch (``slots``) or its KV pool (``memory``), and a
thousand requests in line: ``queued_us`` is a further question, ``served_us`` a ``Finished``, which places the head.

``zmq`` is the same with a router in a process of its own, held to one core: placements a second with 64 questions in
flight, each followed by ``Prefilled`` and ``Finished``, and the time from question to answer with one in flight.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator

import psutil

from messages.codec import decoder_for
from messages.common import BlockCounts, KVRank, KVShard, KVWay, Role, WorkerAddress
from messages.gateway_to_router import ClusterStateWanted, Finished, PlacementWanted, Prefilled
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.router_to_gateway import ClusterState, Placed, Rejected, WorkerLost
from messages.seals import seal
from messages.worker_to_router import Register, Report
from router.actor import RouterActor, RouterConfig
from router.core.machine import Router, RouterSettings
from runtime.core.actions import Send
from runtime.mailbox import Mailbox

IN_FLIGHT = 1000
WINDOW = 64
POOL = 65_536
"""Blocks of a worker's KV pool: a million tokens."""
LOOPBACK = "127.0.0.1"
ATTEMPT = Attempt(1)
KEY = bytes(32)
SHARD = KVShard(32, 128, 16, "bfloat16", 8, 0, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.workers < 2 or options.requests < 2:
        parser.error("there must be two workers, one to prefill and one to decode, and two requests")
    if options.serve:
        serve()
        return
    figures = {"workers": options.workers, "requests": options.requests}
    result = {**figures, **in_the_core(options.workers, options.requests)}
    result["overload"] = {
        "slots": overloaded(options.workers, options.requests, max_num_seqs=2, blocks=POOL),
        "memory": overloaded(options.workers, options.requests, max_num_seqs=64, blocks=POOL // 64),
    }
    result["zmq"] = over_zmq(options.workers, options.requests)
    print(json.dumps({**result, "python": platform.python_version(), "machine": platform.machine()}))


def in_the_core(workers: int, requests: int) -> dict[str, object]:
    router = Router(RouterSettings(cluster_key=KEY, settle=0.0))
    for register in registers(workers):
        router.handle(register, 0.0)
    times: dict[str, list[int]] = {"place": [], "prefilled": [], "finished": [], "report": []}

    def timed(kind: str, event: object) -> None:
        start = time.perf_counter_ns()
        router.handle(event, 1.0)
        times[kind].append(time.perf_counter_ns() - start)

    flying: deque[RequestId] = deque()
    blocks = BlockCounts(free=POOL, held=0, cached=0, total=POOL)
    for number, wanted in enumerate(questions(requests, Address("tcp://10.0.0.2:1"))):
        timed("place", wanted)
        flying.append(wanted.request)
        if len(flying) > IN_FLIGHT:
            timed("prefilled", Prefilled(request=flying[IN_FLIGHT // 2], attempt=ATTEMPT))
            timed("finished", Finished(request=flying.popleft(), attempt=ATTEMPT))
        index = number % workers
        report = Report(
            worker=name(index), epoch=Epoch(index), number=number, steps=1, running=1, waiting=0,
            blocks=blocks, kv_bytes_sent=0, kv_bytes_received=0, transfers=0,
        )  # fmt: skip
        timed("report", report)
    router.check_integrity()
    return {f"{kind}_us": spread([ns / 1000 for ns in samples]) for kind, samples in times.items() if samples}


def overloaded(workers: int, requests: int, *, max_num_seqs: int, blocks: int) -> dict[str, object]:
    router = Router(RouterSettings(cluster_key=KEY, settle=0.0))
    for register in registers(workers, max_num_seqs, blocks):
        router.handle(register, 0.0)
    placed: deque[RequestId] = deque()
    times: dict[str, list[int]] = {"queued": [], "served": []}

    def timed(kind: str, event: object) -> None:
        start = time.perf_counter_ns()
        actions = router.handle(event, 1.0)
        times[kind].append(time.perf_counter_ns() - start)
        for action in actions:
            if isinstance(action, Send) and isinstance(action.message, Placed):
                placed.append(action.message.request)

    asked = questions(2**62, Address("tcp://10.0.0.2:1"))
    while router.inspect()["waiting"] < IN_FLIGHT:
        timed("queued", next(asked))
    for samples in times.values():
        samples.clear()
    for _ in range(requests):
        timed("served", Finished(request=placed.popleft(), attempt=ATTEMPT))
        while router.inspect()["waiting"] < IN_FLIGHT:
            timed("queued", next(asked))
    router.check_integrity()
    return {f"{kind}_us": spread([ns / 1000 for ns in samples]) for kind, samples in times.items()}


def over_zmq(workers: int, requests: int) -> dict[str, object]:
    with (
        router_process() as (address, process),
        Mailbox(LOOPBACK, decoder_for(Placed, Rejected, WorkerLost, ClusterState)) as gateway,
    ):
        for register in registers(workers):
            gateway.send(address, register)
        gateway.send(address, ClusterStateWanted(gateway=gateway.address))  # answered when all are in
        (state,) = gateway.receive(None)
        assert len(state.workers) == workers

        def placed() -> int:
            """Take answers, and finish what they are about."""
            answers = gateway.receive(None)
            for answer in answers:
                assert isinstance(answer, Placed), answer
                gateway.send(address, Prefilled(request=answer.request, attempt=ATTEMPT))
                gateway.send(address, Finished(request=answer.request, attempt=ATTEMPT))
            return len(answers)

        latencies = []
        for wanted in questions(min(requests, 5000), gateway.address, seed=1):
            start = time.perf_counter_ns()
            gateway.send(address, wanted)
            placed()
            latencies.append((time.perf_counter_ns() - start) / 1000)

        before, start, in_flight = sum(process.cpu_times()[:2]), time.perf_counter(), 0
        for wanted in questions(requests, gateway.address, seed=2):
            while in_flight >= WINDOW:
                in_flight -= placed()
            gateway.send(address, wanted)
            in_flight += 1
        while in_flight:
            in_flight -= placed()
        seconds, cpu = time.perf_counter() - start, sum(process.cpu_times()[:2]) - before
    return {
        "placements_per_s": round(requests / seconds),
        "cpu_us_per_request": round(1e6 * cpu / requests, 1),
        "latency_us": spread(latencies),
    }  # fmt: skip


@contextlib.contextmanager
def router_process() -> Iterator[tuple[Address, psutil.Process]]:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, __file__, "--serve"], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        yield Address(process.stdout.readline().strip()), psutil.Process(process.pid)
        process.stdin.close()


def serve() -> None:
    """A router on one core, until the input ends."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    actor = RouterActor(RouterConfig(host=LOOPBACK, settings=RouterSettings(cluster_key=KEY, liveness_timeout=600)))
    print(actor.start()["address"], flush=True)
    sys.stdin.read()
    actor.stop()


def name(index: int) -> WorkerId:
    return WorkerId(f"{'prefill' if index % 2 else 'decode'}-{index}")


def registers(workers: int, max_num_seqs: int = 64, blocks: int = POOL) -> Iterator[Register]:
    for index in range(workers):
        role = Role.PREFILL if index % 2 else Role.DECODE
        kv = (KVRank(SHARD, blocks, "host", (KVWay("zmq", "tcp://10.0.0.1:1"),)),) if role is Role.DECODE else ()
        address = WorkerAddress(name(index), Epoch(index), Address(f"tcp://10.0.0.1:{index + 1}"), kv)
        register = Register(address=address, role=role, max_num_seqs=max_num_seqs, max_model_len=131_072)
        yield seal(KEY, register)


def questions(count: int, gateway: Address, seed: int = 0) -> Iterator[PlacementWanted]:
    rng = random.Random(seed)
    for _ in range(count):
        yield PlacementWanted(
            request=RequestId(f"{rng.getrandbits(128):032x}"), attempt=ATTEMPT, gateway=gateway, tenant="t",
            num_tokens=rng.randint(16, 8192), max_new_tokens=512,
        )  # fmt: skip


def spread(microseconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(microseconds, n=100)
    return {"p50": round(cuts[49], 1), "p99": round(cuts[98], 1)}


if __name__ == "__main__":
    main()

"""How long the router takes to decide: one JSON line.

    python benchmarks/routing.py --workers 1000 --requests 20000

Half of the workers prefill, half decode. A request is placed (with its ticket), prefilled and finished; a thousand
others are always in flight. ``place`` is the time of ``handle(PlacementWanted)``, without codec and sockets.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections import deque

from messages.common import BlockCounts, Role, WorkerAddress
from messages.gateway_to_router import Finished, PlacementWanted, Prefilled
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.worker_to_router import Register, Report
from router.core.machine import Router, RouterSettings

IN_FLIGHT = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=20_000)
    options = parser.parse_args()
    rng = random.Random(0)
    router = Router(RouterSettings(cluster_key=bytes(32)))
    for index in range(options.workers):
        role = Role.PREFILL if index % 2 else Role.DECODE
        address = WorkerAddress(WorkerId(f"{role}-{index}"), Epoch(index), Address(f"tcp://10.0.0.1:{index}"))
        router.handle(Register(address=address, role=role, max_num_seqs=64, max_model_len=131_072), 0.0)

    times: dict[str, list[int]] = {"place": [], "prefilled": [], "finished": [], "report": []}

    def timed(kind: str, event: object) -> None:
        start = time.perf_counter_ns()
        router.handle(event, 1.0)
        times[kind].append(time.perf_counter_ns() - start)

    flying: deque[RequestId] = deque()
    blocks = BlockCounts(free=1, held=0, cached=0, total=1)
    for number in range(options.requests):
        request, attempt = RequestId(f"{rng.getrandbits(128):032x}"), Attempt(1)
        length = rng.randint(16, 8192)
        wanted = PlacementWanted(
            request=request, attempt=attempt, gateway=Address("tcp://10.0.0.2:1"), tenant="t", num_tokens=length,
            max_new_tokens=512,
        )  # fmt: skip
        timed("place", wanted)
        flying.append(request)
        if len(flying) > IN_FLIGHT:
            timed("prefilled", Prefilled(request=flying[IN_FLIGHT // 2], attempt=attempt))
            timed("finished", Finished(request=flying.popleft(), attempt=attempt))
        index = number % options.workers
        role = Role.PREFILL if index % 2 else Role.DECODE
        report = Report(
            worker=WorkerId(f"{role}-{index}"), epoch=Epoch(index), number=number, steps=1, running=1, waiting=0,
            blocks=blocks, kv_bytes_sent=0, kv_bytes_received=0, transfers=0,
        )  # fmt: skip
        timed("report", report)
    router.check_integrity()
    figures: dict[str, object] = {"workers": options.workers, "requests": options.requests}
    for kind, samples in times.items():
        cuts = statistics.quantiles(samples, n=100)
        figures[f"{kind}_us"] = {"p50": round(cuts[49] / 1000, 1), "p99": round(cuts[98] / 1000, 1)}
    print(json.dumps({**figures, "python": platform.python_version(), "machine": platform.machine()}))


if __name__ == "__main__":
    main()

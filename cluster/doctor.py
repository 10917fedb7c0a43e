"""`baton doctor`: before traffic, does every prefill worker go with every decode worker, and how fast?

It asks each worker what it is, and has each pair hand test blocks over, one pair after the other: free blocks only, no
more than a few MiB, verified like any others. Workers that run are asked through Ray, whose token is the permission.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster import state
from cluster.errors import ClusterError
from cluster.findings import Finding, Measured, Pair, of_facts, of_measurements, pairs_of, to_measure
from cluster.plan import size
from cluster.ray_session import RaySession
from cluster.running import running
from cluster.topology import Topology
from kv_transfer.core.lanes import layout_of
from kv_transfer.core.ways import choose
from messages.common import Role
from runtime.facts import WorkerFacts

TEST_BYTES = 64 << 20
"""Of one test transfer, at most."""
ROUNDS = 3
"""Test transfers of each size; the fastest counts."""
MAX_PAIRS = 256
"""Measured, one after the other."""
WITHIN = 10.0
"""Seconds for one test transfer."""

Call = Callable[..., Any]
"""Worker, method, arguments -> what the method returns."""


@dataclass(frozen=True, slots=True)
class Examination:
    """All that was looked at, and what is wrong."""

    workers: list[WorkerFacts]
    measured: list[Measured]
    transports: dict[Pair, str]
    num_pairs: int
    findings: list[Finding]

    def to_json(self) -> dict[str, Any]:
        workers = [
            {"worker": each.worker, "role": each.role.value, "node": each.node}
            | {"ranks": len(each.shards), "kv_dtype": each.shards[0].dtype, "block_size": each.shards[0].block_size}
            | {"baton": each.baton, "torch": each.torch, "protocol": each.protocol}
            for each in self.workers
        ]
        pairs = [
            {"prefill": each.pair.prefill, "decode": each.pair.decode, "transport": self.transports[each.pair]}
            | {"problem": each.problem or None}
            | {"bytes_per_second": each.bytes_per_second or None, "bytes": each.many_blocks.num_bytes}
            | {"one_block_seconds": _number(each.one_block.whole_seconds)}
            for each in self.measured
        ]
        findings = [asdict(finding) for finding in self.findings]
        return {"workers": workers, "pairs": pairs, "num_pairs": self.num_pairs, "findings": findings}


def examine(names: Sequence[str], call: Call) -> Examination:
    """Ask and measure the workers ``names``."""
    workers: list[WorkerFacts] = [call(name, "facts") for name in names]
    findings = of_facts(workers)
    broken = {pair for finding in findings for pair in finding.pairs}
    pairs = pairs_of(workers)
    sound = [pair for pair in pairs if str(Pair(pair[0].worker, pair[1].worker)) not in broken]
    measured = [measure(prefill, decode, call) for prefill, decode in to_measure(sound, MAX_PAIRS)]
    over = {Pair(prefill.worker, decode.worker): choose(prefill.ranks, decode.ranks) for prefill, decode in sound}
    return Examination(workers, measured, over, len(pairs), [*findings, *of_measurements(measured, over)])


def measure(prefill: WorkerFacts, decode: WorkerFacts, call: Call) -> Measured:
    """One block, and then as many as a test may have; of each the fastest of a few."""
    blocks = blocks_of_a_test(prefill, decode)
    pair = Pair(prefill.worker, decode.worker)
    best = []
    for count in (1, blocks):
        probes = [call(prefill.worker, "probe", decode.address, count, WITHIN)]
        while not probes[-1].problem and len(probes) < ROUNDS:
            probes.append(call(prefill.worker, "probe", decode.address, count, WITHIN))
        failed = [probe for probe in probes if probe.problem]
        best.append(failed[0] if failed else min(probes, key=lambda probe: probe.push_seconds))
        if failed:
            break
    return Measured(pair, best[0], best[-1])


def blocks_of_a_test(prefill: WorkerFacts, decode: WorkerFacts) -> int:
    """Blocks of a test transfer: a few MiB, a quarter of either pool, no longer than a prompt can be."""
    block_bytes = sum(layout_of(shard).block_bytes for shard in decode.shards)
    tokens = min(prefill.max_model_len, decode.max_model_len) - 2
    quarter = min(prefill.num_blocks, decode.num_blocks) // 4
    return max(1, min(TEST_BYTES // block_bytes, quarter, tokens // prefill.shards[0].block_size))


def doctor(console: Console, source: Path | None, name: str | None, *, as_json: bool) -> bool:
    """Examine the cluster that runs, or the one of ``source``, started for it if it does not; whether all is well."""
    topology = None if source is None else Topology.load(source)
    file = state.find(name) if topology is None else state.read(topology.name)
    if file is not None and file.alive:
        found = _examine_running(file)
    else:
        assert topology is not None and source is not None
        quiet = Console(stderr=True, quiet=as_json)
        with running(topology, quiet, source=source.resolve()) as (cluster, _):
            names = sorted({process.worker for process in cluster.processes.values() if process.worker})
            found = examine(names, cluster.call)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found.to_json())).decode())
    else:
        show(console, found)
    return not found.findings


def _examine_running(file: state.ClusterFile) -> Examination:
    """Of a cluster that another process has started."""
    private = None if file.ray_folder is None else Path(file.ray_folder)
    address = "local" if private is not None else Topology.load(Path(file.topology)).cluster.address
    session = RaySession(address, f"baton-{file.name}", private)
    session.start()
    try:
        ray = session.ray

        def call(name: str, method: str, *arguments: Any) -> Any:
            return ray.get(ray.get_actor(name).call.remote(method, *arguments), timeout=3 * WITHIN)

        return examine(_workers_of(file), call)
    finally:
        session.stop()


def _workers_of(file: state.ClusterFile) -> list[str]:
    from cluster.client import get

    if file.url is None:
        raise ClusterError(f"{file.name} is still starting; `baton status` says when it is ready")
    cluster = get(file.url, "/status")["cluster"] or {"workers": []}
    return [worker["worker"] for worker in cluster["workers"] if worker["alive"]]


def show(console: Console, found: Examination) -> None:
    """A table of the pairs, then the findings."""
    if found.measured:
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
        for column in ("pair", "over"):
            table.add_column(column)
        for column in ("GB/s", "one block", "tested with"):
            table.add_column(column, justify="right", no_wrap=True)
        for each in found.measured:
            rate = f"{each.bytes_per_second / 1e9:.2f}" if each.bytes_per_second else "[red]failed[/]"
            whole = each.one_block.whole_seconds
            latency = "" if math.isnan(whole) else f"{1e3 * whole:.2f} ms"
            table.add_row(str(each.pair), found.transports[each.pair], rate, latency, size(each.many_blocks.num_bytes))
        console.print(table)
    if found.num_pairs > len(found.measured):
        console.print(f"{len(found.measured)} of {found.num_pairs} pairs were measured", highlight=False)
    if not found.num_pairs and any(worker.role is Role.COLOCATED for worker in found.workers):
        console.print("no worker hands over to another: there is nothing to measure")
    for finding in found.findings:
        pairs = ", ".join(finding.pairs)
        text = f"[red]{escape(pairs)}[/]: {escape(finding.cause)}\n  {escape(finding.cure)}"
        console.print(text, highlight=False, soft_wrap=True)
    if not found.findings:
        console.print(f"[green]OK[/]  {len(found.workers)} workers go together", highlight=False)


def _number(seconds: float) -> float | None:
    return None if math.isnan(seconds) else seconds

"""`baton doctor`: before traffic, does every prefill worker go with every decode worker, and how fast?

It asks each worker what it is, and has each pair hand test blocks over, one pair after the other: blocks that nobody
owns, no more than a few MiB, verified like any others. Workers that run are asked through Ray, whose token is the
permission. One that is gone or hangs is a finding like any other, and costs one timeout.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster import state
from cluster.display import StartProgress
from cluster.errors import ClusterError, NoAnswer
from cluster.findings import (
    NO_TIME,
    START_AGAIN,
    Finding,
    Known,
    Measured,
    Pair,
    of_facts,
    of_lost,
    of_measurements,
    pairs_of,
    to_measure,
)
from cluster.launch import Cluster
from cluster.plan import size
from cluster.processes import Progress
from cluster.ray_session import RaySession
from cluster.running import running
from cluster.topology import Topology
from kv_transfer.core.lanes import layout_of
from kv_transfer.core.ways import choose
from messages.common import Role
from messages.ids import RequestId
from runtime.core.probe import NO_ROOM, ProbeEnded
from runtime.facts import WorkerFacts

TEST_BYTES = 64 << 20
"""Of one test transfer, at most."""
ROUNDS = 3
"""Test transfers of each size; the fastest counts."""
MAX_PAIRS = 256
"""Measured, one after the other."""
WITHIN = 10.0
"""Seconds for one test transfer."""
PROBE_WITHIN = 2 * WITHIN + 5.0
"""Seconds in which a worker says what came of it: see ``WorkerActor.probe``."""
ANSWER_WITHIN = 10.0
"""Seconds for a question that nothing has to be moved for."""
MAX_ASKED = 16
"""Workers at once."""
TOTAL = 120.0
"""Seconds after which no further pair is measured."""
WAKE = f"if `ps` shows that it is stopped (state T), `kill -CONT` it; if it hangs for good, {START_AGAIN}"
LOOK = f"look for the reason in the log of `baton up`, then {START_AGAIN}"

Call = Callable[..., Any]
"""Worker, method, arguments, ``within`` seconds -> what the method returns; ``NoAnswer``."""


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
            | {"problem": None if each.not_measured else each.problem or None}
            | {"not_measured": each.not_measured or None}
            | {"bytes_per_second": each.bytes_per_second or None, "bytes": each.many_blocks.num_bytes}
            | {"one_block_seconds": _number(each.one_block.whole_seconds)}
            for each in self.measured
        ]
        findings = [asdict(finding) for finding in self.findings]
        return {"workers": workers, "pairs": pairs, "num_pairs": self.num_pairs, "findings": findings}


def examine(known: Sequence[Known], call: Call, note: Progress = lambda who, what: None) -> Examination:
    """Ask and measure these workers. Whoever gives no answer is a finding, and keeps no other from being examined."""
    note("workers", f"asking {len(known)}")
    facts, unanswered = _ask_all(known, call)
    note("workers", "ready")
    workers = [facts[each.worker] for each in known if each.alive and each.worker in facts]
    findings = [*of_lost(known, unanswered), *of_facts(workers)]
    broken = {pair for finding in findings for pair in finding.pairs}
    pairs = pairs_of(workers)
    sound = [pair for pair in pairs if str(Pair(pair[0].worker, pair[1].worker)) not in broken]
    measured = measure_all(to_measure(sound, MAX_PAIRS), call, note)
    over = {Pair(prefill.worker, decode.worker): choose(prefill.ranks, decode.ranks) for prefill, decode in sound}
    return Examination(workers, measured, over, len(pairs), [*findings, *of_measurements(measured, over)])


def asking(call: Call) -> Call:
    """``call``, with what Ray raises of a worker that is gone, hangs or fails as ``NoAnswer``."""
    from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

    def asked(name: str, method: str, *arguments: Any, within: float) -> Any:
        try:
            return call(name, method, *arguments, within=within)
        except GetTimeoutError as error:
            raise NoAnswer(f"no answer within {within:g} s: its process is stopped, or hangs", WAKE) from error
        except RayTaskError as error:
            if isinstance(error.cause, TimeoutError):
                raise NoAnswer(str(error.cause), WAKE) from error
            raise NoAnswer(f"it fails at {method!r}: {_first_line(error.cause or error)}", LOOK) from error
        except RayActorError as error:
            raise NoAnswer("its process is gone", LOOK) from error
        except RayError as error:
            raise NoAnswer(f"Ray does not reach it: {_first_line(error)}", LOOK) from error
        except ValueError as error:  # of the look-up
            raise NoAnswer("its process is gone", LOOK) from error

    return asked


def _ask_all(known: Sequence[Known], call: Call) -> tuple[dict[str, WorkerFacts], dict[str, tuple[str, str]]]:
    """The facts of those that answer; cause and cure of those that do not. All are asked at once."""
    facts: dict[str, WorkerFacts] = {}
    unanswered: dict[str, tuple[str, str]] = {}

    def ask(worker: str) -> None:
        try:
            facts[worker] = call(worker, "facts", within=ANSWER_WITHIN)
        except NoAnswer as error:
            unanswered[worker] = (error.cause, error.cure)

    with ThreadPoolExecutor(MAX_ASKED) as threads:
        list(threads.map(ask, [each.worker for each in known]))
    return facts, unanswered


def measure_all(
    pairs: Sequence[tuple[WorkerFacts, WorkerFacts]],
    call: Call,
    note: Progress = lambda who, what: None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Measured]:
    """One pair after the other, within ``TOTAL``. A worker that gave no answer is not asked again."""
    until = clock() + TOTAL
    silent: dict[str, NoAnswer] = {}
    measured = []
    for number, (prefill, decode) in enumerate(pairs, 1):
        pair = Pair(prefill.worker, decode.worker)
        note("pairs", f"{pair}, {number} of {len(pairs)}")
        if not silent.keys().isdisjoint(pair):
            measured.append(_unanswered(pair, silent))
        elif clock() > until:
            measured.append(_failed(pair, NO_TIME))
        else:
            measured.append(_measure_unless_silent(prefill, decode, call, silent))
    note("pairs", "ready")
    return measured


def _measure_unless_silent(
    prefill: WorkerFacts, decode: WorkerFacts, call: Call, silent: dict[str, NoAnswer]
) -> Measured:
    """``silent`` is told of who gives no answer."""
    asked = prefill.worker
    try:
        found = measure(prefill, decode, call)
        if found.problem and not found.not_measured:
            asked = decode.worker  # is it the way to it, or itself?
            call(asked, "inspect", within=ANSWER_WITHIN)
    except NoAnswer as error:
        silent[asked] = error
        return _unanswered(Pair(prefill.worker, decode.worker), silent)
    return found


def _unanswered(pair: Pair, silent: Mapping[str, NoAnswer]) -> Measured:
    worker = next(worker for worker in pair if worker in silent)
    return _failed(pair, f"{worker}: {silent[worker].cause}", silent[worker].cure)


def _failed(pair: Pair, problem: str, cure: str = "") -> Measured:
    nothing = ProbeEnded(RequestId("probe"), problem)
    return Measured(pair, nothing, nothing, cure)


def measure(prefill: WorkerFacts, decode: WorkerFacts, call: Call) -> Measured:
    """One block, and then as many as a test may have, or as there is room for; of each the fastest of a few."""
    pair = Pair(prefill.worker, decode.worker)
    one = _fastest(prefill, decode, 1, call)
    if one.problem:
        return Measured(pair, one, one)
    blocks = blocks_of_a_test(prefill, decode)
    many = _fastest(prefill, decode, blocks, call)
    while NO_ROOM in many.problem and blocks > 1:
        blocks = max(1, blocks // 4)
        many = _fastest(prefill, decode, blocks, call)
    return Measured(pair, one, many)


def _fastest(prefill: WorkerFacts, decode: WorkerFacts, blocks: int, call: Call) -> ProbeEnded:
    done: list[ProbeEnded] = []
    while len(done) < ROUNDS:
        probe: ProbeEnded = call(prefill.worker, "probe", decode.address, blocks, WITHIN, within=PROBE_WITHIN)
        if probe.problem and not (done and NO_ROOM in probe.problem):
            return probe
        if probe.problem:
            break
        done.append(probe)
    return min(done, key=lambda probe: probe.push_seconds)


def blocks_of_a_test(prefill: WorkerFacts, decode: WorkerFacts) -> int:
    """Blocks of a test transfer: a few MiB, an eighth of either pool, no longer than a prompt can be."""
    block_bytes = sum(layout_of(shard).block_bytes for shard in decode.shards)
    tokens = min(prefill.max_model_len, decode.max_model_len) - 2
    share = min(prefill.num_blocks, decode.num_blocks) // 8
    return max(1, min(TEST_BYTES // block_bytes, share, tokens // prefill.shards[0].block_size))


def doctor(console: Console, source: Path | None, name: str | None, *, as_json: bool) -> bool:
    """Examine the cluster that runs, or the one of ``source``, started for it if it does not; whether all is well."""
    quiet = Console(stderr=True, quiet=as_json)
    topology = None if source is None else Topology.load(source)
    file = state.find(name) if topology is None else state.read(topology.name)
    if file is not None and file.alive:
        with StartProgress(quiet) as progress:
            found = _examine_running(file, progress.note)
    else:
        assert topology is not None and source is not None
        with running(topology, quiet, source=source.resolve()) as (cluster, _), StartProgress(quiet) as progress:
            found = examine_started(cluster, progress.note)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found.to_json())).decode())
    else:
        show(console, found)
    return not found.findings


def examine_started(cluster: Cluster, note: Progress = lambda who, what: None) -> Examination:
    """Of a cluster that this process has started."""
    roles = {worker.config.worker: Role(worker.config.role) for worker in cluster.plan.workers(router="")}
    return examine([Known(name, roles[name]) for name in sorted(roles)], asking(cluster.call), note)


def _examine_running(file: state.ClusterFile, note: Progress) -> Examination:
    """Of a cluster that another process has started."""
    private = None if file.ray_folder is None else Path(file.ray_folder)
    session = RaySession(file.ray_address or "local", f"baton-{file.name}", private, allow_open=True)
    session.start()
    try:
        ray = session.ray

        def call(name: str, method: str, *arguments: Any, within: float) -> Any:
            return ray.get(ray.get_actor(name).call.remote(method, *arguments), timeout=within)

        return examine(_workers_of(file), asking(call), note)
    finally:
        session.stop()


def _workers_of(file: state.ClusterFile) -> list[Known]:
    from cluster.client import get

    if file.url is None:
        raise ClusterError(f"{file.name} is still starting; `baton status` says when it is ready")
    cluster = get(file.url, "/status")["cluster"]
    if cluster is None:
        raise ClusterError(f"the gateway of {file.name} does not hear its router; `baton status` says when it does")
    return [Known(each["worker"], Role(each["role"]), each["alive"]) for each in cluster["workers"]]


def show(console: Console, found: Examination) -> None:
    """A table of the pairs, then the findings."""
    if found.measured:
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
        for column in ("pair", "over"):
            table.add_column(column)
        for column in ("GB/s", "one block", "tested with"):
            table.add_column(column, justify="right", no_wrap=True)
        for each in found.measured:
            if each.not_measured:
                table.add_row(str(each.pair), found.transports[each.pair], "", "", f"not measured: {each.not_measured}")
                continue
            rate = f"{each.bytes_per_second / 1e9:.2f}" if each.bytes_per_second else "[red]failed[/]"
            whole = each.one_block.whole_seconds
            latency = "" if math.isnan(whole) else f"{1e3 * whole:.2f} ms"
            table.add_row(str(each.pair), found.transports[each.pair], rate, latency, size(each.many_blocks.num_bytes))
        console.print(table)
    num_measured = sum(not each.not_measured for each in found.measured)
    if found.num_pairs > num_measured:
        console.print(f"{num_measured} of {found.num_pairs} pairs were measured", highlight=False)
    colocated = all(worker.role is Role.COLOCATED for worker in found.workers)
    if found.workers and colocated:
        console.print("no worker hands over to another: there is nothing to measure")
    for finding in found.findings:
        pairs = ", ".join(finding.pairs)
        text = f"[red]{escape(pairs)}[/]: {escape(finding.cause)}\n  {escape(finding.cure)}"
        console.print(text, highlight=False, soft_wrap=True)
    if not found.findings and (num_measured or colocated):
        console.print(f"[green]OK[/]  {len(found.workers)} workers go together", highlight=False)
    elif not found.findings:
        console.print(
            "nothing is known to be wrong, but there was no room to try: ask again when there is less traffic"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


def _number(seconds: float) -> float | None:
    return None if math.isnan(seconds) else seconds

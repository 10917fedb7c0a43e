"""What is wrong between workers, of what they say of themselves and of what test transfers between them have shown.

Nothing here asks or measures: facts in, findings out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.core.kv_layout import QUANTIZED_MAX
from kv_transfer.core.lanes import CannotPair, plan_lanes
from kv_transfer.core.ways import choose
from messages.common import KVShard, Role
from runtime.core.probe import NO_ROOM, NOTHING_CAME, ProbeEnded
from runtime.facts import WorkerFacts

SLOW = 0.25
"""A pair is slow that reaches less than this share of the best pair of the same transport."""
SAME = {"baton": "Baton", "protocol": "protocol", "torch": "PyTorch"}
"""Fields of ``WorkerFacts`` in which two workers of a cluster must be equal."""

NO_TIME = "no time was left for it"
"""In the problem of a pair that was not looked at."""
START_AGAIN = "start the cluster again: `baton down`, `baton up`"

Found = tuple[str, str]
"""Cause and cure."""


class Pair(NamedTuple):
    """Who hands over to whom."""

    prefill: str
    decode: str

    def __str__(self) -> str:
        return f"{self.prefill} -> {self.decode}"


class Known(NamedTuple):
    """A worker of the cluster, as the router sees it."""

    worker: str
    role: Role
    alive: bool = True


class Measured(NamedTuple):
    """A pair's test transfers."""

    pair: Pair
    one_block: ProbeEnded
    many_blocks: ProbeEnded
    cure: str = ""
    """Of the problem, where more is known of it than it says."""

    @property
    def problem(self) -> str:
        return self.one_block.problem or self.many_blocks.problem

    @property
    def not_measured(self) -> str:
        """Why nothing is known of the pair, though nothing is wrong; empty where something is."""
        return self.problem if NO_ROOM in self.problem or NO_TIME in self.problem else ""

    @property
    def bytes_per_second(self) -> float:
        """Of the many blocks, from the first push to the last byte; 0 where they did not arrive."""
        if self.problem or not self.many_blocks.push_seconds > 0:
            return 0.0
        return self.many_blocks.num_bytes / self.many_blocks.push_seconds


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that will go wrong, once for all pairs of which it is true."""

    pairs: tuple[str, ...]
    """Or the worker, or the role, where it is about one."""
    cause: str
    cure: str


def pairs_of(workers: Sequence[WorkerFacts]) -> list[tuple[WorkerFacts, WorkerFacts]]:
    """Every prefill worker with every decode worker."""
    decodes = [worker for worker in workers if worker.role is Role.DECODE]
    return [(prefill, decode) for prefill in workers if prefill.role is Role.PREFILL for decode in decodes]


def to_measure(pairs: Sequence[tuple[WorkerFacts, WorkerFacts]], most: int) -> list[tuple[WorkerFacts, WorkerFacts]]:
    """At most ``most`` of the pairs, every worker in as many as any other, as far as that goes."""
    if len(pairs) <= most:
        return list(pairs)
    prefills = list(dict.fromkeys(prefill.worker for prefill, _ in pairs))
    decodes = list(dict.fromkeys(decode.worker for _, decode in pairs))
    by_name = {(prefill.worker, decode.worker): (prefill, decode) for prefill, decode in pairs}
    chosen: list[tuple[WorkerFacts, WorkerFacts]] = []
    for shift in range(len(decodes)):  # along diagonals, which meet every worker once before any twice
        for place in range(max(len(prefills), len(decodes))):
            pair = by_name.pop((prefills[place % len(prefills)], decodes[(place + shift) % len(decodes)]), None)
            if pair is not None:
                chosen.append(pair)
            if len(chosen) == most:
                return chosen
    return chosen


def of_lost(known: Sequence[Known], unanswered: Mapping[str, Found]) -> list[Finding]:
    """Workers that are not there, by name, and roles that nobody is left for. ``unanswered``: why they say nothing."""
    findings = []
    for each in known:
        if each.worker in unanswered:
            findings.append(Finding((each.worker,), *unanswered[each.worker]))
        elif not each.alive:
            cause = "the router hears nothing of it, though its process answers: its step loop hangs, or it is cut off"
            cure = f"look for what holds it up in its log and between the two hosts, or {START_AGAIN}"
            findings.append(Finding((each.worker,), cause, cure))
    roles = {each.role for each in known}
    wanted = [Role.COLOCATED] if roles == {Role.COLOCATED} else [Role.PREFILL, Role.DECODE]
    left = {each.role for each in known if each.alive and each.worker not in unanswered}
    for role in wanted:
        if role not in left:
            cause = "no worker of this role is alive, so no request can be served"
            findings.append(Finding((role.value,), cause, START_AGAIN))
    return findings


def of_facts(workers: Sequence[WorkerFacts]) -> list[Finding]:
    """What can be said without moving anything."""
    found: list[tuple[str, Found]] = []
    for prefill, decode in pairs_of(workers):
        name = str(Pair(prefill.worker, decode.worker))
        found += [(name, each) for check in (_versions, _transport, _layout) for each in check(prefill, decode)]
    colocated = [worker for worker in workers if worker.role is Role.COLOCATED]
    for other in colocated[1:]:
        name = f"{colocated[0].worker} and {other.worker}"
        found += [(name, each) for each in _versions(colocated[0], other)]
    return _grouped(found)


def of_measurements(measured: Sequence[Measured], transports: dict[Pair, str]) -> list[Finding]:
    """What the test transfers have shown; ``transports`` by pair."""
    best: dict[str, Measured] = {}
    for each in measured:
        transport = transports[each.pair]
        if transport not in best or each.bytes_per_second > best[transport].bytes_per_second:
            best[transport] = each
    found: list[tuple[str, Found]] = []
    for each in measured:
        fastest = best[transports[each.pair]]
        if each.not_measured:
            continue
        if each.problem:
            cure = each.cure or _cure_of_failure(each.problem)
            found.append((str(each.pair), (f"a test transfer failed: {each.problem}", cure)))
        elif each.bytes_per_second < SLOW * fastest.bytes_per_second:
            cause = (
                f"KV moves at {each.bytes_per_second / 1e9:.2f} GB/s, between {fastest.pair} at "
                f"{fastest.bytes_per_second / 1e9:.2f} GB/s by the same transport"
            )
            cure = (
                "look for what else takes its cores or its link, and see that both ends have the processors they need"
            )
            found.append((str(each.pair), (cause, cure)))
    return _grouped(found)


def _versions(one: WorkerFacts, other: WorkerFacts) -> Iterator[Found]:
    for field, what in SAME.items():
        here, there = getattr(one, field), getattr(other, field)
        if here != there:
            cause = f"{one.worker} has {what} {here}, {other.worker} has {there}"
            cure = "install the same release in both workers' environments, and start them again"
            yield cause, cure


def _transport(prefill: WorkerFacts, decode: WorkerFacts) -> Iterator[Found]:
    try:
        choose(prefill.ranks, decode.ranks)
    except CannotPair as error:
        hosts = f" ({prefill.worker} is on {prefill.node}, {decode.worker} on {decode.node})"
        cause = str(error) if prefill.node == decode.node else f"{error}{hosts}"
        yield cause, "write one kv.transport for both pools: auto, or zmq between hosts"


def _layout(prefill: WorkerFacts, decode: WorkerFacts) -> Iterator[Found]:
    try:
        plan_lanes(prefill.shards, decode.shards)
    except CannotPair as error:
        yield str(error), _cure_of_layout(prefill.shards, decode.shards)


def _cure_of_layout(senders: Sequence[KVShard], receivers: Sequence[KVShard]) -> str:
    for shard in (*senders, *receivers):
        if any(getattr(shard, what) != getattr(senders[0], what) for what in ("num_layers", "head_dim", "total_heads")):
            return "serve the same model in both pools"
        if shard.block_size != senders[0].block_size:
            return "write one kv.block_size for both pools, and start them again"
        if shard.dtype != senders[0].dtype and senders[0].dtype in QUANTIZED_MAX:
            return f"write kv_dtype: {senders[0].dtype} for the decode pool, or a float dtype for the prefill pool"
    return "start the prefill worker again with all ranks of its tensor_parallel: together they must hold every KV head"


def _cure_of_failure(problem: str) -> str:
    if NOTHING_CAME in problem:
        return (
            "both workers answer, so look at the way between them: is it cut by a firewall, or far slower than it "
            "should be, and what else takes the processors of both hosts?"
        )
    if "bad" in problem or "missing" in problem:
        return "blocks arrive damaged: replace the memory, network card or cable, or take the host out"
    return "see that both hosts reach each other at the addresses that the topology names, with no firewall between"


def _grouped(found: Sequence[tuple[str, Found]]) -> list[Finding]:
    """One finding for each cause and cure, in the order in which they came."""
    pairs: dict[Found, list[str]] = {}
    for pair, what in found:
        pairs.setdefault(what, []).append(pair)
    return [Finding(tuple(names), *what) for what, names in pairs.items()]

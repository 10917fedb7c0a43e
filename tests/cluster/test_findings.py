"""Promise: what will go wrong between two workers is told before traffic, with the pair, the cause and the cure."""

import io
import queue
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RaySystemError, RayTaskError
from rich.console import Console

from cluster.doctor import TOTAL, Examination, asking, blocks_of_a_test, examine, measure, measure_all, show
from cluster.errors import NoAnswer
from cluster.findings import Known, Measured, Pair, of_facts, of_measurements, pairs_of, to_measure
from messages.common import KVRank, KVShard, KVWay, Role, WorkerAddress
from messages.fingerprint import protocol
from messages.ids import Address, Epoch, RequestId, WorkerId
from runtime.core.probe import NO_ROOM, ProbeEnded
from runtime.facts import WorkerFacts

SHARD = KVShard(2, 8, 16, "float32", 4, 0, 4)  # a block is 2 layers x (K, V) x 4 heads x 16 tokens x 8 x 4 bytes
BLOCK_BYTES = 2 * 2 * 4 * 16 * 8 * 4


def rank(shard: KVShard, *ways: str, num_blocks: int = 1000, host: str = "here") -> KVRank:
    return KVRank(shard, num_blocks, host, tuple(KVWay(way) for way in ways or ("shm", "zmq")))


def worker(name: str, **facts: Any) -> WorkerFacts:
    role = Role(name.rpartition("-")[0])
    address = WorkerAddress(WorkerId(name), Epoch(1), Address("tcp://127.0.0.1:1"))
    known: dict[str, Any] = {
        "address": address, "role": role, "node": "here", "baton": "1.0", "torch": "2.12", "protocol": "abc",
        "ranks": (rank(SHARD),), "max_model_len": 4096,
    }  # fmt: skip
    return WorkerFacts(**(known | facts))


def sharded(*heads: tuple[int, int], **fields: Any) -> dict[str, Any]:
    """Ranks that hold these (first head, heads)."""
    return {
        "ranks": tuple(
            rank(msgspec.structs.replace(SHARD, first_head=first, num_heads=count, **fields)) for first, count in heads
        )
    }


def by(*ways: str, host: str = "here") -> dict[str, Any]:
    """Offers these transports, on this host."""
    return {"ranks": (rank(SHARD, *ways, host=host),), "node": host}


def probed(problem: str = "", num_bytes: int = 1000, push: float = 1.0, whole: float = 2.0) -> ProbeEnded:
    return ProbeEnded(RequestId("p"), problem, num_bytes, 0.1, push, whole)


@pytest.mark.parametrize(
    ("prefill", "decode", "cause", "cure"),
    [
        ({"baton": "0.9"}, {}, "prefill-0 has Baton 0.9, decode-0 has 1.0", "same release"),
        ({}, {"torch": "2.11"}, "prefill-0 has PyTorch 2.12, decode-0 has 2.11", "same release"),
        ({}, {"protocol": "xyz"}, "prefill-0 has protocol abc, decode-0 has xyz", "same release"),
        (by("zmq"), by("shm"), "the prefill worker offers zmq", "one kv.transport"),
        (by("shm"), by("shm", host="there"), "(prefill-0 is on here, decode-0 on there)", "zmq between hosts"),
        ({}, sharded((0, 4), num_layers=3), "KV of num_layers 2 cannot land in a pool of num_layers 3", "same model"),
        ({}, sharded((0, 4), head_dim=16), "head_dim 8", "same model"),
        ({}, sharded((0, 4), total_heads=8), "total_heads 4", "same model"),
        ({}, sharded((0, 4), block_size=32), "block_size 16", "one kv.block_size"),
        (sharded((0, 4), dtype="int8"), {}, "KV of dtype int8 cannot land", "kv_dtype: int8 for the decode pool"),
        (sharded((0, 2), (3, 1)), {}, "no rank of the sender has KV head 2", "all ranks of its tensor_parallel"),
    ],
)
def test_what_does_not_go_together_is_found(
    prefill: dict[str, Any], decode: dict[str, Any], cause: str, cure: str
) -> None:
    (found,) = of_facts([worker("prefill-0", **prefill), worker("decode-0", **decode)])
    assert found.pairs == ("prefill-0 -> decode-0",)
    assert cause in found.cause and cure in found.cure


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ({}, {}),
        (sharded((0, 2), (2, 2)), {}),
        ({}, sharded((0, 2), (2, 2))),
        ({}, sharded((0, 4), dtype="int8")),
        ({}, by("shm", "zmq", host="there")),
    ],
)
def test_what_goes_together_is_not_complained_about(prefill: dict[str, Any], decode: dict[str, Any]) -> None:
    assert of_facts([worker("prefill-0", **prefill), worker("decode-0", **decode)]) == []


def test_one_cause_is_told_once_with_all_its_pairs_and_colocated_workers_are_compared_too() -> None:
    old = [worker(f"prefill-{number}", baton="0.9", torch="2.12") for number in range(2)]
    found = of_facts([*old, worker("decode-0", address=old[0].address)])
    assert len(found) == 2  # the cause names the worker
    whole = [worker("colocated-0"), worker("colocated-1"), worker("colocated-2", torch="2.11")]
    (odd,) = of_facts(whole)
    assert odd.pairs == ("colocated-0 and colocated-2",)
    shards = sharded((0, 4), block_size=32)
    (layout,) = of_facts([worker("prefill-0"), worker("prefill-1"), worker("decode-0", **shards)])
    assert layout.pairs == ("prefill-0 -> decode-0", "prefill-1 -> decode-0")


@pytest.mark.parametrize(
    ("problem", "cure"),
    [
        ("3 blocks are still bad or missing", "replace the memory"),
        ("nothing came of it within 10 s", "the way between them"),
        ("connection refused", "at the addresses that the topology names"),
    ],
)
def test_a_transfer_that_failed_is_a_finding(problem: str, cure: str) -> None:
    pair = Pair("prefill-0", "decode-0")
    (found,) = of_measurements([Measured(pair, probed(), probed(problem))], {pair: "shm"})
    assert found.pairs == (str(pair),) and problem in found.cause and cure in found.cure


def test_a_pair_is_slow_beside_others_of_its_transport_only() -> None:
    pairs = {Pair("prefill-0", f"decode-{number}"): ("shm" if number < 3 else "zmq") for number in range(4)}
    seconds = (1.0, 3.9, 4.1, 100.0)
    measured = [Measured(pair, probed(), probed(push=push)) for pair, push in zip(pairs, seconds, strict=True)]
    (slow,) = of_measurements(measured, pairs)
    assert slow.pairs == ("prefill-0 -> decode-2",)
    assert "between prefill-0 -> decode-0" in slow.cause


@pytest.mark.parametrize(("prefills", "decodes", "most"), [(2, 2, 10), (3, 5, 5), (4, 4, 10), (7, 3, 9), (6, 4, 24)])
def test_where_pairs_are_too_many_every_worker_is_measured_as_often_as_any(
    prefills: int, decodes: int, most: int
) -> None:
    workers = [worker(f"prefill-{i}") for i in range(prefills)] + [worker(f"decode-{i}") for i in range(decodes)]
    chosen = to_measure(pairs_of(workers), most)
    assert len(chosen) == min(most, prefills * decodes)
    assert len({(one.worker, other.worker) for one, other in chosen}) == len(chosen)
    if most >= max(prefills, decodes):
        assert {each.worker for pair in chosen for each in pair} == {each.worker for each in workers}


def calls_of(probe: Callable[[int], ProbeEnded], workers: list[WorkerFacts]) -> tuple[Any, list[tuple[str, int]]]:
    """What the doctor calls; and of its probes whom, with how many blocks."""
    asked: list[tuple[str, int]] = []

    def call(name: str, method: str, *arguments: Any, within: float) -> Any:
        assert within > 0
        if method == "facts":
            return next(each for each in workers if each.worker == name)
        if method == "inspect":
            return {}
        assert method == "probe"
        asked.append((name, arguments[1]))
        return probe(arguments[1])

    return call, asked


def known(workers: list[WorkerFacts], *lost: str) -> list[Known]:
    """What the router says of them; these are ``lost``."""
    return [Known(each.worker, each.role, each.worker not in lost) for each in workers]


def said(found: Examination) -> str:
    """What the user reads."""
    console = Console(file=io.StringIO(), width=200)
    show(console, found)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_fastest_of_a_few_counts_and_after_a_failure_nothing_more_is_moved() -> None:
    prefill, decode = worker("prefill-0"), worker("decode-0")
    seconds = iter([3.0, 1.0, 2.0, 9.0, 6.0, 8.0])
    call, asked = calls_of(lambda count: probed(num_bytes=count, push=next(seconds)), [])
    measured = measure(prefill, decode, call)
    assert (measured.one_block.push_seconds, measured.many_blocks.push_seconds) == (1.0, 6.0)
    assert asked == [("prefill-0", 1)] * 3 + [("prefill-0", 125)] * 3
    call, asked = calls_of(lambda _: probed("refused"), [])
    assert measure(prefill, decode, call).problem == "refused" and len(asked) == 1


def test_a_test_is_small_beside_the_pools_the_context_and_the_link() -> None:
    prefill, decode = worker("prefill-0"), worker("decode-0")
    assert blocks_of_a_test(prefill, decode) == 125  # an eighth of the pool
    assert blocks_of_a_test(prefill, replace(decode, max_model_len=500)) == 31
    assert blocks_of_a_test(replace(prefill, ranks=(rank(SHARD, num_blocks=2),)), decode) == 1
    plenty = {"ranks": (rank(SHARD, num_blocks=1 << 20),), "max_model_len": 1 << 24}
    assert blocks_of_a_test(worker("prefill-0", **plenty), worker("decode-0", **plenty)) == (64 << 20) // BLOCK_BYTES


def test_only_pairs_that_go_together_are_measured() -> None:
    workers = [worker("prefill-0"), worker("decode-0"), worker("decode-1", **sharded((0, 4), head_dim=16))]
    call, asked = calls_of(lambda count: probed(num_bytes=count), workers)
    found = examine(known(workers), call)
    assert [each.pair for each in found.measured] == [Pair("prefill-0", "decode-0")] and len(asked) == 6
    assert [finding.pairs for finding in found.findings] == [("prefill-0 -> decode-1",)]
    told = msgspec.json.decode(msgspec.json.encode(found.to_json()))
    assert told["num_pairs"] == 2 and told["pairs"][0]["bytes_per_second"] == 125.0
    assert told["findings"][0].keys() == {"pairs", "cause", "cure"}


def test_no_room_now_is_no_fault_and_shrinks_the_test_to_what_there_is() -> None:
    workers = [worker("prefill-0"), worker("decode-0")]
    call, asked = calls_of(lambda count: probed(f"decode-0: {NO_ROOM}" if count > 10 else "", count), workers)
    found = examine(known(workers), call)
    assert [count for _, count in asked] == [1, 1, 1, 125, 31, 7, 7, 7]
    assert not found.findings and found.measured[0].many_blocks.num_bytes == 7 and "OK" in said(found)
    call, asked = calls_of(lambda _: probed(f"decode-0: {NO_ROOM}"), workers)
    found = examine(known(workers), call)
    assert not found.findings and len(asked) == 1
    assert f"not measured: decode-0: {NO_ROOM}" in said(found) and "0 of 1 pairs" in said(found)
    assert "OK" not in said(found) and found.to_json()["pairs"][0]["not_measured"] == f"decode-0: {NO_ROOM}"
    rounds = iter(["", f"decode-0: {NO_ROOM}", "", ""])
    call, asked = calls_of(lambda _: probed(next(rounds, "")), workers)
    assert not examine(known(workers), call).measured[0].problem, "one that arrived is enough"


def test_each_lost_worker_is_found_and_each_role_that_nobody_is_left_for() -> None:
    workers = [worker("prefill-0"), worker("decode-0"), worker("decode-1")]
    call, _ = calls_of(lambda count: probed(num_bytes=count), workers)
    found = examine(known(workers, "decode-0"), call)
    assert [finding.pairs for finding in found.findings] == [("decode-0",)]
    assert "the router hears nothing of it" in found.findings[0].cause and "its log" in found.findings[0].cure
    assert [each.pair for each in found.measured] == [Pair("prefill-0", "decode-1")] and "OK" not in said(found)
    found = examine(known(workers, "decode-0", "decode-1"), call)
    assert [finding.pairs for finding in found.findings] == [("decode-0",), ("decode-1",), ("decode",)]
    assert "no worker of this role is alive" in found.findings[-1].cause and "OK" not in said(found)
    assert [finding.pairs for finding in examine([], call).findings] == [("prefill",), ("decode",)]


def test_a_colocated_cluster_needs_no_other_role_but_some_worker() -> None:
    workers = [worker("colocated-0"), worker("colocated-1")]
    call, _ = calls_of(lambda _: probed(), workers)
    found = examine(known(workers), call)
    assert not found.findings and "OK" in said(found) and "nothing to measure" in said(found)
    found = examine(known(workers, "colocated-0", "colocated-1"), call)
    assert [finding.pairs for finding in found.findings] == [("colocated-0",), ("colocated-1",), ("colocated",)]


def silent_at(*calls: tuple[str, str]) -> tuple[Any, list[tuple[str, str]]]:
    """What the doctor calls, where these (worker, method) get no answer; and what it has asked."""
    asked: list[tuple[str, str]] = []

    def call(name: str, method: str, *arguments: Any, within: float) -> Any:
        asked.append((name, method))
        if (name, method) in calls:
            raise NoAnswer("no answer", "wake it")
        if method == "probe":
            decode: WorkerAddress = arguments[0]
            lost = (decode.worker, "inspect") in calls
            return probed("nothing came of it within 10 s" if lost else "", num_bytes=arguments[1])
        return worker(name) if method == "facts" else {}

    return call, asked


def named(*names: str) -> list[Known]:
    return [Known(name, Role(name.rpartition("-")[0])) for name in names]


FOUR = ("prefill-0", "prefill-1", "decode-0", "decode-1")


def test_a_worker_that_says_nothing_keeps_no_other_from_being_examined() -> None:
    call, _ = silent_at(("decode-0", "facts"))
    noted: list[tuple[str, str]] = []
    found = examine(named(*FOUR), call, lambda who, what: noted.append((who, what)))
    assert ("workers", "asking 4") in noted and ("pairs", "prefill-1 -> decode-1, 2 of 2") in noted
    assert [(each.pairs, each.cause, each.cure) for each in found.findings] == [
        (("decode-0",), "no answer", "wake it"),
    ]
    assert [each.pair.decode for each in found.measured if each.bytes_per_second] == ["decode-1"] * 2


def test_a_worker_that_falls_silent_while_it_is_measured_is_not_asked_again() -> None:
    call, asked = silent_at(("prefill-0", "probe"))
    found = examine(named(*FOUR), call)
    (lost,) = found.findings
    assert lost.pairs == ("prefill-0 -> decode-0", "prefill-0 -> decode-1")
    assert "prefill-0: no answer" in lost.cause and lost.cure == "wake it"
    assert asked.count(("prefill-0", "probe")) == 1
    assert [each.pair.prefill for each in found.measured if each.bytes_per_second] == ["prefill-1"] * 2


def test_a_receiver_that_falls_silent_is_told_from_a_way_that_is_cut() -> None:
    call, asked = silent_at(("decode-1", "inspect"))
    found = examine(named(*FOUR), call)
    (lost,) = found.findings
    assert lost.pairs == ("prefill-0 -> decode-1", "prefill-1 -> decode-1")
    assert "decode-1: no answer" in lost.cause and lost.cure == "wake it"
    assert asked.count(("decode-1", "inspect")) == 1
    assert [each.pair.decode for each in found.measured if each.bytes_per_second] == ["decode-0"] * 2


def test_an_examination_ends() -> None:
    workers = [worker(f"{role}-{number}") for role in ("prefill", "decode") for number in range(3)]
    now = iter(range(0, 1000, int(TOTAL) // 2))
    call, asked = calls_of(lambda count: probed(num_bytes=count), workers)
    measured = measure_all(pairs_of(workers), call, clock=lambda: float(next(now)))
    assert len(measured) == 9 and len(asked) == 2 * 6
    assert [each.not_measured for each in measured] == [""] * 2 + ["no time was left for it"] * 7


def failed_with(cause: Exception) -> Exception:
    error: Exception = RayTaskError("facts", "its traceback", cause).as_instanceof_cause()
    return error


@pytest.mark.parametrize(
    ("raised", "cause", "cure"),
    [
        (lambda: GetTimeoutError("Get timed out"), "no answer within 3 s", "kill -CONT"),
        (lambda: ActorDiedError(), "its process is gone", "the log"),
        (lambda: ActorUnavailableError("cut", None), "its process is gone", "the log"),
        (lambda: ValueError("Failed to look up actor with name 'decode-0'"), "its process is gone", "the log"),
        (lambda: RaySystemError("no raylet\nand more"), "Ray does not reach it: RaySystemError", "the log"),
        (lambda: failed_with(TimeoutError("the step loop does not answer")), "the step loop does not", "kill -CONT"),
        (lambda: failed_with(ValueError("odd\nand more")), "it fails at 'facts': ValueError: odd", "the log"),
        (lambda: failed_with(queue.Empty()), "it fails at 'facts': Empty", "the log"),
    ],
)
def test_what_ray_raises_of_a_worker_is_told_in_a_line(raised: Callable[[], Exception], cause: str, cure: str) -> None:
    def call(name: str, method: str, *, within: float) -> Any:
        raise raised()

    with pytest.raises(NoAnswer) as error:
        asking(call)("decode-0", "facts", within=3.0)
    assert cause in error.value.cause and cure in error.value.cure and "\n" not in str(error.value)


def test_the_protocol_has_a_name_that_every_process_finds_alike() -> None:
    assert len(protocol()) == 12 and protocol.__wrapped__() == protocol()

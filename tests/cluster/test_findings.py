"""Promise: what will go wrong between two workers is told before traffic, with the pair, the cause and the cure."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from cluster.doctor import blocks_of_a_test, examine, measure
from cluster.findings import Measured, Pair, of_facts, of_measurements, pairs_of, to_measure
from messages.common import KVRank, KVShard, KVWay, Role, WorkerAddress
from messages.fingerprint import protocol
from messages.ids import Address, Epoch, RequestId, WorkerId
from runtime.core.probe import ProbeEnded
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
        ("no free blocks for a probe", "less traffic"),
        ("nothing came of it within 10 s", "firewall"),
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

    def call(name: str, method: str, *arguments: Any) -> Any:
        if method == "facts":
            return next(each for each in workers if each.worker == name)
        assert method == "probe"
        asked.append((name, arguments[1]))
        return probe(arguments[1])

    return call, asked


def test_the_fastest_of_a_few_counts_and_after_a_failure_nothing_more_is_moved() -> None:
    prefill, decode = worker("prefill-0"), worker("decode-0")
    seconds = iter([3.0, 1.0, 2.0, 9.0, 6.0, 8.0])
    call, asked = calls_of(lambda count: probed(num_bytes=count, push=next(seconds)), [])
    measured = measure(prefill, decode, call)
    assert (measured.one_block.push_seconds, measured.many_blocks.push_seconds) == (1.0, 6.0)
    assert asked == [("prefill-0", 1)] * 3 + [("prefill-0", 250)] * 3
    call, asked = calls_of(lambda _: probed("refused"), [])
    assert measure(prefill, decode, call).problem == "refused" and len(asked) == 1


def test_a_test_is_small_beside_the_pools_the_context_and_the_link() -> None:
    prefill, decode = worker("prefill-0"), worker("decode-0")
    assert blocks_of_a_test(prefill, decode) == 250  # a quarter of the pool
    assert blocks_of_a_test(prefill, replace(decode, max_model_len=500)) == 31
    assert blocks_of_a_test(replace(prefill, ranks=(rank(SHARD, num_blocks=2),)), decode) == 1
    plenty = {"ranks": (rank(SHARD, num_blocks=1 << 20),), "max_model_len": 1 << 24}
    assert blocks_of_a_test(worker("prefill-0", **plenty), worker("decode-0", **plenty)) == (64 << 20) // BLOCK_BYTES


def test_only_pairs_that_go_together_are_measured() -> None:
    workers = [worker("prefill-0"), worker("decode-0"), worker("decode-1", **sharded((0, 4), head_dim=16))]
    call, asked = calls_of(lambda count: probed(num_bytes=count), workers)
    found = examine([each.worker for each in workers], call)
    assert [each.pair for each in found.measured] == [Pair("prefill-0", "decode-0")] and len(asked) == 6
    assert [finding.pairs for finding in found.findings] == [("prefill-0 -> decode-1",)]
    told = msgspec.json.decode(msgspec.json.encode(found.to_json()))
    assert told["num_pairs"] == 2 and told["pairs"][0]["bytes_per_second"] == 250.0
    assert told["findings"][0].keys() == {"pairs", "cause", "cure"}


def test_the_protocol_has_a_name_that_every_process_finds_alike() -> None:
    assert len(protocol()) == 12 and protocol.__wrapped__() == protocol()

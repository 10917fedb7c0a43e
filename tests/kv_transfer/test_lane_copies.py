"""Promise: over every transport, whatever heads a lane has and whatever dtype it lands in, each record that arrives is
what the slow, obvious way makes of it, and nothing else is written."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from engine.core.kv_layout import QUANTIZED_MAX
from engine.kernels.reference import quantize_blocks
from engine.kv_cache import KVCache
from kv_transfer.core.digest import combined, digests, mismatches
from kv_transfer.core.events import Pushed, TransferKey
from kv_transfer.core.fanout import DigestLane, LaneDigested
from kv_transfer.core.lanes import Heads, Lane, Layers, layout_of, plan_lanes
from kv_transfer.transports.build import TRANSPORTS, allocate_pool, make_receiver, make_sender
from kv_transfer.transports.records import LaneCopy
from messages.common import KVRank, KVShard
from runtime.kv_port import FromRank, RankPort
from tests.kv_transfer.kv_pair import Events, key, scattered
from tests.kv_transfer.test_lanes import split

NUM_BLOCKS, LAYERS, HEAD_DIM, BLOCK_SIZE = 24, 3, 8, 4
VALUES = HEAD_DIM * BLOCK_SIZE
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {**FLOATS, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def with_dtype(shards: list[KVShard], dtype: str) -> list[KVShard]:
    return [
        KVShard(LAYERS, HEAD_DIM, BLOCK_SIZE, dtype, each.total_heads, each.first_head, each.num_heads)  # type: ignore[arg-type]
        for each in shards
    ]


def record(pool: Any, shard: KVShard, block: int, layer: int, side: int, head: int) -> Any:
    """One record's bytes, found by counting."""
    size = layout_of(shard).record_bytes
    place = ((layer * 2 + side) * shard.num_heads + head - shard.first_head) * size
    return pool[block, place : place + size]


def expected(made: Any, source: str, target: str) -> bytes:
    """The record that one of dtype ``target`` should be, from the bytes of one of ``source``."""
    if source == target:
        return bytes(made)
    values = torch.frombuffer(bytearray(made), dtype=STORED[source]).float()
    if target in FLOATS:
        return values.to(FLOATS[target]).view(torch.uint8).numpy().tobytes()
    largest = QUANTIZED_MAX[target]
    scale = (values.abs().max() / largest).item()
    stored = torch.tensor(np.array([np.float32(value) / np.float32(scale or 1) for value in values.tolist()]))
    stored = stored.clamp(-largest, largest)
    if target == "int8":
        stored = stored.round()  # to nearest even
    data = stored.to(STORED[target]).view(torch.uint8).numpy().tobytes()
    return data + np.array([scale, 0, 0, 0], np.float32).tobytes()


def fill(pools: list[Any], shards: list[KVShard], seed: int) -> dict[tuple[int, int, int, int], bytes]:
    """Random records, the same on ranks that hold the same head; by block, layer, side and head."""
    rng = np.random.default_rng(seed)
    truth = {}
    for place in itertools.product(range(NUM_BLOCKS), range(LAYERS), (0, 1), range(shards[0].total_heads)):
        truth[place] = made_record(rng, shards[0].dtype)
        for pool, shard in zip(pools, shards, strict=True):
            if shard.first_head <= place[3] < shard.first_head + shard.num_heads:
                record(pool, shard, *place)[:] = np.frombuffer(truth[place], np.uint8)
    return truth


def made_record(rng: np.random.Generator, dtype: str) -> bytes:
    if dtype not in FLOATS:
        return rng.integers(0, 256, VALUES, np.uint8).tobytes() + np.array([rng.random(), 0, 0, 0], "f4").tobytes()
    values = torch.from_numpy(rng.standard_normal(VALUES).astype(np.float32))
    values *= (
        float(rng.choice([0.0, 1e-43, 1e-30, 0.01, 1.0, 300.0])) if dtype != "float16" else float(rng.choice([0, 1.0]))
    )
    return values.to(FLOATS[dtype]).view(torch.uint8).numpy().tobytes()


class Workers:
    """The ranks of a sending and of a receiving worker, each with a pool and a transport of its own."""

    def __init__(self, transport: str, senders: list[KVShard], receivers: list[KVShard]) -> None:
        self.shards = senders, receivers
        self.memories = [
            [allocate_pool(transport, NUM_BLOCKS, layout_of(shard).block_bytes) for shard in side]
            for side in self.shards
        ]
        self.here, self.there = ([memory.pool for memory in side] for side in self.memories)
        for pool in self.there:
            pool[:] = 7
        self.sent, self.received = [[Events() for _ in side] for side in self.shards]
        self.senders = [
            make_sender(transport, pool, shard, events.put)
            for pool, shard, events in zip(self.here, senders, self.sent, strict=True)
        ]
        self.receivers = [
            make_receiver(transport, "127.0.0.1", memory, shard, events.put)
            for memory, shard, events in zip(self.memories[1], receivers, self.received, strict=True)
        ]
        self.lanes = plan_lanes(senders, receivers)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for end in (*self.senders, *self.receivers):
            end.shutdown()
        self.here, self.there = [], []
        for memory in itertools.chain(*self.memories):
            memory.release()

    def open(self, of: TransferKey, first: int, target: Any) -> None:
        for rank, receiver in enumerate(self.receivers):
            receiver.open(of, first, target, tuple(lane.heads for lane in self.lanes if lane.receiver == rank))

    def push(self, of: TransferKey, lane: Lane, first: int, source: Any, target: Any) -> Pushed:
        self.senders[lane.sender].push(of, self.receivers[lane.receiver].endpoint, lane.heads, first, source, target)
        pushed = self.sent[lane.sender].next()
        assert pushed == Pushed(of, first, len(source))
        return pushed

    def digests(self, receiving: bool, of: TransferKey, first: int, blocks: Any) -> bytes:
        """As the ranks take them and rank 0 puts them together."""
        events = Events()
        shards, pools = self.shards[receiving], (self.there if receiving else self.here)
        ports = [
            RankPort(rank, pools[rank], KVRank(shard, NUM_BLOCKS, "host"), events.put)
            for rank, shard in enumerate(shards)
        ]
        for number, lane in enumerate(self.lanes):
            target = self.shards[1][lane.receiver]
            port = ports[lane.receiver if receiving else lane.sender]
            port.perform(DigestLane(of, number, target, lane.heads, first, blocks))
        taken: dict[int, bytes] = {}
        while len(taken) < len(self.lanes):
            answer = events.next()
            assert isinstance(answer, FromRank) and isinstance(answer.event, LaneDigested), answer
            taken[answer.event.number] = answer.event.digests
        for port in ports:
            port.close()
        return combined([taken[number] for number in range(len(self.lanes))])


PAIRS = [("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int8"), ("fp8", "fp8"), ("float32", "bfloat16"),
         ("bfloat16", "float16"), ("float16", "float32"), ("float32", "int8"), ("bfloat16", "int8"),
         ("bfloat16", "fp8"), ("float16", "fp8")]  # fmt: skip
DEGREES = [(1, 1, 3), (2, 1, 4), (1, 2, 4), (2, 4, 4), (4, 2, 4), (2, 2, 4), (4, 2, 2), (1, 4, 2), (2, 3, 5), (3, 2, 7)]
"""Ranks that send, ranks that receive, KV heads."""


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_what_arrives_is_what_the_obvious_way_makes_of_it(transport: str, degrees: tuple[int, int, int]) -> None:
    for case, (source_dtype, target_dtype) in enumerate(PAIRS):
        sending, receiving, heads = degrees
        senders = with_dtype(split(sending, heads), source_dtype)
        receivers = with_dtype(split(receiving, heads), target_dtype)
        source, target = scattered(case, 11, NUM_BLOCKS), scattered(case + 1, 11, NUM_BLOCKS)
        source[:3] = [4, 5, 6]  # a run, too
        with Workers(transport, senders, receivers) as workers:
            truth = fill(workers.here, senders, case)
            workers.open(key(), 2, target)
            for begin, end in ((0, 4), (4, 11)):
                for lane in workers.lanes:
                    workers.push(key(), lane, 2 + begin, source[begin:end], target[begin:end])
            for rank, shard in enumerate(receivers):
                pool = workers.there[rank]
                for place, (here, there) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
                    for layer, side, head in itertools.product(range(LAYERS), (0, 1), range(shard.num_heads)):
                        of = (layer, side, shard.first_head + head)
                        got = bytes(record(pool, shard, there, *of))
                        assert got == expected(np.frombuffer(truth[here, *of], np.uint8), source_dtype, target_dtype), (
                            source_dtype, target_dtype, place, of,
                        )  # fmt: skip
                assert (np.delete(pool, target, axis=0) == 7).all()
            landed = [workers.received[rank].landed(11) for rank in range(receiving) if transport != "shm"]
            for events in landed:
                assert sorted(np.concatenate([event.indices for event in events]).tolist()) == [*range(2, 13)]
            assert all(events.empty for events in workers.received)
            assert workers.digests(False, key(), 2, source) == workers.digests(True, key(), 2, target)


@pytest.mark.parametrize("degrees", [(2, 1, 4), (1, 2, 4), (4, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_flipped_bit_of_any_lane_changes_the_digest_of_its_block_alone(
    degrees: tuple[int, int, int], dtype: str
) -> None:
    sending, receiving, heads = degrees
    senders, receivers = with_dtype(split(sending, heads), "bfloat16"), with_dtype(split(receiving, heads), dtype)
    blocks = scattered(1, 9, NUM_BLOCKS)
    with Workers("inproc", senders, receivers) as workers:
        fill(workers.here, senders, 1)
        workers.open(key(), 0, blocks)
        for lane in workers.lanes:
            workers.push(key(), lane, 0, blocks, blocks)
        truth = workers.digests(False, key(), 0, blocks)
        rng = np.random.default_rng(2)
        for rank in range(receiving):
            for _ in range(20):
                place, byte = int(rng.integers(9)), int(rng.integers(workers.there[rank].shape[1]))
                workers.there[rank][blocks[place], byte] ^= 1 << int(rng.integers(8))
                assert mismatches(truth, workers.digests(True, key(), 0, blocks)).tolist() == [place]
                for lane in workers.lanes:
                    workers.push(key(), lane, place, blocks[place : place + 1], blocks[place : place + 1])
                assert truth == workers.digests(True, key(), 0, blocks)


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", ["int8", "fp8"])
def test_what_is_quantised_on_its_way_is_what_the_kernels_would_store(source: str, target: str) -> None:
    (here,), (there,) = with_dtype(split(1, 4), source), with_dtype(split(1, 4), target)
    pool = np.zeros((NUM_BLOCKS, layout_of(here).block_bytes), np.uint8)
    fill([pool], [here], seed=4)
    landed, stored = (np.zeros((NUM_BLOCKS, layout_of(there).block_bytes), np.uint8) for _ in range(2))
    blocks = scattered(1, 9, NUM_BLOCKS)
    LaneCopy(pool, here, there, Heads(0, 4)).write(landed, blocks, blocks)
    cache, computed = (
        KVCache(layout_of(there), torch.from_numpy(stored)),
        KVCache(layout_of(here), torch.from_numpy(pool)),
    )
    assert cache.scales is not None
    for block in blocks.tolist():
        counts = torch.tensor([BLOCK_SIZE])
        data, scales = cache.data[block : block + 1], cache.scales[block : block + 1]
        quantize_blocks(computed.data, torch.tensor([block]), counts, data, scales)
    got = KVCache(layout_of(there), torch.from_numpy(landed))
    assert got.scales is not None
    assert torch.equal(got.scales, cache.scales)
    assert torch.equal(got.data.float(), cache.data.float())


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_are_none_spoil_their_own_record_only(bad: float) -> None:
    (here,), (there,) = with_dtype(split(1, 2), "float32"), with_dtype(split(1, 2), "int8")
    pool = np.zeros((2, layout_of(here).block_bytes), np.uint8)
    pool.view(np.float32)[:] = 3.0
    record(pool, here, 0, 1, 0, 1).view(np.float32)[5] = bad
    landed = np.zeros((2, layout_of(there).block_bytes), np.uint8)
    LaneCopy(pool, here, there, Heads(0, 2)).write(landed, np.arange(2, dtype=np.int32), np.arange(2, dtype=np.int32))
    record(landed, there, 0, 1, 0, 1)[:VALUES] = 127
    record(landed, there, 0, 1, 0, 1)[VALUES:].view(np.float32)[0] = np.float32(3) / np.float32(127)
    cache = KVCache(layout_of(there), torch.from_numpy(landed))
    assert cache.scales is not None and (cache.data == 127).all()
    assert (cache.scales == np.float32(3) / np.float32(127)).all()


def test_one_rank_that_keeps_the_same_hashes_its_blocks_as_they_lie() -> None:
    shards = with_dtype(split(1, 3), "float32")
    blocks = scattered(1, 9, NUM_BLOCKS)
    with Workers("inproc", shards, shards) as workers:
        fill(workers.here, shards, 1)
        assert workers.digests(False, key(), 4, blocks) == digests(
            workers.here[0], blocks, key(), 4, Layers(0, LAYERS), workers.lanes[0].heads
        )


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_quantised_hand_over_puts_half_the_bytes_on_the_wire(transport: str) -> None:
    """Counted where they are written or sent, scales included: their 16 bytes a record are little beside its values."""
    pushed = {}
    for dtype in ("bfloat16", "int8", "fp8"):
        shard = KVShard(2, 64, 16, "bfloat16", 2, 0, 2)
        target = KVShard(2, 64, 16, dtype, 2, 0, 2)  # type: ignore[arg-type]
        blocks = scattered(1, 10, NUM_BLOCKS)
        with Workers(transport, [shard], [target]) as workers:
            workers.open(key(), 0, blocks)
            pushed[dtype] = workers.push(key(), workers.lanes[0], 0, blocks, blocks).num_bytes
    assert pushed["bfloat16"] == 10 * 2 * 2 * 2 * 16 * 64 * 2
    assert pushed["int8"] == pushed["fp8"] <= 0.51 * pushed["bfloat16"]


@pytest.mark.parametrize("transport", ["inproc", "zmq"])
def test_only_lanes_that_are_open_can_be_written(transport: str) -> None:
    senders, receivers = with_dtype(split(1, 4), "float32"), with_dtype(split(1, 4), "float32")
    blocks = scattered(1, 5, NUM_BLOCKS)
    with Workers(transport, senders, receivers) as workers:
        workers.receivers[0].open(key(), 0, blocks, (Heads(0, 1), Heads(1, 3)))
        for heads in (Heads(0, 4), Heads(0, 2), Heads(2, 2), Heads(1, 2)):
            workers.push(key(), Lane(0, 0, heads), 0, blocks, blocks)
        assert (workers.there[0] == 7).all()
        workers.push(key(), Lane(0, 0, Heads(1, 3)), 0, blocks, blocks)
        assert workers.received[0].empty  # the other lane is still to come
        workers.push(key(), Lane(0, 0, Heads(0, 1)), 0, blocks, blocks)
        assert workers.received[0].next().indices.tolist() == [0, 1, 2, 3, 4]
        assert workers.received[0].empty

"""Promise: a GPU copies and converts a lane to the byte as the host does, but for the sign of an fp8 zero: here in
Triton's interpreter, where there is no GPU."""

from typing import Any

import numpy as np
import pytest
import torch

from kv_transfer.core.lanes import CannotPair, Heads, Layers, layout_of, plan_lanes
from kv_transfer.transports.device_lane import STAGED_BYTES, DeviceLane
from kv_transfer.transports.records import LaneCopy
from messages.common import KVShard
from tests.kernels.cases import DEVICE
from tests.kv_transfer.kv_pair import scattered
from tests.kv_transfer.test_lane_copies import LAYERS, NUM_BLOCKS, PAIRS, fill, with_dtype
from tests.kv_transfer.test_lanes import split


def pool_of(shard: KVShard) -> Any:
    return np.full((NUM_BLOCKS, layout_of(shard).block_bytes), 7, np.uint8)


@pytest.mark.parametrize("degrees", [(1, 1, 3), (2, 1, 4), (1, 2, 4), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("layers", [Layers(0, LAYERS), Layers(1, 2)])
def test_what_the_device_writes_is_what_the_host_writes(degrees: tuple[int, int, int], layers: Layers) -> None:
    sending, receiving, heads = degrees
    for case, (source_dtype, target_dtype) in enumerate(PAIRS):
        senders = with_dtype(split(sending, heads), source_dtype)
        receivers = with_dtype(split(receiving, heads), target_dtype)
        here = [pool_of(shard) for shard in senders]
        fill(here, senders, case)
        expected = [pool_of(shard) for shard in receivers]
        there = [torch.from_numpy(pool.copy()).to(DEVICE) for pool in expected]
        source, target = scattered(case, 2, NUM_BLOCKS), scattered(case + 1, 2, NUM_BLOCKS)
        for lane in plan_lanes(senders, receivers):
            way = (senders[lane.sender], receivers[lane.receiver], lane.heads)
            LaneCopy(here[lane.sender], *way).write(expected[lane.receiver], target, source, layers)
            copy = DeviceLane(torch.from_numpy(here[lane.sender]).to(DEVICE), *way)
            copy.write(there[lane.receiver], target, source, layers)
        for made, wanted in zip((pool.cpu().numpy() for pool in there), expected, strict=True):
            if source_dtype != target_dtype == "fp8":
                made[made == 0x80], wanted[wanted == 0x80] = 0, 0
            np.testing.assert_array_equal(made, wanted, f"{source_dtype} to {target_dtype}")


def test_what_has_to_be_converted_goes_in_parts_that_memory_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    (sender,), (receiver,) = with_dtype(split(1, 2), "bfloat16"), with_dtype(split(1, 2), "int8")
    here, expected = pool_of(sender), pool_of(receiver)
    fill([here], [sender], 0)
    there = torch.from_numpy(expected.copy()).to(DEVICE)
    source, target, layers = scattered(1, 7), scattered(2, 7), Layers(0, LAYERS)
    source, target = source % NUM_BLOCKS, np.arange(7, dtype=np.int32)
    assert layout_of(receiver).block_bytes * 7 < STAGED_BYTES
    monkeypatch.setattr("kv_transfer.transports.device_lane.STAGED_BYTES", 2 * layout_of(receiver).block_bytes)
    LaneCopy(here, sender, receiver, Heads(0, 2)).write(expected, target, source, layers)
    DeviceLane(torch.from_numpy(here).to(DEVICE), sender, receiver, Heads(0, 2)).write(there, target, source, layers)
    np.testing.assert_array_equal(there.cpu().numpy(), expected)


def test_what_cannot_be_a_lane_is_refused_with_the_reason() -> None:
    (sender,), (receiver,) = with_dtype(split(1, 2), "int8"), with_dtype(split(1, 2), "bfloat16")
    pool = torch.zeros((2, layout_of(sender).block_bytes), dtype=torch.uint8)
    with pytest.raises(CannotPair, match="int8 cannot land in a pool of bfloat16"):
        DeviceLane(pool, sender, receiver, Heads(0, 2))
    with pytest.raises(CannotPair, match="heads 1 to 2 are not all in"):
        DeviceLane(pool, sender, sender, Heads(1, 2))
    with pytest.raises(CannotPair, match="are not those of"):
        DeviceLane(pool, receiver, receiver, Heads(0, 2))

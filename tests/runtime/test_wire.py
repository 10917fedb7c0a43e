"""Promise: steps and KV commands arrive on another rank as they left, and nothing else gets through."""

import numpy as np
import pytest

from engine.core.moves import BlockMoves, pairs
from engine.core.step_input import StepInput
from kv_transfer.core.events import Landed, Live, Pushed, PushFailed, TransferKey
from kv_transfer.core.fanout import DigestLane, LaneDigested, OpenLanes, PushLane
from kv_transfer.core.lanes import Heads
from kv_transfer.core.session import CancelPushes, CloseLanding, LandingOpened
from messages.codec import BadMessage
from messages.common import KVEndpoint, KVShard, WorkerAddress
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from runtime.core.actions import ForgetPeer, Send
from runtime.core.rank_wire import RANK_COMMANDS, RANK_EVENTS
from runtime.core.wire import Wire

KEY = TransferKey(RequestId("a" * 32), Attempt(3))
SHARD = KVShard(2, 64, 16, "bfloat16", 8, 4, 4)
BLOCKS = np.array([7, 3, 9], np.int32)
PEER = WorkerAddress(WorkerId("decode-0"), Epoch(5), Address("tcp://127.0.0.1:1"))
COMMANDS = [
    PushLane(KEY, KVEndpoint("shm", "there", SHARD, 4), Heads(4, 2), 1, BLOCKS, BLOCKS[::-1].copy(), Live.RUNNING),
    OpenLanes(KEY, "zmq", 0, BLOCKS, (Heads(0, 1), Heads(1, 3))),
    DigestLane(KEY, 1, SHARD, Heads(4, 4), 0, BLOCKS),
    CancelPushes(KEY, "shm"),
    CloseLanding(KEY),
    ForgetPeer(PEER),
]
EVENTS = [
    Pushed(KEY, 0, 3, 4096), PushFailed(KEY, "no such peer"), Landed(KEY, BLOCKS), LandingOpened(KEY),
    LaneDigested(KEY, 1, 0, b"digests"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("wire", "value"), [(RANK_COMMANDS, value) for value in COMMANDS] + [(RANK_EVENTS, value) for value in EVENTS]
)
def test_commands_and_events_arrive_as_they_left(wire: Wire, value: object) -> None:
    arrived = wire.unpack(*wire.pack(value))
    assert type(arrived) is type(value)
    np.testing.assert_equal(as_list(arrived), as_list(value))


def as_list(value: object) -> list[object]:
    fields = value if isinstance(value, tuple) else [getattr(value, name) for name in value.__dataclass_fields__]  # type: ignore[attr-defined]
    return list(fields)


def test_a_step_arrives_whole_whatever_was_computed_from_it_before() -> None:
    step = StepInput(
        tokens=np.array([5, 6, 7], np.int32), num_tokens=np.array([1, 2], np.int32),
        num_computed=np.array([4, 0], np.int32), block_tables=np.array([[1, 2], [3, 3]], np.int32),
        logit_rows=np.array([0, 2], np.int32), num_sampled=2, moves=BlockMoves(copies=pairs([(1, 2)])),
    )  # fmt: skip
    assert len(step.positions) == 3
    wire = Wire(StepInput)
    arrived = wire.unpack(*wire.pack(step))
    for name in ("tokens", "num_tokens", "num_computed", "block_tables", "logit_rows", "num_sampled", "positions"):
        np.testing.assert_array_equal(getattr(arrived, name), getattr(step, name))
    np.testing.assert_array_equal(arrived.moves.copies, [[1, 2]])
    assert arrived.moves.swap_in.shape == (0, 2)


def test_what_is_not_in_the_table_is_neither_sent_nor_taken() -> None:
    with pytest.raises(TypeError, match="Send does not go from rank to rank"):
        RANK_COMMANDS.pack(Send(PEER.mailbox, PEER))
    with pytest.raises(BadMessage, match="does not go from rank to rank"):
        RANK_COMMANDS.unpack("Send", b"")
    kind, body = RANK_COMMANDS.pack(COMMANDS[0])
    with pytest.raises(BadMessage):
        RANK_COMMANDS.unpack("OpenLanes", body)
    with pytest.raises(BadMessage):
        RANK_COMMANDS.unpack(kind, body[:-2])


@pytest.mark.parametrize(
    "spoil", [lambda body: body.replace(b"\x03", b"\x04", 1), lambda body: body.replace(b"\xc4\x0c", b"\xc4\x0b")[:-1]]
)
def test_an_array_whose_bytes_are_not_its_shape_is_refused(spoil: object) -> None:
    kind, body = RANK_EVENTS.pack(Landed(TransferKey(RequestId("b"), Attempt(1)), BLOCKS))
    with pytest.raises(BadMessage):
        RANK_EVENTS.unpack(kind, spoil(body))  # type: ignore[operator]

"""Promise: what a step is about to compute leaves layer by layer, no layer before it is there, and lands as one."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from engine.layer_gate import LayerGate, StepLayers
from kv_transfer.core.events import Cancelled, Pushed, PushFailed
from kv_transfer.core.lanes import layout_of
from kv_transfer.transports import zmq
from messages.common import KVShard
from tests.kv_transfer.kv_pair import WAIT, Pair, key, scattered
from tests.kv_transfer.test_transports import TWO_SIDED, MakePair, every_transport

LAYERS, COUNT = 6, 10
SHARD = KVShard(LAYERS, 8, 4, "float16", 4, 0, 4)
HALF = replace(SHARD, first_head=2, num_heads=2)
PARTS = layout_of(SHARD).layer_bytes


class Live:
    """A pair, and a step that computes ten blocks of the sender's: garbage stands there before."""

    def __init__(self, make_pair: MakePair, transport: str, wrapped: bool = False, into: KVShard = SHARD) -> None:
        self.pair: Pair = make_pair(transport, wrapped, shards=(SHARD, into))
        self.source, self.target = scattered(1, COUNT), scattered(2, COUNT)
        floats = np.random.default_rng(3).standard_normal((COUNT, self.pair.here.shape[1] // 2)).astype(np.float16)
        self.computed = floats.view(np.uint8)
        self.gate = LayerGate(LAYERS)
        self.pair.open(key(), 3, self.target)

    def push(self, layers: StepLayers | None) -> None:
        self.pair.push(key(), 3, self.source, self.target, layers=layers)

    def compute(self, layers: StepLayers, upto: int) -> None:
        part = slice(layers.num_ready * PARTS, upto * PARTS)
        self.pair.here[self.source, part] = self.computed[:, part]
        layers.advance(upto)

    def there(self, num_layers: int) -> bool:
        """Whether just so many layers stand at the receiver's."""
        rows, upto = self.pair.there[self.target], num_layers * PARTS
        return bool((rows[:, :upto] == self.computed[:, :upto]).all() and not rows[:, upto:].any())


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not done():
        assert time.monotonic() < deadline, "waited in vain"


@every_transport
def test_a_layer_leaves_when_it_is_there_and_not_before(transport: str, wrapped: bool, make_pair: MakePair) -> None:
    live = Live(make_pair, transport, wrapped)
    with live.gate.step() as layers:
        live.push(layers)
        for upto in (1, 2, 5):
            live.compute(layers, upto)
            until(lambda: live.there(upto))  # noqa: B023
            assert live.pair.sent.empty
            assert live.pair.received.empty
        live.compute(layers, LAYERS)
    pushed = live.pair.sent.next()
    assert pushed == Pushed(key(), 3, COUNT)
    assert pushed.num_bytes == live.computed.nbytes
    assert pushed.early_bytes <= 5 * COUNT * PARTS and pushed.at <= time.monotonic()
    if not live.pair.receiver.one_sided:
        assert [event.indices.tolist() for event in live.pair.received.landed(COUNT)] == [[*range(3, 3 + COUNT)]]
    assert live.there(LAYERS)


@every_transport
def test_a_push_may_join_the_step_that_runs(transport: str, wrapped: bool, make_pair: MakePair) -> None:
    live = Live(make_pair, transport, wrapped)
    with live.gate.step() as layers:
        live.compute(layers, 2)
        assert live.there(0) and live.gate.current is layers
        live.push(layers)
        for upto in (2, 3):
            live.compute(layers, upto)
            until(lambda: live.there(upto))  # noqa: B023
            assert live.pair.sent.empty
        live.compute(layers, LAYERS)
    pushed = live.pair.sent.next()
    assert pushed == Pushed(key(), 3, COUNT) and pushed.num_bytes == live.computed.nbytes
    if not live.pair.receiver.one_sided:
        assert [event.indices.tolist() for event in live.pair.received.landed(COUNT)] == [[*range(3, 3 + COUNT)]]
    assert live.there(LAYERS)


@every_transport
def test_a_push_that_joins_between_two_layers_is_told_by_the_listener_that_asked_for_it(
    transport: str, wrapped: bool, make_pair: MakePair
) -> None:
    """As a worker's loop does: it hears of a layer, looks into its mailbox, and there is the accept."""
    live = Live(make_pair, transport, wrapped)
    asked: list[int] = []

    def between_layers() -> None:
        layers = live.gate.current
        if layers is not None and layers.num_ready == 2 and not asked:
            asked.append(layers.num_ready)
            live.push(layers)

    live.gate.upcoming.listen(between_layers)
    with live.gate.step() as layers:
        live.compute(layers, 1)
        live.compute(layers, 2)
        until(lambda: live.there(2))
        live.compute(layers, LAYERS)
    assert live.pair.sent.next() == Pushed(key(), 3, COUNT) and asked == [2]
    until(lambda: live.there(LAYERS))


@every_transport
def test_a_push_that_comes_after_its_step_goes_at_once(transport: str, wrapped: bool, make_pair: MakePair) -> None:
    live = Live(make_pair, transport, wrapped)
    with live.gate.step() as layers:
        live.compute(layers, LAYERS)
    assert live.gate.current is layers
    live.push(live.gate.current)
    pushed = live.pair.sent.next()
    assert pushed == Pushed(key(), 3, COUNT)
    assert (pushed.num_bytes, pushed.early_bytes) == (live.computed.nbytes, 0)
    until(lambda: live.there(LAYERS))


@every_transport
def test_a_push_that_comes_after_its_step_has_failed_fails_too(
    transport: str, wrapped: bool, make_pair: MakePair
) -> None:
    live = Live(make_pair, transport, wrapped)
    with pytest.raises(ValueError, match="nothing works"), live.gate.step() as layers:
        live.compute(layers, 2)
        raise ValueError("nothing works")
    live.push(live.gate.current)
    assert isinstance(live.pair.sent.next(), PushFailed)
    live.pair.sender.cancel(key())
    assert live.pair.sent.next() == Cancelled(key())
    assert live.there(0)


@every_transport
def test_a_push_that_waits_for_its_step_keeps_no_other_waiting(
    transport: str, wrapped: bool, make_pair: MakePair
) -> None:
    live = Live(make_pair, transport, wrapped)
    live.push(live.gate.upcoming)
    other = np.setdiff1d(np.arange(64, dtype=np.int32), live.target)[:4].astype(np.int32)
    live.pair.open(key(2), 0, other)
    live.pair.push(key(2), 0, other, other)
    assert live.pair.sent.next() == Pushed(key(2), 0, 4)
    live.pair.sender.cancel(key())
    assert live.pair.sent.next() == Cancelled(key())
    with live.gate.step() as layers:
        live.compute(layers, LAYERS)
    live.pair.push(key(2), 0, other, other)
    assert live.pair.sent.next() == Pushed(key(2), 0, 4)
    assert live.there(0)


@every_transport
def test_a_push_whose_step_fails_has_failed(transport: str, wrapped: bool, make_pair: MakePair) -> None:
    live = Live(make_pair, transport, wrapped)
    live.push(live.gate.upcoming)
    with pytest.raises(ValueError, match="nothing works"), live.gate.step() as layers:
        live.compute(layers, 2)
        until(lambda: live.there(2))
        raise ValueError("nothing works")
    assert isinstance(live.pair.sent.next(), PushFailed)
    assert live.there(2)
    live.pair.sender.cancel(key())
    assert live.pair.sent.next() == Cancelled(key())
    assert live.pair.sent.empty and live.pair.received.empty


@pytest.mark.parametrize("transport", TWO_SIDED)
def test_a_layer_that_comes_twice_counts_once(transport: str, make_pair: MakePair) -> None:
    live = Live(make_pair, transport)
    live.push(live.gate.upcoming)
    with pytest.raises(ValueError, match="half"), live.gate.step() as layers:
        live.compute(layers, 4)
        until(lambda: live.there(4))
        raise ValueError("half of it")
    live.pair.sent.until(PushFailed)
    with live.gate.step() as layers:
        live.push(layers)
        live.compute(layers, 4)
        live.pair.push(key(2), 0, live.source, live.target)  # which is open to nobody
        live.pair.sent.until(Pushed(key(2), 0, COUNT))
        assert live.pair.received.empty
        live.compute(layers, LAYERS)
    assert [event.indices.tolist() for event in live.pair.received.landed(COUNT)] == [[*range(3, 3 + COUNT)]]


@pytest.mark.parametrize("transport", ["inproc", "shm", "zmq"])
@pytest.mark.parametrize("into", [HALF, replace(SHARD, dtype="int8"), replace(HALF, dtype="fp8"),
                                  replace(HALF, dtype="float32")],
                         ids=["half", "int8", "half-fp8", "half-float32"])  # fmt: skip
def test_layer_by_layer_arrives_what_arrives_at_once(transport: str, into: KVShard, make_pair: MakePair) -> None:
    live, whole = (Live(make_pair, transport, into=into) for _ in range(2))
    whole.compute(whole.gate.upcoming, LAYERS)
    whole.push(None)
    with live.gate.step() as layers:
        live.push(layers)
        for upto in (1, 3, LAYERS):
            live.compute(layers, upto)
    pushed = [each.pair.sent.next() for each in (live, whole)]
    assert pushed[0].num_bytes == pushed[1].num_bytes == COUNT * layout_of(into).block_bytes
    if not live.pair.receiver.one_sided:
        live.pair.received.landed(COUNT), whole.pair.received.landed(COUNT)
    np.testing.assert_array_equal(live.pair.there, whole.pair.there)
    assert live.pair.there.any()


@every_transport
def test_a_peer_that_is_forgotten_fails_what_waits_for_a_step(
    transport: str, wrapped: bool, make_pair: MakePair
) -> None:
    live = Live(make_pair, transport, wrapped)
    live.push(live.gate.upcoming)
    live.pair.sender.forget(live.pair.to)
    assert isinstance(live.pair.sent.next(), PushFailed)


def test_only_who_listens_is_told_and_each_step_is_another() -> None:
    gate, told = LayerGate(3), []
    first = gate.upcoming
    assert not first.watched
    wake: Any = lambda: told.append((first.num_ready, first.failed))  # noqa: E731
    first.listen(wake)
    first.listen(wake)
    with gate.step() as running:
        assert running is first is gate.current and gate.upcoming is not first
        first.advance(2)
        first.advance(1)
    assert told == [(2, False), (3, False)] and first.complete
    assert not gate.upcoming.watched and not gate.upcoming.complete


def test_layers_go_over_zmq_as_views_of_the_pool(make_pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "IN_PLACE_FROM", 1)
    live = Live(make_pair, "zmq", False)
    with live.gate.step() as layers:
        live.push(layers)
        live.compute(layers, 1)
        until(lambda: live.there(1))
        live.compute(layers, LAYERS)
    assert live.pair.sent.next() == Pushed(key(), 3, COUNT)
    assert live.there(LAYERS)

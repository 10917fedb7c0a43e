"""Promise: layers that leave while the prompt is computed change no token, and a failed step leaves nothing behind."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.layer_gate import LayerGate, StepLayers
from engine.rank import RankModel
from kv_transfer.core.trace import TransferTrace
from kv_transfer.transports.copying import BackgroundSender
from messages.common import FailReason, Role
from messages.sampling import SamplingParams
from prefill_worker.core.handoff import Handoffs
from tests.workers.relay import PATIENCE, Relay, config

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
PAIR = {"prefill": "prefill-0", "decode": "decode-0"}
PROMPT = [(7919 + place * 104729) % 2000 + 10 for place in range(333)]
LONGER = [*PROMPT[:200], *PROMPT]
ONE_STEP = PROMPT[:30]
"""As many tokens as the first step of a worker may have, which does not know its pace yet."""
LAYERS = 6


def start(relay: Relay, model: Path, prefill: int, decode: int, **changes: Any) -> None:
    relay.start(config(relay, "prefill-0", Role.PREFILL, model, tensor_parallel=prefill, prefill_chunk=64, **changes))
    relay.start(config(relay, "decode-0", Role.DECODE, model, tensor_parallel=decode, **changes))


def traces(relay: Relay) -> list[TransferTrace]:
    loop: Any = relay.workers["prefill-0"]._loop
    return list(loop._machine.traces)


@pytest.fixture(scope="module")
def alone(tiny_llama: Path) -> list[list[int]]:
    """What one worker answers to each prompt."""
    relay = Relay()
    try:
        relay.start(config(relay, "colocated-0", Role.COLOCATED, tiny_llama))
        requests = [relay.send(prompt, GREEDY, colocated="colocated-0") for prompt in (PROMPT, LONGER, ONE_STEP)]
        return [stream.token_ids() for stream in relay.finish(*requests)]
    finally:
        relay.stop()


@pytest.mark.parametrize("transport", ["inproc", "shm", "nccl", "zmq"])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (1, 2), (2, 2)], ids="{0[0]}-{0[1]}".format)
def test_chunks_that_leave_live_give_the_tokens_of_one_worker(
    tiny_llama: Path, alone: list[list[int]], transport: str, ranks: tuple[int, int]
) -> None:
    relay = Relay()
    try:
        start(relay, tiny_llama, *ranks, transport=transport)
        (first,) = relay.finish(relay.send(PROMPT, GREEDY, **PAIR))
        # Of the second prompt both have the beginning: only what follows leaves, and is computed.
        (again,) = relay.finish(relay.send(LONGER, GREEDY, **PAIR))
        relay.wait_until_idle()
        assert [first.token_ids(), again.token_ids()] == alone[:2]
        for trace, blocks, cached in zip(traces(relay), (21, 34 - 12), (0, 12), strict=True):
            assert (trace.num_blocks, trace.cached_blocks, trace.repairs) == (blocks, cached, 0)
            assert any(push.live for push in trace.pushes) and trace.acked > trace.computed > trace.opened
            assert sum(push.count for push in trace.pushes) == blocks
            assert 0 < trace.hidden_bytes <= trace.num_bytes == blocks * 6 * 2 * 4 * 16 * 32 * 4
    finally:
        relay.stop()


@pytest.mark.parametrize("transport", ["shm", "nccl", "zmq"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "fp8"])
def test_layers_are_converted_on_their_way_as_whole_blocks_are(
    tiny_llama: Path, transport: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, live = [], []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(Handoffs, "computing", lambda *_: [])
        relay = Relay()
        try:
            chunks = {"prefill_chunk": 64, "transport": transport}
            relay.start(config(relay, "prefill-0", Role.PREFILL, tiny_llama, tensor_parallel=2, **chunks))
            relay.start(config(relay, "decode-0", Role.DECODE, tiny_llama, kv_dtype=dtype, **chunks))
            (stream,) = relay.finish(relay.send(PROMPT, GREEDY, **PAIR))
            relay.wait_until_idle()
            answers.append(stream.token_ids())
            live.append(any(push.live for push in traces(relay)[0].pushes))
        finally:
            relay.stop()
    assert answers[0] == answers[1] and live == [True, False]


def pushes_live(layers: StepLayers) -> bool:
    """Whether a transport listens to this step."""
    return any(getattr(wake, "__func__", None) is BackgroundSender._look for wake in layers._wakes)


def gates_of(relay: Relay) -> list[LayerGate]:
    """Of the prefill worker's ranks."""
    gates = [worker._own._layers for worker in (relay.workers["prefill-0"], *relay.ranks["prefill-0"]) if worker._own]
    return [gate for gate in gates if gate is not None]


def arrived(relay: Relay) -> bool:
    """Whether something has landed on each rank of the decode worker; of several that get it from one rank, on one
    of them: over shared memory its lanes go one after the other."""
    pools = [worker._memory.pool for worker in (relay.workers["decode-0"], *relay.ranks["decode-0"]) if worker._memory]
    return sum(bool(pool.any()) for pool in pools) >= min(len(pools), len(gates_of(relay)))


def before_the_last_layer(relay: Relay, patch: pytest.MonkeyPatch, do: Callable[[StepLayers], None]) -> None:
    """Have each rank of the prefill worker call ``do`` when all layers of a step but the last are there."""
    advance, gates = StepLayers.advance, gates_of(relay)

    def and_do(layers: StepLayers, num_ready: int) -> None:
        advance(layers, num_ready)
        if num_ready == LAYERS - 1 and any(layers is gate.current for gate in gates):
            do(layers)

    patch.setattr(StepLayers, "advance", and_do)


def wait_for_layers(relay: Relay) -> Callable[[StepLayers], None]:
    """Go on with a step when some of it has landed."""

    def wait(layers: StepLayers) -> None:
        deadline = time.monotonic() + PATIENCE
        while not arrived(relay):
            assert time.monotonic() < deadline, "no layer left before the prompt was computed"
            layers._tell()  # so whoever listens looks again

    return wait


@pytest.mark.parametrize("transport", ["inproc", "shm", "zmq"])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (1, 2), (2, 2)], ids="{0[0]}-{0[1]}".format)
def test_layers_of_a_prompt_of_one_step_leave_before_it_is_computed(
    tiny_llama: Path, alone: list[list[int]], transport: str, ranks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = Relay()
    try:
        start(relay, tiny_llama, *ranks, transport=transport)
        with monkeypatch.context() as patch:
            before_the_last_layer(relay, patch, wait_for_layers(relay))
            (stream,) = relay.finish(relay.send(ONE_STEP, GREEDY, **PAIR))
        relay.wait_until_idle()
        assert stream.token_ids() == alone[2]
        (trace,) = traces(relay)
        assert [(push.first, push.count, push.live) for push in trace.pushes] == [(0, 2, True)]
        assert trace.opened < trace.accepted <= trace.first_push < trace.computed and trace.repairs == 0
        assert trace.num_bytes == 2 * LAYERS * 2 * 4 * 16 * 32 * 4
    finally:
        relay.stop()


@pytest.mark.parametrize("transport", ["shm", "zmq"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_breaks_off_when_layers_of_it_have_left_fails_its_attempt_alone(
    tiny_llama: Path, alone: list[list[int]], transport: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = Relay()
    try:
        start(relay, tiny_llama, 2, 1, transport=transport)
        wait, gate = wait_for_layers(relay), gates_of(relay)[rank]

        def break_off(layers: StepLayers) -> None:
            wait(layers)
            if layers is gate.current:
                raise RuntimeError("out of luck")

        with monkeypatch.context() as patch:
            before_the_last_layer(relay, patch, break_off)
            (bad,) = relay.finish(relay.send(ONE_STEP, GREEDY, **PAIR))
        assert bad.failed is not None and bad.failed.reason is FailReason.ENGINE
        relay.wait_until_idle()
        (good,) = relay.finish(relay.send(ONE_STEP, GREEDY, **PAIR))
        assert good.token_ids() == alone[2]
        relay.wait_until_idle()
    finally:
        relay.stop()


@pytest.mark.parametrize("transport", ["shm", "nccl", "zmq"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_breaks_off_between_two_layers_fails_its_attempt_alone(
    tiny_llama: Path, alone: list[list[int]], transport: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = RankModel.forward
    broken: list[int] = []

    def breaks_off(model: RankModel, step: Any) -> Any:
        if pushes_live(model.layers.upcoming) and model.group.rank == rank and not broken:
            broken.append(rank)
            chosen, advance = model.layers.upcoming, StepLayers.advance

            def stop(layers: StepLayers, num_ready: int) -> None:
                advance(layers, num_ready)
                if layers is chosen and num_ready == 3:
                    raise RuntimeError("out of luck")

            monkeypatch.setattr(StepLayers, "advance", stop)
        return forward(model, step)

    relay = Relay()
    try:
        start(relay, tiny_llama, 2, 1, transport=transport)
        monkeypatch.setattr(RankModel, "forward", breaks_off)
        (bad,) = relay.finish(relay.send(PROMPT, GREEDY, **PAIR))
        assert broken and bad.failed is not None and bad.failed.reason is FailReason.ENGINE
        relay.wait_until_idle()
        (good,) = relay.finish(relay.send(PROMPT, GREEDY, **PAIR))
        assert good.token_ids() == alone[0]
        relay.wait_until_idle()
    finally:
        relay.stop()

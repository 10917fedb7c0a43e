"""Promise: what prefill has computed is not lost with a decode worker that refuses it or dies: the next one gets it for
less than a block of work. And a client never hears of a bad block."""

from typing import Any

import pytest

from decode_worker.core.reservation import Reservations
from kv_transfer.core.receiving import MAX_REPAIRS
from messages.gateway_to_worker import Prefill
from messages.ids import Attempt
from messages.prefill_to_decode import OpenTransfer
from simulator.model import BLOCK
from simulator.worker import Worker
from tests.ownership.world import Faults, Request, World

LENGTHS = (5, 16, 18, 21)


def world_of(one_sided: bool, monkeypatch: pytest.MonkeyPatch, faults: Faults = Faults()) -> tuple[World, list[int]]:  # noqa: B008
    """A world without any request, and what its prefill worker computes, step by step."""
    computed: list[int] = []
    begin = Worker.begin

    def counted(worker: Worker, plan: Any) -> None:
        if worker.sends:
            computed.append(int(plan.num_tokens.sum()))
        begin(worker, plan)

    monkeypatch.setattr(Worker, "begin", counted)
    return World(1, faults, one_sided=one_sided, prefill_ranks=1, decode_ranks=1), computed


def ask(world: World, length: int) -> Request:
    prompt = tuple(7 * place % 50 for place in range(length))
    request = Request(f"{length:032x}", prompt, 3)  # type: ignore[arg-type]
    world.requests[request.request] = request
    world.place(request, "decode-0")
    return request


def go_on_until(world: World, done: Any) -> None:
    for _ in range(500):
        if done():
            return
        while world.flow():
            pass
        for worker in world.workers.values():
            worker.turn()
        world.now += 0.05
    raise AssertionError("it does not come to that")


@pytest.mark.parametrize("one_sided", [True, False], ids=["one-sided", "two-sided"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("how", ["refuses", "dies", "falls silent"])
def test_another_decode_worker_takes_over_for_less_than_a_block(
    one_sided: bool, length: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, computed = world_of(one_sided, monkeypatch)
    prefill, decode = world.workers["prefill-0"], world.workers["decode-0"]
    waiting: list[OpenTransfer] = []
    with monkeypatch.context() as patch:
        patch.setattr(world, "hear", lambda message: None)  # what comes is lost, so the client has nothing yet
        if how == "refuses":
            patch.setattr(Reservations, "opened", lambda _, order, now: waiting.append(order) or [])
        request = ask(world, length)
        go_on_until(world, lambda: sum(computed) == length and prefill.plan is None)
    first = len(computed)
    match how:
        case "refuses":
            assert len(prefill.handoffs) == 1
            world.send(prefill.address.mailbox, decode.reservations.refuse(waiting[0], "no room").message)
        case "dies":
            world.die("decode-0")
        case _:
            world.place(request, "decode-1")
    go_on_until(world, lambda: request.over)
    assert request.attempt >= 2 and request.tokens == world.truth.answer(request.prompt, 3)
    again = computed[first:]
    assert len(again) == request.attempt - 1 and max(again) <= BLOCK, f"{again} of {length} tokens once more"
    world.settle()
    world.check_settled()


@pytest.mark.parametrize("one_sided", [True, False], ids=["one-sided", "two-sided"])
def test_a_bad_block_is_sent_again_then_prefilled_again_and_the_client_sees_no_error(
    one_sided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, _ = world_of(one_sided, monkeypatch, Faults(corrupt=1.0))
    request = ask(world, 18)
    go_on_until(world, lambda: request.attempt == 2)
    assert world.corrupted > MAX_REPAIRS and not request.over
    world.settle()
    assert request.tokens == world.truth.answer(request.prompt, 3)
    world.check_settled()


def test_an_old_order_does_not_start_again_what_a_newer_attempt_has(monkeypatch: pytest.MonkeyPatch) -> None:
    world, computed = world_of(True, monkeypatch)
    request = ask(world, 18)
    (old,) = [each for each in world.links[world.workers["prefill-0"].address.mailbox] if isinstance(each, Prefill)]
    world.place(request, "decode-1")
    go_on_until(world, lambda: request.over)
    before = sum(computed)
    world.send(world.workers["prefill-0"].address.mailbox, old)
    world.settle()
    assert sum(computed) == before and old.attempt == Attempt(1)
    world.check_settled()

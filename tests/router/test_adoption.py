"""Promise: the router knows who may have a request that a gateway is to adopt, and says at once when nobody does."""

import pytest

from messages.common import Role
from messages.gateway_to_router import AdoptionWanted, GatewayDied, Held, Holding
from messages.ids import Address, Attempt, RequestId
from messages.router_to_gateway import AdoptionAsked
from messages.router_to_worker import Adopt
from messages.seals import genuine
from runtime.core.actions import Send
from tests.router.world import GATEWAY, KEY, World, finished, prefilled, register

OTHER = Address("tcp://gateway:2")


@pytest.fixture
def pair() -> World:
    """Two workers of each role, whose router has been there for long."""
    world = World()
    for worker, role in (("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE)):
        world.handle(register(worker, role))
    world.sleep(20.0, "p0", "p1", "d0", "d1")
    return world


def ask(world: World, request: str) -> tuple[list[str], list[Send]]:
    """Who is asked, by the router's word and by its messages."""
    asked, *told = world.handle(AdoptionWanted(request=RequestId(request), gateway=OTHER, number=7))
    assert isinstance(asked.message, AdoptionAsked) and asked.to == OTHER
    for send in told:
        assert isinstance(send.message, Adopt) and genuine(KEY, send.message)
        assert (send.message.request, send.message.gateway, send.message.number) == (request, OTHER, 7)
    return list(asked.message.workers), told


def test_those_are_asked_on_whom_the_request_is_placed(pair: World) -> None:
    placed = pair.place("one")
    assert placed.prefill is not None
    decode, prefill = placed.decode, placed.prefill
    workers, told = ask(pair, "one")
    assert workers == [decode.worker, prefill.worker]
    assert [send.to for send in told] == [decode.mailbox, prefill.mailbox]


def test_for_a_request_that_has_ended_lately_the_workers_are_asked_that_ran_it(pair: World) -> None:
    """Its last token may have been its first, which the prefill worker keeps."""
    placed = pair.place("one")
    assert placed.prefill is not None
    pair.handle(prefilled("one"))
    pair.handle(finished("one"))
    assert ask(pair, "one")[0] == [placed.decode.worker, placed.prefill.worker]
    pair.handle(register(placed.decode.worker, Role.DECODE, epoch=2))
    assert ask(pair, "one")[0] == [placed.prefill.worker], "what it had is gone with it"


def test_what_nobody_has_is_said_at_once(pair: World) -> None:
    assert ask(pair, "never") == ([], [])


def test_a_router_that_was_just_started_asks_everyone_for_what_it_does_not_know() -> None:
    world = World()
    world.handle(register("p0", Role.PREFILL))
    world.handle(register("d0", Role.DECODE))
    assert sorted(ask(world, "one")[0]) == ["d0", "p0"]


def test_the_adopted_request_is_its_new_gateways(pair: World) -> None:
    """What the first gateway still says, and its end, do not touch it."""
    decode = pair.place("one").decode
    ask(pair, "one")
    held = Held(
        request=RequestId("one"), attempt=Attempt(2), prefill=None, decode=(decode.worker, decode.epoch),
        num_tokens=10, max_new_tokens=20, prefilled=True,
    )  # fmt: skip
    pair.handle(Holding(gateway=OTHER, attempts=(held,), last=False))
    pair.handle(finished("one"))
    assert pair.router.inspect()["placed"] == 1
    pair.gateways = {OTHER: None}
    pair.handle(GatewayDied(gateway=GATEWAY, detail="killed"))
    pair.sleep(20.0, "p0", "p1", "d0", "d1")
    assert pair.router.inspect()["placed"] == 1
    pair.handle(finished("one", 2))
    assert pair.router.inspect()["placed"] == 0

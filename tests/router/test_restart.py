"""Promise: a restarted router serves within 3 s, no stream notices, and what belongs to nobody is freed within 15 s."""

import itertools

import pytest
from msgspec.structs import replace

from gateway.core import session as gateway
from gateway.core.dispatch import Dispatch, Heard
from messages.codec import pack_tokens
from messages.common import Role, WorkerAddress
from messages.gateway_to_router import MAX_HELD, ClusterStateWanted, Held, Holding
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.router_to_gateway import ClusterState, Placed, WorkerLost
from messages.router_to_worker import GatewayBack, GatewayLost
from messages.sampling import SamplingParams
from messages.seals import genuine
from router.core.awaited import Awaiting
from router.core.machine import Router, RouterSettings
from runtime.core.actions import Send
from tests.router.relay_world import GATEWAY as RELAY_GATEWAY
from tests.router.relay_world import RelayWorld
from tests.router.world import GATEWAY, KEY, World, finished, prefilled, register, report, wanted

DECODE = (WorkerId("d0"), Epoch(1))
PREFILL = (WorkerId("p0"), Epoch(1))


def ends_well(world: RelayWorld, *requests: RequestId) -> bool:
    return all(world.ended[request] == gateway.Ended(gateway.FinishReason.LENGTH) for request in requests)


@pytest.mark.parametrize("away", [0.2, 1.0, 3.0])
def test_streams_do_not_notice_that_the_router_was_restarted_and_new_requests_are_served_soon(away: float) -> None:
    world = RelayWorld(prefill=2, decode=2, slots=8)
    streams = world.ask(6, max_tokens=400)
    world.sleep(2.0)
    world.restart_router(away)
    world.sleep(away)
    begun = world.now
    new = world.ask(4, max_tokens=20)
    world.until(lambda: all(world.came[request] for request in new), 3.0)
    assert world.router.inspect()["placed"] == 10, "the streams are counted again"
    assert world.now - begun <= 3.0
    world.run()
    assert ends_well(world, *streams, *new)
    assert [world.sessions[request].attempt for request in streams] == [1] * 6
    assert max(world.pauses(request) for request in streams) <= 0.1
    world.sleep(1.0)
    assert world.router.inspect()["placed"] == 0


def test_requests_in_line_when_the_router_dies_are_asked_for_again_at_once() -> None:
    world = RelayWorld(prefill=1, decode=1, slots=2)
    running, waiting = world.ask(2, max_tokens=200), world.ask(2, max_tokens=10, after=0.5)
    world.sleep(4.0)
    world.restart_router(0.1)
    world.sleep(0.7)
    assert world.router.inspect()["waiting"] == 2, "though their next question was far off"
    world.run()
    assert ends_well(world, *running, *waiting)


def test_a_restarted_router_does_not_place_what_has_no_room() -> None:
    """Whatever comes first: the question, the worker, or the word on what runs there."""
    world = RelayWorld(prefill=1, decode=1, slots=4)
    running = world.ask(4, max_tokens=300)
    world.sleep(1.0)
    world.restart_router(0.05)
    waiting = world.ask(8, max_tokens=10, after=0.06)
    busiest = 0
    while len(world.ended) < 4:
        world.sleep(0.02)
        counts = world.machines[world.mailbox("d0")].inspect()
        busiest = max(busiest, counts["runs"] + world.machines[world.mailbox("d0")].decode.num_incoming)
    assert busiest == 4
    world.run()
    assert ends_well(world, *running, *waiting)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_worker_that_died_while_no_router_was_there_is_found(replaced: bool) -> None:
    world = RelayWorld(prefill=1, decode=2, slots=8)
    streams = world.ask(4, max_tokens=400)
    world.sleep(2.0)
    world.restart_router(1.0)
    world.sleep(0.3)
    world.kill("d0", told_after=None)
    if replaced:
        world.start("d0")
    hit = [request for request in streams if world.decode_of(request) == "d0"]
    world.sleep(0.7)
    world.until(lambda: bool(world.lost), 3.0)
    world.run()
    assert ends_well(world, *streams)
    assert [world.sessions[request].attempt for request in streams] == [1 + (r in hit) for r in streams]
    assert max(world.pauses(request) for request in streams) <= 0.7 + (1.0 if replaced else 3.0)


def test_who_waits_for_the_last_worker_hears_in_time_that_it_is_gone_from_a_new_router_too() -> None:
    world = RelayWorld(prefill=1, decode=1, slots=8)
    (stream,) = world.ask(1, max_tokens=400)
    world.sleep(2.0)
    world.kill("p0", told_after=None)
    world.kill("d0", told_after=None)
    world.restart_router(0.0)
    begun = world.now
    world.until(lambda: stream in world.ended, 6.0)
    assert isinstance(world.ended[stream], gateway.Failed)
    assert world.now - begun <= 5.0, "it counts from when the new router came, not from when it missed the worker"


def test_a_gateways_death_frees_everything_in_time_and_no_sooner() -> None:
    world = RelayWorld(prefill=1, decode=2, slots=4)
    world.ask(8, max_tokens=3000)
    world.sleep(3.0)
    world.kill(RELAY_GATEWAY, told_after=None)
    world.sleep(9.9)
    assert world.held("d0") and world.held("d1"), "somebody may adopt them"
    gone = world.until(lambda: not world.held("d0") and not world.held("d1"), 4.0)
    assert 9.9 + gone <= 12.2
    world.sleep(2.0)
    assert world.router.inspect()["placed"] == 0
    assert not any(len(world.machines[world.mailbox(name)]._deliveries) for name in ("p0", "d0", "d1"))


def test_a_supervisors_word_that_a_gateway_died_counts_at_once() -> None:
    world = RelayWorld(prefill=1, decode=1, slots=4)
    world.ask(4, max_tokens=3000)
    world.sleep(3.0)
    world.kill(RELAY_GATEWAY, told_after=0.3)
    assert world.until(lambda: not world.held("d0"), 11.0) <= 10.5


@pytest.mark.parametrize("away", [0.1, 2.0])
def test_what_a_gateway_left_that_died_with_the_router_is_freed_too(away: float) -> None:
    """The new router learns of it from the workers."""
    world = RelayWorld(prefill=1, decode=1, slots=4)
    world.ask(4, max_tokens=3000)
    world.sleep(3.0)
    world.kill(RELAY_GATEWAY, told_after=None)
    world.restart_router(away)
    world.sleep(away)
    assert world.until(lambda: not world.held("d0"), 16.0) <= 15.0


def test_a_gateway_that_was_only_slow_loses_nothing() -> None:
    world = RelayWorld(prefill=1, decode=2, slots=4)
    requests = world.ask(6, max_tokens=600)
    world.sleep(3.0)
    world.freeze(RELAY_GATEWAY, 8.0)
    world.run()
    assert ends_well(world, *requests)
    assert [world.sessions[request].attempt for request in requests] == [1] * 6


def test_a_gateway_that_was_slow_for_longer_than_its_requests_are_kept_resumes_them() -> None:
    world = RelayWorld(prefill=1, decode=2, slots=4)
    requests = world.ask(6, max_tokens=600)
    world.sleep(3.0)
    world.freeze(RELAY_GATEWAY, 15.0)
    world.run()
    assert ends_well(world, *requests)
    assert {len(world.came[request]) for request in requests} == {600}


# The router alone


def held(request: str, attempt: int = 1, *, prefill: bool = True, decode: str = "d0", tokens: int = 10,
         done: bool = False) -> Held:  # fmt: skip
    return Held(
        request=RequestId(request), attempt=Attempt(attempt), prefill=PREFILL if prefill else None,
        decode=(WorkerId(decode), Epoch(1)), num_tokens=tokens, max_new_tokens=20, prefilled=done,
    )  # fmt: skip


def holding(*attempts: Held, last: bool = True, by: Address = GATEWAY) -> Holding:
    return Holding(gateway=by, attempts=attempts, last=last)


ORDERS = list(itertools.permutations(range(3)))


@pytest.mark.parametrize("order", ORDERS)
def test_the_ledger_is_rebuilt_in_whatever_order_workers_and_gateways_come(order: tuple[int, ...]) -> None:
    world = World()
    events = [register("p0", Role.PREFILL), register("d0", Role.DECODE), holding(held("a"), held("b", 3, done=True))]
    for number in order:
        assert world.handle(events[number]) == []
    for again in (holding(held("a"), held("b", 3)), holding(held("b", 2))):
        world.handle(again)  # twice, or late
    assert world.state().workers[0].assigned == world.state().workers[1].assigned == 2
    assert world.state().known
    view = world.router._members.get(*PREFILL)
    assert view is not None and view.tokens == 10, "the prompt of b is computed"
    placed = world.answer(wanted("a"))
    assert isinstance(placed, Placed) and placed.ticket is not None
    for event in (prefilled("a"), finished("a"), finished("b", 3)):
        world.handle(event)
    assert world.router.inspect()["placed"] == 0


def test_an_attempt_that_is_over_or_old_is_not_counted_whatever_a_late_message_says() -> None:
    world = World()
    for event in (register("p0", Role.PREFILL), register("d0", Role.DECODE)):
        world.handle(event)
    world.handle(finished("a"))
    world.place("b", attempt=2)
    world.handle(holding(held("a"), held("b")))
    assert world.router.inspect()["placed"] == 1
    assert world.place("b", attempt=2).attempt == 2


def test_a_held_attempt_that_ends_before_its_workers_come_is_forgotten() -> None:
    world = World()
    world.handle(holding(held("a"), held("b"), held("c")))
    world.handle(finished("a"))
    world.handle(wanted("b", 2))
    world.handle(prefilled("c"))
    world.handle(register("p0", Role.PREFILL))
    sends = world.handle(register("d0", Role.DECODE))
    assert [(send.message.request, send.message.attempt) for send in sends if isinstance(send.message, Placed)] == [
        ("b", 2)
    ]
    assert world.router.inspect()["placed"] == 2
    view = world.router._members.get(*PREFILL)
    assert view is not None and view.tokens == 10


@pytest.mark.parametrize("how", ["another has its name", "it never comes", "it is silent"])
def test_gateways_hear_of_workers_they_hold_attempts_on_that_are_not_there(how: str) -> None:
    world = World()
    world.handle(register("p0", Role.PREFILL))
    match how:
        case "another has its name":
            world.handle(register("d0", Role.DECODE, epoch=2))
            sends = world.handle(holding(held("a"), held("b")))
        case "it is silent":
            world.handle(register("d0", Role.DECODE))
            world.sleep(2.1, "p0")
            sends = world.handle(holding(held("a"), held("b")))
        case _:
            assert world.handle(holding(held("a"), held("b"))) == []
            sends = world.sleep(2.3, "p0")
    assert [(send.to, send.message) for send in sends] == [
        (GATEWAY, WorkerLost(worker=DECODE[0], epoch=DECODE[1], detail=sends[0].message.detail))
    ]
    assert world.router.inspect()["placed"] == 0


def test_in_its_first_second_a_router_believes_what_workers_say_of_their_load() -> None:
    world = World(settle=1.0)
    world.handle(register("c0", Role.COLOCATED, max_num_seqs=4))
    assert world.handle(wanted("a")) == [], "it has not said anything yet"
    world.now = 0.1
    assert world.handle(report("c0", 1, running=2)) == [], "and 2 wait there"
    assert len(world.handle(report("c0", 2, running=1))) == 1
    assert world.handle(wanted("b")) == world.handle(report("c0", 3, running=2)) == []
    world.now = 1.2
    assert [type(send.message) for send in world.handle(report("c0", 4, running=2))] == [Placed]


def test_workers_hear_of_a_lost_gateway_again_and_again_and_of_its_return() -> None:
    world = World()
    world.handle(register("c0", Role.COLOCATED))
    other = Address("tcp://gateway:9")
    world.place("r", gateway=other)
    told = [send.message for send in world.sleep(7.0, "c0") if send.to == "tcp://c0.1:1"]
    assert {type(message) for message in told} == {GatewayLost} and 4 <= len(told) <= 6
    assert [type(send.message) for send in world.handle(wanted("r", gateway=other))] == [GatewayBack, Placed]
    world.gateways[other] = None
    assert world.sleep(20.0, "c0") == []
    assert world.state().workers[0].assigned == 1


def test_a_worker_that_takes_a_gateway_for_lost_hears_from_a_new_router_that_it_is_back() -> None:
    """The old router has said that it is lost, and is gone."""
    world = World()
    world.gateways = {}
    world.handle(register("d0", Role.DECODE))
    unsure = replace(report("d0", 1), gateways=(GATEWAY,), lost_gateways=(GATEWAY,))
    assert world.handle(unsure) == [], "this router has not heard of it either"
    world.handle(ClusterStateWanted(gateway=GATEWAY))
    for number in (2, 3):  # the first one may be lost
        (send,) = world.handle(replace(unsure, number=number))
        assert isinstance(send.message, GatewayBack) and genuine(KEY, send.message)
        assert (send.to, send.message.gateway) == (register("d0", Role.DECODE).address.mailbox, GATEWAY)
    assert world.handle(report("d0", 4)) == []


def test_the_line_does_not_wait_for_a_lost_gateway() -> None:
    world = World()
    world.handle(register("c0", Role.COLOCATED, max_num_seqs=1))
    world.place("r")
    assert world.handle(wanted("theirs", gateway=Address("tcp://gateway:9"))) == world.handle(wanted("ours")) == []
    world.sleep(3.0, "c0")
    placed = [send.message for send in world.handle(finished("r")) if isinstance(send.message, Placed)]
    assert [answer.request for answer in placed] == ["ours"]


# The gateway's side


def test_a_gateway_tells_a_router_that_does_not_know_it_all_that_it_holds_in_pieces() -> None:
    sessions = [running(number) for number in range(MAX_HELD + 44)]
    dispatch = Dispatch(RELAY_GATEWAY, Address("R"))
    other = Router(RouterSettings(cluster_key=KEY), Epoch(7))
    asked = gateway_asks(other)
    said = list(dispatch.state(asked, sessions))
    parts = [step.message for step in said if isinstance(step, Send)]
    assert [(len(part.attempts), part.last) for part in parts if isinstance(part, Holding)] == [
        (MAX_HELD, False), (44, True),
    ]  # fmt: skip
    for part in parts:
        other.handle(part, 0.0)
    assert list(dispatch.state(gateway_asks(other), sessions)) == []
    third = Router(RouterSettings(cluster_key=KEY), Epoch(8))
    heard = [s for s in dispatch.state(gateway_asks(third), sessions) if isinstance(s, Heard)]
    assert {step.event for step in heard} == {gateway.RouterRestarted()} and len(heard) == len(sessions)


def running(number: int) -> gateway.Session:
    """A session that is placed."""
    request = RequestId(f"{number:032x}")
    session = gateway.Session(
        request, pack_tokens([1]), SamplingParams(max_tokens=4), gateway=RELAY_GATEWAY, router=Address("R"),
        tenant="t", timeouts=gateway.SessionTimeouts(), max_attempts=4,
    )  # fmt: skip
    session.start(0.0)
    decode = WorkerAddress(*DECODE, Address("d0"))
    session.handle(Placed(request=request, attempt=Attempt(1), prefill=None, decode=decode, ticket=None), 0.0)
    return session


def gateway_asks(router: Router) -> ClusterState:
    actions = router.handle(ClusterStateWanted(gateway=RELAY_GATEWAY), 0.0)
    (state,) = [each.message for each in actions if isinstance(each, Send) and isinstance(each.message, ClusterState)]
    return state


def test_a_worker_that_comes_costs_only_what_is_awaited_of_it() -> None:
    """A router that was restarted hears of all requests before it hears of the workers."""
    awaiting = Awaiting()
    for number in range(100):
        awaiting.add(held(f"r{number}", prefill=number % 2 == 0, decode=f"d{number % 4}"), GATEWAY, 2.0)
        awaiting.check_integrity()
    assert awaiting.on(PREFILL[0]) == [f"r{number}" for number in range(0, 100, 2)]
    for request in awaiting.on(WorkerId("d0")):
        awaiting.drop(request)
        awaiting.check_integrity()
    assert len(awaiting) == 75 and awaiting.on(WorkerId("d0")) == []

"""What the router promises gateways and workers, one sentence a test."""

from typing import Any

import pytest
from msgspec.structs import replace

from messages import tickets
from messages.codec import BadMessage, decoder_for, encode
from messages.common import BlockCounts, CacheCounts, Role, TransferCounts
from messages.gateway_to_router import ClusterStateWanted
from messages.ids import Address, Epoch, WorkerId
from messages.router_to_gateway import Placed, Rejected, WorkerLost, WorkerState
from messages.router_to_worker import PeerLost, RegisterWanted
from messages.seals import genuine, seal
from messages.worker_to_router import Leaving, WorkerDied
from router.core.machine import Messages, Tick
from runtime.core.actions import Send
from runtime.core.disaggregation import Disaggregation, Policy
from runtime.core.membership import REGISTER_EVERY, REPORT_EVERY, Membership
from tests.router.world import GATEWAY, KEY, World, finished, prefilled, register, report, wanted


def workers_of(placed: Placed) -> tuple[str, str]:
    assert placed.prefill is not None
    return placed.prefill.worker, placed.decode.worker


def test_a_placement_names_a_live_pair_and_a_ticket_that_decode_will_accept(pair: World) -> None:
    placed = pair.place("r")
    assert placed.ticket is not None
    assert tickets.valid(KEY, placed.ticket, placed.request, placed.attempt)
    assert (placed.ticket.prefill, placed.ticket.decode) == workers_of(placed)


def test_equally_loaded_workers_take_turns(pair: World) -> None:
    pairs = [workers_of(pair.place(f"r{i}")) for i in range(4)]
    assert pairs == [("p0", "d0"), ("p1", "d1"), ("p0", "d0"), ("p1", "d1")]


def test_prefill_goes_to_the_fewest_outstanding_tokens_and_decode_to_the_fewest_sequences(pair: World) -> None:
    pair.place("long", tokens=1000)
    others = [workers_of(pair.place(f"r{i}", tokens=100)) for i in range(3)]
    assert [prefill for prefill, _ in others] == ["p1", "p1", "p1"]
    assert [decode for _, decode in others] == ["d1", "d1", "d0"]  # of two with as many, the one with fewer tokens


def test_prefilled_and_finished_take_the_load_off_again(pair: World) -> None:
    first = pair.place("long", tokens=1000)
    assert workers_of(first) == ("p0", "d0")
    pair.handle(prefilled("long"))
    assert workers_of(pair.place("short", tokens=10))[0] == "p1"
    assert workers_of(pair.place("third", tokens=10))[0] == "p0"
    pair.handle(finished("short"))
    assert workers_of(pair.place("fourth"))[1] == "d1"


def test_asking_again_for_the_same_attempt_gets_the_same_answer(pair: World) -> None:
    first = pair.place("r")
    pair.place("other")
    assert pair.place("r") == first
    assert pair.state().workers[0].assigned == 1


def test_a_newer_attempt_replaces_the_older_one_and_fences_it(pair: World) -> None:
    pair.place("r", tokens=1000)
    pair.place("r", attempt=2, tokens=1000)
    assert sum(worker.assigned for worker in pair.state().workers) == 2
    assert pair.handle(wanted("r", attempt=1)) == []
    pair.handle(finished("r", attempt=1))
    assert sum(worker.assigned for worker in pair.state().workers) == 2


def test_a_finished_request_is_not_placed_again_by_a_late_question(pair: World) -> None:
    pair.place("r")
    pair.handle(finished("r"))
    assert pair.handle(wanted("r")) == []
    assert pair.place("r", attempt=2).attempt == 2


def test_workers_to_avoid_are_used_only_where_no_other_is_left(pair: World) -> None:
    for request in "abc":
        assert workers_of(pair.place(request, avoid=("p0", "d1"))) == ("p1", "d0")
    assert workers_of(pair.place("d", avoid=("p0", "p1", "d0"))) == ("p0", "d1")


@pytest.mark.parametrize("policy", [Policy.ALWAYS, Policy.AUTO])
def test_where_kv_does_not_get_through_another_pair_is_taken_and_without_one_decode_computes(policy: Policy) -> None:
    world = World(disaggregation=Disaggregation(policy=policy))
    for worker, role in (("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE)):
        world.handle(register(worker, role))
    second = world.place("r", 2, cut=[("p0", "d0")])
    assert second.prefill is not None and second.prefill.worker == "p1"
    third = world.place("r", 3, cut=[("p0", "d0"), ("p1", "d0")])
    assert third.prefill is None and third.decode.worker == "d0"
    fourth = world.place("r", 4, avoid=("p0", "p1", "d0"), cut=[("p0", "d0"), ("p1", "d0")])
    assert fourth.prefill is None and fourth.decode.worker == "d0"
    world.handle(register("d1", Role.DECODE))
    fifth = world.place("r", 5, avoid=("d0",), cut=[("p0", "d0"), ("p1", "d0")])
    assert fifth.prefill is not None and fifth.decode.worker == "d1"


def test_a_colocated_pool_places_without_prefill_and_ticket() -> None:
    world = World()
    world.handle(register("c0", Role.COLOCATED))
    placed = world.place("r")
    assert (placed.prefill, placed.ticket, placed.decode.worker) == (None, None, "c0")


def test_a_request_longer_than_any_worker_can_hold_is_turned_away_for_good(pair: World) -> None:
    answer = pair.answer(wanted("r", tokens=4090, max_new_tokens=7))
    assert isinstance(answer, Rejected)
    assert answer.retry_after is None
    assert "4096" in answer.detail
    pair.place("fits", tokens=4090, max_new_tokens=6)


def test_a_long_request_goes_to_the_worker_that_can_hold_it() -> None:
    world = World()
    for worker, length in (("c0", 100), ("c1", 1000)):
        world.handle(register(worker, Role.COLOCATED, max_model_len=length))
    assert [world.place(f"r{i}", tokens=500).decode.worker for i in range(3)] == ["c1"] * 3


def test_requests_wait_in_line_until_a_worker_of_every_role_is_there() -> None:
    world = World()
    assert world.handle(wanted("first")) == world.handle(wanted("second")) == []
    assert world.handle(wanted("first")) == []  # asked again: still in line once
    assert world.handle(register("d0", Role.DECODE)) == []
    assert world.state().queued == 2
    answers = [send.message for send in world.handle(register("p0", Role.PREFILL))]
    assert [answer.request for answer in answers if isinstance(answer, Placed)] == ["first", "second"]


def test_a_request_that_waits_too_long_is_told_when_to_come_back() -> None:
    world = World(wait_timeout=2.0, retry_after=0.5)
    world.handle(wanted("r"))
    (send,) = world.sleep(2.1)
    assert isinstance(send.message, Rejected)
    assert send.message.retry_after == 0.5


def test_a_full_queue_turns_away_at_once() -> None:
    world = World(max_waiting=2)
    assert world.handle(wanted("a")) == world.handle(wanted("b")) == []
    answer = world.answer(wanted("c"))
    assert isinstance(answer, Rejected)
    assert answer.retry_after is not None


def test_an_attempt_that_has_to_wait_leaves_nothing_of_the_one_before_on_the_workers(pair: World) -> None:
    pair.place("r")
    for worker in ("p0", "p1"):
        pair.handle(WorkerDied(worker=WorkerId(worker), epoch=None, detail="killed"))
    assert pair.handle(wanted("r", attempt=2)) == []
    assert [worker.assigned for worker in pair.state().workers] == [0, 0, 0, 0]
    placed = [send.message for send in pair.handle(register("p0", Role.PREFILL, epoch=2))]
    assert [answer.attempt for answer in placed if isinstance(answer, Placed)] == [2]


def test_a_request_given_up_while_it_waits_leaves_the_line() -> None:
    world = World()
    world.handle(wanted("r"))
    world.handle(finished("r"))
    world.handle(register("c0", Role.COLOCATED))
    assert world.state().queued == world.state().workers[0].assigned == 0


@pytest.mark.parametrize("how", ["silent", "died", "left"])
def test_a_lost_worker_is_announced_to_all_gateways_and_to_all_other_workers(pair: World, how: str) -> None:
    other_gateway = Address("tcp://gateway:2")
    placed = [pair.place("a"), pair.place("b", gateway=other_gateway), pair.place("c")]
    assert [workers_of(p)[1] for p in placed] == ["d0", "d1", "d0"]
    match how:
        case "silent":
            sends = pair.sleep(5.5, "p0", "p1", "d1")
        case "died":
            sends = pair.handle(WorkerDied(worker=WorkerId("d0"), epoch=None, detail="killed"))
        case _:
            sends = pair.handle(Leaving(worker=WorkerId("d0"), epoch=Epoch(1)))
    lost = [(send.to, send.message.worker) for send in sends if isinstance(send.message, WorkerLost)]
    assert lost == [(GATEWAY, "d0"), (other_gateway, "d0")]
    heard = [(send.to, send.message) for send in sends if isinstance(send.message, PeerLost)]
    assert {message.dead for _, message in heard} == {how == "died"}  # the others may write still
    peers = {to for to, _ in heard}
    assert peers == {f"tcp://{name}.1:1" for name in ("p0", "p1", "d1")}
    assert [worker.alive for worker in pair.state().workers] == [False, True, True, True]
    assert pair.place("a", attempt=2).decode.worker == "d1"


def test_asking_again_after_a_loss_brings_the_answer_and_the_loss(pair: World) -> None:
    placed = pair.place("r")
    pair.handle(WorkerDied(worker=placed.decode.worker, epoch=None, detail="killed"))
    answers = [send.message for send in pair.handle(wanted("r"))]
    assert answers[0] == placed
    assert isinstance(answers[1], WorkerLost)


def test_a_worker_that_was_only_slow_is_asked_to_register_and_comes_back(pair: World) -> None:
    pair.sleep(6.0, "p0", "p1", "d1")
    (send,) = pair.handle(report("d0", 1000))
    assert send.message == RegisterWanted(worker=WorkerId("d0"), epoch=Epoch(1))
    pair.handle(register("d0", Role.DECODE))
    assert all(worker.alive for worker in pair.state().workers)


def test_what_a_dead_process_sent_before_its_end_does_not_revive_it(pair: World) -> None:
    pair.handle(WorkerDied(worker=WorkerId("d0"), epoch=Epoch(1), detail="killed"))
    assert pair.handle(report("d0", 5)) == pair.handle(register("d0", Role.DECODE)) == []
    assert not pair.state().workers[0].alive


def test_a_restarted_worker_takes_the_place_of_its_former_self(pair: World) -> None:
    pair.place("r")
    sends = pair.handle(register("d0", Role.DECODE, epoch=2))
    assert [send.to for send in sends if isinstance(send.message, WorkerLost)] == [GATEWAY]
    assert {send.message.dead for send in sends if isinstance(send.message, PeerLost)} == {False}
    assert [worker.epoch for worker in pair.state().workers if worker.worker == "d0"] == [2]
    assert pair.handle(report("d0", 7, epoch=1)) == []


@pytest.mark.parametrize("late", ["Register", "Leaving", "Report", "WorkerDied"])
def test_what_comes_late_from_a_former_incarnation_does_not_touch_its_successor(pair: World, late: str) -> None:
    pair.handle(register("d0", Role.DECODE, epoch=2))
    pair.handle(register("d0", Role.DECODE, epoch=3))
    before = pair.state()
    for epoch in (1, 2):
        match late:
            case "Register":
                event: object = register("d0", Role.DECODE, epoch=epoch)
            case "Leaving":
                event = Leaving(worker=WorkerId("d0"), epoch=Epoch(epoch))
            case "Report":
                event = report("d0", 99, epoch)
            case _:
                event = WorkerDied(worker=WorkerId("d0"), epoch=Epoch(epoch), detail="killed")
        assert deaths(pair.handle(event)) == ([("d0", epoch)] * 4 if late == "WorkerDied" else [])
    assert pair.state() == before


def deaths(sends: list[Send]) -> list[tuple[str, int]]:
    """Of whom peers hear that the process is gone, once a peer that hears it; nothing else was sent."""
    messages = [send.message for send in sends]
    assert all(isinstance(message, PeerLost) and message.dead for message in messages)
    return [(message.peer.worker, message.peer.epoch) for message in messages if isinstance(message, PeerLost)]


@pytest.mark.parametrize("before", ["silent", "left", "replaced"])
def test_the_death_of_a_worker_that_had_left_before_is_told_to_its_peers(pair: World, before: str) -> None:
    """Until then they keep what it could still write into."""
    match before:
        case "silent":
            pair.sleep(5.5, "p1", "d0", "d1")
        case "left":
            pair.handle(Leaving(worker=WorkerId("p0"), epoch=Epoch(1)))
        case _:
            pair.handle(register("p0", Role.PREFILL, epoch=2))
    died = pair.handle(WorkerDied(worker=WorkerId("p0"), epoch=Epoch(1), detail="killed"))
    assert deaths(died) == [("p0", 1)] * (4 if before == "replaced" else 3)


def test_registering_again_changes_nothing_but_shows_life(pair: World) -> None:
    pair.place("r")
    before = pair.state()
    for _ in range(3):
        pair.sleep(1.5, "p0", "p1", "d1")
        assert pair.handle(register("d0", Role.DECODE)) == []
    assert [worker.alive for worker in pair.state().workers] == [True] * 4
    assert [worker.assigned for worker in pair.state().workers] == [worker.assigned for worker in before.workers]


def test_a_register_that_was_lost_is_made_up_for() -> None:
    """The worker's side of the membership against the router's."""
    world = World()
    address = register("c0", Role.COLOCATED).address
    member = Membership(address, Role.COLOCATED, Address("tcp://router:1"), KEY, max_num_seqs=8, max_model_len=4096)
    blocks = BlockCounts(free=1, held=0, cached=0, total=1)
    for step in range(REGISTER_EVERY):
        assert not world.state().ready
        world.now = step * REPORT_EVERY * 1.001
        for send in member.report(blocks, CacheCounts(), TransferCounts, running=0, waiting=0, left=0, now=world.now):
            assert world.handle(send.message) == []
    assert world.state().ready
    assert world.now < 5.0


def test_a_worker_that_leaves_gets_nothing_more_and_its_requests_go_elsewhere(pair: World) -> None:
    placed = pair.place("r")
    prefill, _ = workers_of(placed)
    sends = pair.handle(Leaving(worker=WorkerId(prefill), epoch=Epoch(1)))
    assert [(send.to, type(send.message)) for send in sends[:1]] == [(GATEWAY, WorkerLost)]
    assert pair.handle(report(prefill, 50)) == pair.handle(register(prefill, Role.PREFILL)) == []
    others = [workers_of(pair.place(f"r{i}"))[0] for i in range(4)]
    assert prefill not in others
    assert workers_of(pair.place("r", attempt=2))[0] != prefill


def test_a_prefill_worker_lost_in_the_middle_is_told_to_the_gateway_and_one_that_was_done_costs_no_retry(
    pair: World,
) -> None:
    """The gateway decides; asked again, the router says whether the attempt was hurt."""
    pair.place("computing", tokens=100)
    pair.place("other")
    pair.place("computed", tokens=5)
    pair.handle(prefilled("computed"))
    sends = pair.handle(WorkerDied(worker=WorkerId("p0"), epoch=None, detail="killed"))
    assert any(isinstance(send.message, WorkerLost) for send in sends)
    assert [type(send.message) for send in pair.handle(wanted("computing"))] == [Placed, WorkerLost]
    assert [type(send.message) for send in pair.handle(wanted("computed"))] == [Placed]


def test_messages_about_an_older_attempt_do_not_touch_the_newer_one(pair: World) -> None:
    pair.place("r", tokens=1000)
    second = pair.place("r", attempt=2, tokens=1000)
    for late in (prefilled("r", 1), finished("r", 1)):
        assert pair.handle(late) == []
    # All 1000 tokens still count: the next goes to the other prefill worker.
    assert workers_of(pair.place("s", tokens=1))[0] != workers_of(second)[0]
    assert pair.place("r", attempt=2) == second


def test_messages_about_a_request_or_worker_that_nobody_knows_do_nothing(pair: World) -> None:
    before = pair.state()
    for event in (
        prefilled("?"), finished("?"), report("?", 1), Leaving(worker=WorkerId("?"), epoch=Epoch(1)),
        WorkerDied(worker=WorkerId("?"), epoch=None, detail=""),
    ):  # fmt: skip
        assert pair.handle(event) == []
    assert pair.state() == before


@pytest.mark.parametrize("mac", [b"m" * 32, b"", "another key", "another message"])
def test_who_does_not_know_the_clusters_key_can_neither_join_nor_have_anyone_leave(pair: World, mac: Any) -> None:
    pair.place("r")
    before = pair.state()
    forged = [register("d0", Role.DECODE, epoch=666), register("d9", Role.DECODE), Leaving(WorkerId("d0"), Epoch(1))]
    for number, message in enumerate(forged, 1):
        match mac:
            case "another key":
                message = seal(b"x" * 32, message)
            case "another message":
                message = replace(message, mac=seal(KEY, Leaving(WorkerId("d0"), Epoch(2))).mac)
            case _:
                message = replace(message, mac=mac)
        assert pair.router.handle(message, pair.now) == []
        assert pair.router.inspect()["forged"] == number
    assert pair.state() == before


def test_the_supervisors_word_does_not_come_over_the_network() -> None:
    frame = encode(WorkerDied(worker=WorkerId("d0"), epoch=None, detail="killed"))
    with pytest.raises(BadMessage):
        decoder_for(*Messages)(frame)


def test_peers_can_tell_the_routers_word_from_anyone_elses(pair: World) -> None:
    sends = pair.handle(WorkerDied(worker=WorkerId("d0"), epoch=None, detail="killed"))
    heard = [send.message for send in sends if isinstance(send.message, PeerLost)]
    assert all(genuine(KEY, message) for message in heard)
    assert not any(genuine(KEY, replace(message, dead=False)) for message in heard)


def test_a_late_report_does_not_overwrite_a_younger_one(pair: World) -> None:
    for number in (3, 2):
        pair.handle(report("d0", number))
    assert pair.state().workers[0].steps == 3


def test_nobody_is_declared_lost_when_the_router_itself_stood_still(pair: World) -> None:
    pair.now += 60.0
    assert pair.handle(Tick()) == []
    assert all(worker.alive for worker in pair.state().workers)
    assert any(isinstance(send.message, PeerLost) for send in pair.sleep(5.5, "p0"))


def test_the_cluster_is_ready_when_every_role_has_a_live_worker() -> None:
    world = World()
    seen = [world.state().ready]
    for worker, role in (("p0", Role.PREFILL), ("d0", Role.DECODE)):
        world.handle(register(worker, role))
        seen.append(world.state().ready)
    world.handle(WorkerDied(worker=WorkerId("p0"), epoch=None, detail="killed"))
    assert [*seen, world.state().ready] == [False, False, True, False]


def test_requests_of_a_gateway_that_died_leave_the_ledger_in_the_end(pair: World) -> None:
    pair.place("r")
    pair.sleep(3.0, "p0", "p1", "d0", "d1")
    pair.now += 3600.0
    pair.handle(Tick())
    assert sum(worker.assigned for worker in pair.state().workers) == 0
    assert pair.handle(ClusterStateWanted(gateway=GATEWAY))


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1), (3, 2, 1)])
@pytest.mark.parametrize("silent", [False, True])
def test_of_a_workers_processes_the_last_one_keeps_the_name_in_whatever_order_they_come(
    order: tuple[int, ...], silent: bool
) -> None:
    """A zombie may register with a router that was restarted, before its successor does, or after."""
    world = World()
    world.handle(register("p0", Role.PREFILL))
    for epoch in order:
        world.handle(register("d0", Role.DECODE, epoch))
    assert world.place("r").decode.epoch == 3
    if silent:
        world.sleep(4.0, "p0")
        world.handle(register("d0", Role.DECODE, 1))
        assert not state_of(world, "d0").alive, "it may be back, and has its name"
        world.handle(register("d0", Role.DECODE, 3))
    assert (state_of(world, "d0").alive, state_of(world, "d0").epoch) == (True, 3)
    refused = sum(epoch < max(order[:place]) for place, epoch in enumerate(order) if place)
    assert world.router.inspect()["outdated"] == refused + silent


def state_of(world: World, worker: str) -> WorkerState:
    return next(each for each in world.state().workers if each.worker == worker)

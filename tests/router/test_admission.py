"""What the router promises where workers are full, one sentence a test."""

from typing import Any

import msgspec
import pytest

from messages.common import Role
from messages.ids import WorkerId
from messages.router_to_gateway import Placed, Rejected, WorkerLost
from messages.worker_to_router import WorkerDied
from router.core.admission import OUTPUT_COUNTED
from router.core.machine import Tick
from runtime.core.actions import Send
from tests.router.world import World, finished, prefilled, register, report, wanted

LONG = 100_000


def colocated(*slots: int, max_model_len: int = LONG, **settings: Any) -> World:
    world = World(**settings)
    for index, count in enumerate(slots):
        world.handle(register(f"c{index}", Role.COLOCATED, max_num_seqs=count, max_model_len=max_model_len))
    return world


def placed_in(sends: list[Send]) -> list[tuple[str, str]]:
    """Request and decode worker of each placement."""
    answers = [send.message for send in sends]
    return [(answer.request, answer.decode.worker) for answer in answers if isinstance(answer, Placed)]


def test_no_worker_gets_more_requests_than_it_runs_at_once_and_those_in_line_come_in_order() -> None:
    world = colocated(2, 1)
    for request in "abc":
        world.place(request)
    assert [worker.assigned for worker in world.state().workers] == [2, 1]
    assert world.handle(wanted("d")) == world.handle(wanted("e")) == []
    assert world.handle(prefilled("a")) == []  # it decodes on
    assert [request for request, _ in placed_in(world.handle(finished("a")))] == ["d"]
    assert [request for request, _ in placed_in(world.handle(finished("b")))] == ["e"]


def test_a_newcomer_does_not_overtake_those_in_line() -> None:
    world = colocated(8)
    world.handle(report("c0", 1, blocks=100))
    world.place("a", tokens=1000)
    assert world.handle(wanted("big", tokens=1000)) == []
    assert world.handle(wanted("small", tokens=10)) == []  # there would be room for it
    assert [request for request, _ in placed_in(world.handle(finished("a")))] == ["big", "small"]


def test_requests_are_placed_while_their_expected_tokens_are_within_the_pool() -> None:
    world = colocated(8)
    world.handle(report("c0", 1, blocks=10))  # 160 tokens
    world.place("a", tokens=50, max_new_tokens=14)
    world.place("b", tokens=31, max_new_tokens=2)  # 48, in whole blocks
    assert world.handle(wanted("c", tokens=40, max_new_tokens=9)) == []
    assert len(placed_in(world.handle(finished("b")))) == 1


def test_a_request_that_alone_takes_more_than_the_pool_gets_a_worker_of_its_own() -> None:
    world = colocated(8)
    world.handle(report("c0", 1, blocks=10))
    world.place("a", tokens=16)
    assert world.handle(wanted("whole", tokens=500)) == []
    assert placed_in(world.handle(finished("a"))) == [("whole", "c0")]
    assert world.handle(wanted("b", tokens=1, max_new_tokens=1)) == []
    assert placed_in(world.handle(finished("whole"))) == [("b", "c0")]


def test_of_an_answer_only_a_bounded_part_is_expected() -> None:
    world = colocated(8)
    world.handle(report("c0", 1, blocks=2 * (OUTPUT_COUNTED + 16) // 16))
    for request in "ab":
        world.place(request, tokens=16, max_new_tokens=50_000)
    assert world.handle(wanted("c", tokens=1, max_new_tokens=1)) == []


def test_the_pool_of_a_decode_worker_is_known_when_it_registers_and_prefill_workers_are_no_limit() -> None:
    world = World()
    world.handle(register("p0", Role.PREFILL, max_num_seqs=1))
    world.handle(register("d0", Role.DECODE, blocks=10))
    world.place("a", tokens=100)
    assert world.handle(wanted("b", tokens=100)) == []
    world.handle(register("d1", Role.DECODE, blocks=10))
    assert world.state().queued == 0


def test_a_worker_with_much_memory_in_use_is_passed_over_for_one_with_more_sequences() -> None:
    """Few sequences are no sign of room: were it not so, some long prompts would hide all other workers."""
    world = colocated(*[8] * 12)
    for index in range(12):
        world.handle(report(f"c{index}", 1, blocks=1000))
    for index in range(6):
        world.place(f"long {index}", tokens=15_000)
    short = [world.place(f"{index}", tokens=1000).decode.worker for index in range(24)]
    assert set(short) == {f"c{index}" for index in range(6, 12)}


def test_a_further_attempt_stands_in_front_and_no_full_queue_turns_it_away() -> None:
    world = colocated(1, 1, max_waiting=2)
    world.place("a")
    world.place("b")
    assert world.handle(wanted("c")) == world.handle(wanted("d")) == []
    assert isinstance(world.answer(wanted("e")), Rejected)
    lost = world.handle(WorkerDied(worker=WorkerId("c0"), epoch=None, detail="killed"))
    assert isinstance(lost[0].message, WorkerLost)
    assert world.handle(wanted("a", attempt=2)) == []
    assert placed_in(world.handle(finished("b"))) == [("a", "c1")]
    assert placed_in(world.handle(finished("a", 2))) == [("c", "c1")]


def test_a_further_attempt_may_take_the_place_of_the_one_before() -> None:
    world = colocated(1)
    world.place("a")
    assert world.handle(wanted("b")) == []
    assert placed_in(world.handle(wanted("a", attempt=2))) == [("a", "c0")]
    assert world.state().queued == 1


def test_a_further_attempt_waits_for_a_worker_that_it_does_not_avoid_and_others_get_its_old_place() -> None:
    world = colocated(1, 1)
    (a, b) = (world.place("a").decode.worker, world.place("b").decode.worker)
    assert world.handle(wanted("c")) == []
    assert world.handle(wanted("a", attempt=2, avoid=(a,))) == []
    assert placed_in(world.handle(finished("b"))) == [("a", b), ("c", a)]


def test_a_further_attempt_waits_for_room_as_long_as_it_takes_but_not_for_workers_that_are_gone() -> None:
    world = colocated(1, 1, wait_timeout=3.0, deserted_timeout=3.0)
    world.place("a")
    world.place("b")
    world.handle(WorkerDied(worker=WorkerId("c0"), epoch=None, detail="killed"))
    assert world.handle(wanted("a", attempt=2)) == world.handle(wanted("first")) == []
    sends = world.sleep(20.0, "c1")
    assert [(send.message.request, send.message.detail) for send in sends if isinstance(send.message, Rejected)] == [
        ("first", "waited too long, for every worker is full")
    ]
    world.handle(WorkerDied(worker=WorkerId("c1"), epoch=None, detail="killed"))
    assert world.sleep(2.9) == []
    (send,) = world.sleep(0.3)
    assert isinstance(send.message, Rejected) and send.message.request == "a"


def test_when_the_head_gives_up_those_behind_it_get_what_was_kept_for_it() -> None:
    world = colocated(8, wait_timeout=3.0)
    world.handle(report("c0", 1, blocks=100))
    for request in "ab":
        world.place(request, tokens=700)
    assert world.handle(wanted("big", tokens=1000)) == []
    assert world.handle(wanted("small", tokens=10)) == []
    assert [request for request, _ in placed_in(world.handle(finished("big")))] == ["small"]
    assert world.handle(wanted("huge", tokens=1000)) == []
    world.now += 1.0
    assert world.handle(wanted("tiny", tokens=10)) == []
    world.now += 2.1
    sends = world.handle(Tick())
    assert isinstance(sends[0].message, Rejected)
    assert placed_in(sends) == [("tiny", "c0")]


@pytest.mark.parametrize("known", [0, 1])
def test_where_a_worker_has_fewer_requests_than_are_counted_on_it_their_gateways_say_which_are_over(known: int) -> None:
    """``Finished`` was lost; the worker's reports show it within a second."""
    world = colocated(4, wait_timeout=600.0)
    for request in "abcd":
        world.place(request)
    assert world.handle(wanted("e")) == []
    world.now += 0.9
    assert world.handle(report("c0", 1, running=known)) == []  # they may be on their way
    world.now += 0.6
    asked = world.handle(report("c0", 2, running=known))  # and two wait there
    assert [request for request, _ in placed_in(asked)] == ["a", "b", "c", "d"]
    assert world.handle(report("c0", 3, running=known)) == [], "nobody is asked ten times a second"
    assert placed_in(world.handle(finished("c"))) == [("e", "c0")]
    world.now += 1.1
    asked = world.handle(report("c0", 4, running=known))
    assert [request for request, _ in placed_in(asked)] == ["a", "b", "d", "e"], "the answer may have been lost too"
    assert world.handle(report("c0", 5, running=4)) == []


def test_a_prompt_that_waits_in_a_prefill_queue_brings_nobody_into_doubt() -> None:
    world = World()
    world.handle(register("p0", Role.PREFILL))
    world.handle(register("d0", Role.DECODE))
    for request in "abcd":
        world.place(request)
    world.handle(prefilled("a"))
    world.now += 30.0
    assert world.handle(report("p0", 1, running=1)) == []  # and two wait there
    assert world.handle(report("d0", 1, running=0)) == []
    world.now += 0.5
    assert [send.message.request for send in world.handle(report("p0", 2, running=0))] == ["b", "c", "d"]


def test_a_prompt_whose_decode_worker_is_gone_does_not_stay_with_prefill_where_finished_was_lost() -> None:
    world = World()
    world.handle(register("p0", Role.PREFILL))
    world.handle(register("d0", Role.DECODE))
    world.place("a")
    world.handle(prefilled("a"))
    world.handle(WorkerDied(worker=WorkerId("d0"), epoch=None, detail="killed"))
    world.now += 1.5
    idle = msgspec.structs.replace(report("p0", 1, running=0), waiting=0)
    assert [send.message.request for send in world.handle(idle)] == ["a"]
    world.handle(finished("a"))
    assert world.router.inspect()["placed"] == 0


def test_a_request_whose_worker_is_gone_is_forgotten_in_time_where_finished_was_lost() -> None:
    world = colocated(4, 4, forget_deserted_after=10.0)
    world.place("a")
    world.handle(WorkerDied(worker=WorkerId("c0"), epoch=None, detail="killed"))
    world.handle(report("c1", 1))
    assert world.router.inspect()["placed"] == 1  # its gateway may ask, and has to hear that the worker is lost
    world.sleep(12.0, "c1")
    assert world.router.inspect()["placed"] == 0


def test_a_request_that_becomes_too_long_for_the_cluster_while_it_waits_is_told_so() -> None:
    world = World()
    assert world.handle(wanted("r", tokens=200)) == []
    (send,) = world.handle(register("c0", Role.COLOCATED, max_model_len=100))
    assert isinstance(send.message, Rejected) and send.message.retry_after is None

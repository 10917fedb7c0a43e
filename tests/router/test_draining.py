"""Promise: a worker that is draining gets nothing more, gives away what it runs as others have room, and says when
nothing is left; and nothing is drained, or flipped, without which requests could not be served."""

from typing import Any

import pytest
from msgspec.structs import replace

from messages.common import Role, TransferCounts
from messages.gateway_to_router import Computed
from messages.ids import Epoch, RequestId, WorkerId
from messages.router_to_gateway import MoveWanted, Placed
from messages.router_to_worker import RoleWanted
from messages.worker_to_router import Report
from router.core.drains import ASK_AGAIN, LATER, MOVE_WITHIN, MOVING_AT_ONCE, Drain, Flip, Refused, Undrain
from tests.router.world import World, finished, prefilled, register, report, wanted

D0 = WorkerId("d0")


def pools(prefill: int = 2, decode: int = 2, **options: Any) -> World:
    world = World()
    for number in range(prefill):
        world.handle(register(f"p{number}", Role.PREFILL))
    for number in range(decode):
        world.handle(register(f"d{number}", Role.DECODE, **options))
    return world


class Reports:
    """Of one worker: each has the next number."""

    def __init__(self, world: World, worker: str, epoch: int = 1) -> None:
        self.world, self.worker, self.epoch, self.number = world, worker, epoch, 0

    def __call__(self, *, left: int = 1, in_flight: int = 0) -> list[Any]:
        """One more; what the router sends for it."""
        self.number += 1
        self.world.now += 0.1
        plain = report(self.worker, self.number, self.epoch)
        fields = {name: getattr(plain, name) for name in Report.__struct_fields__}
        sends = self.world.handle(Report(**fields | {"left": left, "handovers": TransferCounts(in_flight=in_flight)}))
        return [send.message for send in sends]


def told(sends: list[Any], kind: type[Any]) -> list[Any]:
    return [send.message for send in sends if isinstance(send.message, kind)]


def run_on(world: World, worker: str, count: int) -> list[str]:
    """Requests that ``worker`` decodes, all of which have begun."""
    here: list[str] = []
    elsewhere: list[str] = []
    while len(here) < count:
        request = f"{worker}-{len(here)}-{len(elsewhere)}"
        (here if world.place(request).decode.worker == worker else elsewhere).append(request)
        world.handle(prefilled(request))
    for request in elsewhere:
        world.handle(finished(request))
    return here


def moving(request: str, attempt: int = 2, worker: str = "d0") -> Any:
    asked = wanted(request, attempt)
    fields = {name: getattr(asked, name) for name in asked.__struct_fields__}
    return type(asked)(**fields | {"moving": True, "computed": Computed(WorkerId(worker), Epoch(1), 10)})


def state_of(world: World, worker: str) -> Any:
    return next(each for each in world.state().workers if each.worker == worker)


def test_nothing_is_placed_on_a_worker_that_is_draining_until_it_is_wanted_again() -> None:
    world = pools()
    (wanted_role,) = told(world.handle(Drain(D0)), RoleWanted)
    assert (wanted_role.worker, wanted_role.role, wanted_role.draining) == ("d0", Role.DECODE, True)
    assert {world.place(f"r{n}").decode.worker for n in range(6)} == {"d1"}
    (wanted_role,) = told(world.handle(Undrain(D0)), RoleWanted)
    assert not wanted_role.draining
    assert "d0" in {world.place(f"s{n}").decode.worker for n in range(2)}


@pytest.mark.parametrize("worker", ["p0", "d0", "nobody"])
def test_the_last_worker_of_a_role_is_not_drained_unless_it_has_to_be(worker: str) -> None:
    world = pools(prefill=1, decode=1)
    with pytest.raises(Refused, match=r"is the last|no live worker"):
        world.handle(Drain(WorkerId(worker)))
    if worker == "nobody":
        return
    assert world.state().ready
    world.handle(Drain(WorkerId(worker), force=True))
    assert not world.state().ready
    assert world.handle(wanted("r")) == []  # it waits
    (placed,) = told(world.handle(Undrain(WorkerId(worker))), Placed)
    assert placed.request == "r"


def test_of_two_that_are_to_be_drained_the_second_is_refused() -> None:
    world = pools()
    world.handle(Drain(D0))
    with pytest.raises(Refused, match="d1 is the last decode worker"):
        world.handle(Drain(WorkerId("d1")))
    world.handle(Drain(D0))  # once more is harmless


def test_a_prefill_worker_is_drained_when_its_queue_is_computed_and_its_kv_taken() -> None:
    world = pools()
    placed = world.place("r")
    assert placed.prefill is not None
    worker = placed.prefill.worker
    world.handle(Drain(worker))
    reports = Reports(world, worker)
    for _ in range(3):
        assert reports(left=0) == []  # the order is still on its way
        assert not state_of(world, worker).drained
    world.handle(prefilled("r"))
    reports(left=1)
    assert not state_of(world, worker).drained
    reports(left=0)
    reports(left=0)
    assert state_of(world, worker).drained and world.router.standing(worker)["drained"]
    assert not state_of(world, "d0").drained


def test_its_own_word_is_enough_after_a_while() -> None:
    """A gateway that is gone tells nobody that its request is over."""
    world = pools()
    worker = world.place("r").decode.worker
    world.handle(Drain(worker))
    reports = Reports(world, worker)
    for _ in range(99):
        reports(left=0)
    assert not state_of(world, worker).drained
    reports(left=0)
    assert state_of(world, worker).drained


def test_what_runs_moves_a_few_at_a_time_with_its_kv() -> None:
    world = pools()
    here = run_on(world, "d0", 6)
    world.handle(Drain(D0))
    reports = Reports(world, "d0")
    asked = reports()
    assert [each.request for each in asked] == here[:MOVING_AT_ONCE] and {each.worker for each in asked} == {"d0"}
    assert reports() == []
    placed = world.answer(moving(here[0]))
    assert isinstance(placed, Placed) and placed.prefill is not None and placed.ticket is not None
    assert (placed.attempt, placed.prefill.worker, placed.decode.worker) == (2, "d0", "d1")
    assert world.answer(moving(here[0])) == placed  # asked again
    assert reports(in_flight=1) == []
    world.handle(prefilled(here[0], 2))
    assert reports(in_flight=4) == []
    assert [each.request for each in reports(in_flight=0)] == [here[4]]
    for request in here[1:]:
        world.answer(moving(request))
        world.handle(prefilled(request, 2))
    reports(left=0)
    reports(left=0)
    assert state_of(world, "d0").drained
    assert state_of(world, "d1").assigned == 6


def test_who_does_not_ask_is_asked_again() -> None:
    world = pools()
    (request,) = run_on(world, "d0", 1)
    world.handle(Drain(D0))
    reports = Reports(world, "d0")
    assert len(reports()) == 1
    sent = [message for _ in range(round(2 * ASK_AGAIN / 0.1) + 2) for message in reports()]
    assert [each.request for each in sent] == [request] * 2 and {type(each) for each in sent} == {MoveWanted}
    world.handle(finished(request))
    assert [reports() for _ in range(20)] == [[]] * 20


def test_what_has_not_begun_is_not_asked_to_move() -> None:
    world = pools()
    (request,) = [name for name in ("a", "b") if world.place(name).decode.worker == "d0"]
    world.handle(Drain(D0))
    reports = Reports(world, "d0")
    assert reports() == []
    world.handle(prefilled(request))
    assert [each.request for each in reports()] == [request]


def test_where_nobody_has_room_it_runs_on() -> None:
    world = pools(max_num_seqs=2)
    here = run_on(world, "d0", 2)
    others = run_on(world, "d1", 2)
    world.handle(Drain(D0))
    reports = Reports(world, "d0")
    assert [reports() for _ in range(5)] == [[]] * 5
    assert world.handle(moving(here[0])) == []  # nor does it help to ask
    world.handle(finished(others[0]))
    assert [each.request for each in reports()] == here
    assert isinstance(world.answer(moving(here[0])), Placed)
    assert world.handle(moving(here[1])) == []
    assert state_of(world, "d0").assigned == 2 and not state_of(world, "d0").drained
    world.handle(finished(others[1]))
    asked = [message for _ in range(12) for message in reports() if isinstance(message, MoveWanted)]
    assert asked[-1].request == here[1]


def test_a_move_that_comes_to_nothing_is_an_attempt_like_any_other() -> None:
    world = pools()
    (request,) = run_on(world, "d0", 1)
    world.handle(Drain(D0))
    Reports(world, "d0")()
    world.answer(moving(request))
    placed = world.place(request, 3, avoid=("d1",))
    assert placed.prefill is not None and placed.prefill.worker.startswith("p")
    assert placed.decode.worker == "d1"  # what is avoided is better than what is draining


def test_who_is_not_draining_gives_nothing_away() -> None:
    world = pools()
    (request,) = run_on(world, "d0", 1)
    assert world.handle(moving(request)) == []
    assert world.handle(moving("nobody's")) == []


def test_colocated_workers_drain_too_and_keep_their_role() -> None:
    world = World()
    world.handle(register("c0", Role.COLOCATED))
    world.handle(register("c1", Role.COLOCATED))
    (request,) = run_on(world, "c0", 1)
    with pytest.raises(Refused, match="cannot become a prefill one"):
        world.handle(Flip(WorkerId("c0"), Role.PREFILL))
    world.handle(Drain(WorkerId("c0")))
    (asked,) = Reports(world, "c0")()
    assert asked.worker == "c0"
    placed = world.answer(moving(request, worker="c0"))
    assert isinstance(placed, Placed) and placed.prefill is not None
    assert (placed.prefill.worker, placed.decode.worker) == ("c0", "c1")


def test_a_worker_takes_the_other_role_when_nothing_is_left_and_takes_it_back() -> None:
    world = pools()
    here = run_on(world, "d0", 2)
    world.handle(Flip(D0, Role.PREFILL))
    with pytest.raises(Refused, match="is the last decode worker"):
        world.handle(Flip(WorkerId("d1"), Role.PREFILL))
    reports = Reports(world, "d0")
    for request in [each.request for each in reports()]:
        world.answer(moving(request))
        world.handle(prefilled(request, 2))
    assert reports(left=1) == []
    assert world.router.standing(D0)["becoming"] is Role.PREFILL
    reports(left=0)
    (become,) = reports(left=0)
    assert (become.role, become.draining) == (Role.PREFILL, False)
    assert reports(left=0) == [become]  # until it has
    world.handle(register("d0", Role.PREFILL))
    state = state_of(world, "d0")
    assert (state.role, state.draining, state.drained, state.assigned) == (Role.PREFILL, False, False, 0)
    prefills = {placed.prefill.worker for n in range(4) if (placed := world.place(f"r{n}")).prefill is not None}
    assert prefills == {"p0", "p1", "d0"}
    assert {world.place(f"s{n}").decode.worker for n in range(1)} == {"d1"}
    for request in [*here, *(f"r{n}" for n in range(4)), "s0"]:
        world.handle(finished(request, 2))
    world.handle(Flip(D0, Role.DECODE))
    reports(left=0)
    (become,) = reports(left=0)
    world.handle(register("d0", Role.DECODE))
    assert state_of(world, "d0").role is Role.DECODE
    assert "d0" in {world.place(f"t{n}").decode.worker for n in range(2)}


@pytest.mark.parametrize("busy", [False, True])
def test_a_role_that_lost_its_others_meanwhile_keeps_the_worker(busy: bool) -> None:
    world = pools()
    if busy:
        run_on(world, "d0", 1)
    world.handle(Flip(D0, Role.PREFILL))
    world.handle(register("d0", Role.DECODE))  # it has not heard of that yet
    sends = world.sleep(2.5, "d0", "p0", "p1")  # d1 falls silent
    last = told(sends, RoleWanted)[-1]
    assert (last.role, last.draining) == (Role.DECODE, False)
    assert world.place("r").decode.worker == "d0"
    standing = world.router.standing(D0)
    assert standing["becoming"] is None and "the last decode worker" in standing["called_off"]


@pytest.mark.parametrize("heard", [(Role.DECODE, True), (Role.PREFILL, False)])
def test_a_flip_of_a_worker_that_falls_silent_is_called_off_and_when_it_is_back_it_does_what_it_did(
    heard: tuple[Role, bool],
) -> None:
    """``heard``: the role that it was told last before it fell silent, and whether to drain."""
    world = pools()
    world.handle(Flip(D0, Role.PREFILL))
    world.sleep(3.0, "d1", "p0", "p1")
    standing = world.router.standing(D0)
    assert standing["becoming"] is None and "no report for" in standing["called_off"]
    back = replace(register("d0", heard[0]), draining=heard[1])
    (wanted_role,) = told(world.handle(back), RoleWanted)
    assert (wanted_role.role, wanted_role.draining) == (Role.DECODE, False)
    assert "d0" in {world.place(f"r{n}").decode.worker for n in range(2)}
    world.handle(Flip(D0, Role.PREFILL))
    assert not world.router.standing(D0)["called_off"]


def test_a_drained_worker_that_was_only_silent_is_still_draining_when_it_is_back() -> None:
    world = pools()
    world.handle(Drain(D0))
    world.sleep(3.0, "d1", "p0", "p1")
    (wanted_role,) = told(world.handle(register("d0", Role.DECODE)), RoleWanted)  # which never heard of that
    assert wanted_role.draining
    assert {world.place(f"r{n}").decode.worker for n in range(2)} == {"d1"}


def test_sequences_whose_gateways_do_not_answer_let_others_move_first_and_are_asked_again() -> None:
    world = pools(max_num_seqs=32)
    run_on(world, "d0", MOVING_AT_ONCE + 2)
    world.handle(Drain(D0))
    reports = Reports(world, "d0")
    first = [each.request for each in reports(left=9) if isinstance(each, MoveWanted)]
    asked: dict[str, list[float]] = {}
    begun = world.now
    while world.now < begun + MOVE_WITHIN + LATER + 1.0:
        world.handle(report("d1", int(world.now * 100)))
        for each in reports(left=9):
            if isinstance(each, MoveWanted):
                asked.setdefault(each.request, []).append(world.now - begun)
    others = asked.keys() - set(first)
    assert len(first) == MOVING_AT_ONCE and len(others) == 2
    assert all(min(asked[request]) <= MOVE_WITHIN + 0.2 for request in others)
    assert all(max(asked[request]) >= MOVE_WITHIN + LATER - 0.1 for request in first), "they have another turn"


def test_a_router_that_was_restarted_learns_who_is_draining() -> None:
    world = World()
    draining = register("d0", Role.DECODE)
    fields = {name: getattr(draining, name) for name in draining.__struct_fields__}
    world.handle(type(draining)(**fields | {"draining": True}))
    world.handle(register("d1", Role.DECODE))
    world.handle(register("p0", Role.PREFILL))
    assert state_of(world, "d0").draining
    assert {world.place(f"r{n}").decode.worker for n in range(3)} == {"d1"}


def test_a_worker_that_has_not_heard_is_told_again_when_it_registers() -> None:
    world = pools()
    world.handle(Drain(D0))
    (again,) = told(world.handle(register("d0", Role.DECODE)), RoleWanted)
    assert again.draining
    world.handle(Undrain(D0))
    assert told(world.handle(register("d0", Role.DECODE)), RoleWanted) == []


def test_a_flipped_worker_is_not_taken_to_lack_the_requests_that_it_has_prefilled() -> None:
    world = pools()
    placed = world.place("r")
    assert placed.prefill is not None
    worker = placed.prefill.worker
    world.handle(prefilled("r"))
    world.handle(Flip(worker, Role.DECODE))
    reports = Reports(world, worker)
    reports(left=0)
    reports(left=0)
    world.handle(register(worker, Role.DECODE))
    world.now += 1000
    reports(left=0)
    assert state_of(world, placed.decode.worker).assigned == 1
    assert RequestId("r") not in world.router._members.get(worker).requests  # type: ignore[union-attr]

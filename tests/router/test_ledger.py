"""Any order of events leaves ledger, membership and queue sound; ``World`` checks that after each."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from messages.common import Role
from messages.gateway_to_router import Finished, PlacementWanted
from messages.ids import Epoch, WorkerId
from messages.router_to_gateway import Placed, Rejected, WorkerLost
from messages.worker_to_router import Leaving, WorkerDied
from router.core.machine import Tick
from tests.router.world import BLOCKS, World, finished, prefilled, register, report, wanted

REQUESTS = st.sampled_from(["a", "b", "c", "d", "e"])
ATTEMPTS = st.integers(1, 3)
WORKERS = [("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE)]
ANY_WORKER = st.sampled_from(WORKERS)
EPOCHS = st.integers(1, 3)
SLOTS = st.sampled_from([1, 8])

EVENTS = st.one_of(
    st.builds(wanted, REQUESTS, ATTEMPTS, st.integers(1, 5000), avoid=st.sampled_from([(), ("p0",), ("d0", "d1")])),
    st.builds(prefilled, REQUESTS, ATTEMPTS),
    st.builds(finished, REQUESTS, ATTEMPTS),
    st.builds(lambda worker, epoch, seqs: register(*worker, epoch, max_num_seqs=seqs), ANY_WORKER, EPOCHS, SLOTS),
    st.builds(lambda worker, number, epoch, blocks: report(worker[0], number, epoch, blocks=blocks), ANY_WORKER,
              st.integers(0, 9), EPOCHS, st.sampled_from([100, BLOCKS])),
    st.builds(lambda worker, epoch: WorkerDied(worker=WorkerId(worker[0]), epoch=epoch, detail=""), ANY_WORKER,
              st.none() | EPOCHS.map(Epoch)),
    st.builds(lambda worker, epoch: Leaving(worker=WorkerId(worker[0]), epoch=Epoch(epoch)), ANY_WORKER, EPOCHS),
    st.just(Tick()),
)  # fmt: skip


class Reference:
    """The router's promises to gateways, kept the slow and obvious way: who is placed where, who waits, who is over."""

    def __init__(self) -> None:
        self.placed: dict[str, Placed] = {}
        self.waiting: dict[str, int] = {}
        self.finished: dict[str, int] = {}

    def expect(self, event: PlacementWanted) -> str:
        """What a question must lead to."""
        placed = self.placed.get(event.request)
        if placed is not None and placed.attempt == event.attempt:
            return "the same answer"
        newest = placed.attempt if placed is not None else 0
        if event.attempt < newest or event.attempt <= self.finished.get(event.request, 0):
            return "nothing: it is late"
        return "nothing: it is in line" if event.request in self.waiting else "an answer, or a place in line"

    def asked(self, event: PlacementWanted, answers: list[object]) -> None:
        expected = self.expect(event)
        own = [answer for answer in answers if getattr(answer, "request", event.request) == event.request]
        kinds = [type(answer) for answer in own]
        match expected:
            case "the same answer":
                assert answers[0] == self.placed[event.request]
                assert kinds in ([Placed], [Placed, WorkerLost])
            case "an answer, or a place in line":
                assert kinds in ([Placed], [Rejected], [])
                self.placed.pop(event.request, None)
                if not own:
                    self.waiting[event.request] = event.attempt
            case "nothing: it is in line":
                assert kinds in ([Placed], [Rejected], []), "another question has its own answer"
                self.waiting[event.request] = max(event.attempt, self.waiting[event.request])
            case _:
                assert not answers, expected

    def answered(self, answer: Placed | Rejected) -> None:
        """An answer to a question that waited, or was just asked."""
        waited = self.waiting.pop(answer.request, None)
        assert waited in (None, answer.attempt)
        if isinstance(answer, Placed):
            self.placed[answer.request] = answer

    def over(self, event: Finished) -> None:
        self.finished[event.request] = max(event.attempt, self.finished.get(event.request, 0))
        placed = self.placed.get(event.request)
        if placed is not None and placed.attempt <= event.attempt:
            del self.placed[event.request]
        if self.waiting.get(event.request, 9) <= event.attempt:
            del self.waiting[event.request]


@settings(max_examples=300)
@given(st.booleans(), SLOTS, st.lists(st.tuples(EVENTS, st.sampled_from([0.0, 0.1, 1.0, 7.0])), max_size=60))
def test_no_order_of_events_unbalances_the_ledger_or_leaves_a_question_unanswered(
    all_there: bool, slots: int, events: list[tuple[Any, float]]
) -> None:
    world, reference = World(max_waiting=2, wait_timeout=3.0), Reference()
    for worker, role in WORKERS if all_there else ():
        world.handle(register(worker, role, max_num_seqs=slots))
    for event, pause in events:
        world.now += pause
        messages = [send.message for send in world.handle(event)]
        answers = [message for message in messages if isinstance(message, Placed | Rejected | WorkerLost)]
        if isinstance(event, PlacementWanted):
            reference.asked(event, answers)
        if isinstance(event, Finished):
            reference.over(event)
        alive = {(worker.worker, worker.epoch) for worker in world.state().workers if worker.alive}
        for answer in answers:
            if isinstance(answer, Placed | Rejected) and reference.placed.get(answer.request) != answer:
                reference.answered(answer)
                if isinstance(answer, Placed):
                    named = [at for at in (answer.prefill, answer.decode) if at is not None]
                    assert {(at.worker, at.epoch) for at in named} <= alive
        figures = world.router.inspect()
        assert (figures["placed"], figures["waiting"]) == (len(reference.placed), len(reference.waiting))
    # Whoever still waits hears within its time, but for further attempts where workers live: those wait for room.
    world.now += 3.1
    for send in world.handle(Tick()):
        if isinstance(send.message, Placed | Rejected):
            reference.answered(send.message)
    assert all(attempt > 1 for attempt in reference.waiting.values())
    # All finished, nothing is counted any more.
    for request in "abcde":
        world.handle(finished(request, 3))
    assert (world.router.inspect()["placed"], world.router.inspect()["waiting"]) == (0, 0)
    assert sum(worker.assigned for worker in world.state().workers) == 0


@settings(max_examples=50)
@given(st.lists(st.tuples(EVENTS, st.sampled_from([0.0, 0.1, 7.0])), max_size=40))
def test_the_same_events_lead_to_the_same_decisions(events: list[tuple[Any, float]]) -> None:
    def play() -> list[object]:
        world = World(max_waiting=2, wait_timeout=3.0)
        said: list[object] = []
        for event, pause in events:
            world.now += pause
            said.append(world.handle(event))
        return said

    assert play() == play()


@settings(max_examples=50)
@given(st.lists(EVENTS, max_size=40))
def test_every_lost_worker_is_lost_once_in_a_row(events: list[object]) -> None:
    world = World()
    world.handle(register("p0", Role.PREFILL))
    world.handle(register("d0", Role.DECODE))
    for event in events:
        lost = [(s.to, s.message.worker) for s in world.handle(event) if isinstance(s.message, WorkerLost)]
        assert len(lost) == len(set(lost))

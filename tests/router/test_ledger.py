"""Any order of events leaves ledger, membership and queue sound; ``World`` checks that after each."""

from hypothesis import given, settings
from hypothesis import strategies as st

from messages.common import Role
from messages.ids import Epoch, WorkerId
from messages.router_to_gateway import Placed, Rejected, WorkerLost
from messages.worker_to_router import Leaving, WorkerDied
from router.core.machine import Tick
from tests.router.world import World, finished, prefilled, register, report, wanted

REQUESTS = st.sampled_from(["a", "b", "c", "d", "e"])
ATTEMPTS = st.integers(1, 3)
WORKERS = st.sampled_from([("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE)])
EPOCHS = st.integers(1, 3)

EVENTS = st.one_of(
    st.builds(wanted, REQUESTS, ATTEMPTS, st.integers(1, 5000), avoid=st.sampled_from([(), ("p0",), ("d0", "d1")])),
    st.builds(prefilled, REQUESTS, ATTEMPTS),
    st.builds(finished, REQUESTS, ATTEMPTS),
    st.builds(lambda worker, epoch: register(*worker, epoch), WORKERS, EPOCHS),
    st.builds(lambda worker, number, epoch: report(worker[0], number, epoch), WORKERS, st.integers(0, 9), EPOCHS),
    st.builds(lambda worker, epoch: WorkerDied(worker=WorkerId(worker[0]), epoch=epoch, detail=""), WORKERS,
              st.none() | EPOCHS.map(Epoch)),
    st.builds(lambda worker, epoch: Leaving(worker=WorkerId(worker[0]), epoch=Epoch(epoch)), WORKERS, EPOCHS),
    st.just(Tick()),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(EVENTS, st.sampled_from([0.0, 0.1, 1.0, 7.0])), max_size=60))
def test_no_order_of_events_unbalances_the_ledger(events: list[tuple[object, float]]) -> None:
    world = World(max_waiting=2, wait_timeout=3.0)
    told: dict[tuple[str, int], object] = {}
    for event, pause in events:
        world.now += pause
        for send in world.handle(event):
            if isinstance(send.message, Placed | Rejected):
                told[(send.message.request, send.message.attempt)] = send.message
    for request in "abcde":
        world.handle(finished(request, 3))
    state = world.state()
    assert state.queued == 0
    assert sum(worker.assigned for worker in state.workers) == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_every_lost_worker_is_lost_once_in_a_row(events: list[object]) -> None:
    world = World()
    world.handle(register("p0", Role.PREFILL))
    world.handle(register("d0", Role.DECODE))
    for event in events:
        lost = [(s.to, s.message.worker) for s in world.handle(event) if isinstance(s.message, WorkerLost)]
        assert len(lost) == len(set(lost))

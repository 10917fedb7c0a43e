"""Promise: draining workers and changing their roles is safe at any moment, whatever fails beside it."""

from simulator.campaign import judged
from simulator.history import AttemptBegun, AttemptPlaced, Draining
from simulator.plan import draw
from simulator.world import World

SEEDS = 40


def test_workers_drain_and_take_other_roles_amid_faults_and_every_promise_holds() -> None:
    broken = [seed for seed in range(SEEDS) if not judged(draw(seed, faults=True, orders=True)).verdict.clean]
    assert not broken


def test_without_faults_sequences_move_and_nobody_notices() -> None:
    drained = moved = 0
    for seed in range(SEEDS):
        plan = draw(seed, faults=False, orders=True)
        assert judged(plan).verdict.clean, seed
        history = World(plan).run().history
        asked = {(each.request, each.attempt) for each in history if isinstance(each, AttemptBegun) and each.moving}
        placed = {(each.request, each.attempt) for each in history if isinstance(each, AttemptPlaced)}
        drained += sum(isinstance(each, Draining) for each in history)
        moved += len(asked & placed)
    assert drained > SEEDS / 2 and moved > 3

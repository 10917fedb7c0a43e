"""Promise: whatever links, clocks and processes do, no block is ever free and writable at once, none leaks, and none is
read before it is verified; and everyone is answered with the true tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ownership.world import Faults, World

faults = st.builds(
    Faults,
    loss=st.sampled_from([0.0, 0.0, 0.1, 0.3]),
    corrupt=st.sampled_from([0.0, 0.0, 0.1, 0.5]),
    reorder=st.booleans(),
    deaths=st.booleans(),
    aborts=st.booleans(),
    silence=st.booleans(),
    step=st.booleans(),
    offers=st.sampled_from([False, False, True]),
)
degrees = st.sampled_from([1, 1, 2])


chances = st.integers(0, 2**32)
schedules = st.integers(0, 80).flatmap(lambda length: st.lists(chances, min_size=length, max_size=length))


def run(
    seed: int, schedule: list[int], faults: Faults, one_sided: bool, prefill_ranks: int, decode_ranks: int
) -> World:
    """``seed``: what is asked first, and how what is left settles; ``schedule``: what happens between, by number."""
    world = World(seed, faults, one_sided=one_sided, prefill_ranks=prefill_ranks, decode_ranks=decode_ranks)
    world.ask()
    for chance in schedule:
        world.happen(chance)
    world.rng.seed(seed)
    world.settle()
    world.check_settled()
    return world


@pytest.mark.slow
@pytest.mark.parametrize("one_sided", [True, False], ids=["one-sided", "two-sided"])
@settings(max_examples=2500, database=None)
@given(st.integers(0, 2**32), schedules, faults, degrees, degrees)
def test_under_any_schedule_every_block_has_one_owner_and_everyone_a_true_answer(
    one_sided: bool, seed: int, schedule: list[int], faults: Faults, prefill_ranks: int, decode_ranks: int
) -> None:
    run(seed, schedule, faults, one_sided, prefill_ranks, decode_ranks)

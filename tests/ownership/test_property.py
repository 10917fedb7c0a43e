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
)
degrees = st.sampled_from([1, 1, 2])


def run(seed: int, length: int, faults: Faults, one_sided: bool, prefill_ranks: int, decode_ranks: int) -> World:
    world = World(seed, faults, one_sided=one_sided, prefill_ranks=prefill_ranks, decode_ranks=decode_ranks)
    world.ask()
    for _ in range(length):
        world.happen()
    world.settle()
    world.check_settled()
    return world


@pytest.mark.parametrize("one_sided", [True, False], ids=["one-sided", "two-sided"])
@settings(max_examples=2500, deadline=None, database=None)
@given(st.integers(0, 2**32), st.integers(0, 80), faults, degrees, degrees)
def test_under_any_schedule_every_block_has_one_owner_and_everyone_a_true_answer(
    one_sided: bool, seed: int, length: int, faults: Faults, prefill_ranks: int, decode_ranks: int
) -> None:
    run(seed, length, faults, one_sided, prefill_ranks, decode_ranks)

"""Promise: a step ends in time on a machine of any speed, and a fast one is not held up."""

import pytest

from runtime.core.pace import MEASURED, StepPace

TARGET = 1.0


def run(pace: StepPace, tokens_per_second: float, steps: int = 40) -> list[float]:
    """Steps of a machine that always has a long prompt to compute; the seconds of each."""
    taken = []
    for _ in range(steps):
        tokens = pace.budget
        taken.append(tokens / tokens_per_second)
        pace.took(tokens, taken[-1])
    return taken


@pytest.mark.parametrize("tokens_per_second", [8.0, 100.0, 700.0])
def test_a_slow_machine_gets_steps_that_end_in_time(tokens_per_second: float) -> None:
    pace = StepPace(TARGET, most=2048)
    taken = run(pace, tokens_per_second)
    assert taken[0] <= MEASURED / tokens_per_second
    assert max(taken[1:]) <= 1.01 * TARGET
    assert taken[-1] > 0.8 * TARGET


def test_a_fast_machine_gets_all_that_it_may_have_at_once() -> None:
    pace = StepPace(TARGET, most=2048)
    pace.took(MEASURED, MEASURED / 10_000)
    assert pace.budget == 2048


def test_a_machine_that_slows_down_is_followed_within_a_few_steps() -> None:
    pace = StepPace(TARGET, most=4096)
    run(pace, 4000)
    assert pace.budget == 4000
    taken = run(pace, 50)
    assert sum(each > 1.5 * TARGET for each in taken) <= 4 and taken[-1] <= TARGET


def test_one_stall_costs_no_more_than_a_few_smaller_steps() -> None:
    pace = StepPace(TARGET, most=512)
    run(pace, 2000)
    pace.took(512, 60.0)
    assert pace.budget == 128
    run(pace, 2000, steps=2)
    assert pace.budget == 512


def test_steps_that_only_decode_say_nothing_about_prompts() -> None:
    pace = StepPace(TARGET, most=512)
    run(pace, 2000)
    pace.took(4, 0.4)
    assert pace.budget == 512


def test_the_budget_never_ends() -> None:
    pace = StepPace(TARGET, most=512)
    run(pace, 0.01)
    assert 1 <= pace.budget <= 2


@pytest.mark.parametrize(("weights", "token"), [(1.3, 0.12), (2.6, 0.05), (4.0, 0.01)])
def test_where_no_step_can_end_in_time_steps_get_all_the_tokens_that_cost_nothing(weights: float, token: float) -> None:
    """A step reads all weights, in ``weights`` seconds, while it computes, in ``token`` seconds a token."""
    pace = StepPace(TARGET, most=2048)
    taken = []
    for _ in range(40):
        tokens = pace.budget
        taken.append(max(weights, tokens * token))
        pace.took(tokens, taken[-1])
    assert max(taken[1:]) <= 1.3 * weights
    assert pace.budget >= weights / token

"""The rule of conditional disaggregation, case by case."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messages.common import DecisionCounts
from runtime.core.disaggregation import CLEARLY, Case, Decisions, Disaggregation, Policy, Reason, decide
from runtime.core.recent import Cost, RecentCost, RecentRate

AUTO = Disaggregation(policy=Policy.AUTO, max_local_prefill_length=512)
# 100 tokens: 0.1 s on either side, and 0.1 s to ship them.
PLAIN = Case(
    num_tokens=100,
    decode_rate=1000.0,
    prefill_rate=1000.0,
    transfer_cost=Cost(0.0, 1e6),
    token_bytes=1000.0,
    decode_running=0,
)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({}, Reason.COSTS_LESS, id="shipping costs as much as computing"),
        pytest.param({"transfer_cost": Cost(0.0, 1e9)}, Reason.COSTS_MORE, id="shipping costs nothing"),
        pytest.param({"decode_rate": 500.0}, Reason.COSTS_MORE, id="decode computes half as fast"),
        pytest.param({"decode_rate": 500.0, "prefill_queued": 200}, Reason.COSTS_LESS, id="prefill has a queue"),
        pytest.param({"decode_queued": 200}, Reason.COSTS_MORE, id="decode has a queue"),
        pytest.param({"decode_running": 1}, Reason.DECODE_BUSY, id="one waits for it"),
        pytest.param({"decode_running": 1, "prefill_queued": 100}, Reason.COSTS_LESS, id="one waits, as this would"),
        pytest.param({"decode_running": 30, "prefill_queued": 2000}, Reason.DECODE_BUSY, id="a full batch waits"),
        pytest.param({"num_tokens": 513}, Reason.TOO_LONG, id="long"),
        pytest.param({"num_tokens": 513, "decode_cached": 1}, Reason.COSTS_LESS, id="a tail just short enough"),
        pytest.param({"num_tokens": 4000, "decode_cached": 3900}, Reason.COSTS_LESS, id="nearly all cached on decode"),
        pytest.param(
            {"num_tokens": 4000, "decode_cached": 3900, "prefill_cached": 3999, "transfer_cost": Cost(0.0, 1e9)},
            Reason.COSTS_MORE, id="nearly all cached on both",
        ),
        pytest.param({"prefill_cached": 100, "transfer_cost": Cost(0.0, 1e7)}, Reason.COSTS_MORE, id="prefill has it"),
        pytest.param({"num_tokens": 1}, Reason.COSTS_MORE, id="a step of one token takes as long as one of 32"),
        pytest.param({"num_tokens": 1, "transfer_cost": Cost(0.0, 1e5)}, Reason.COSTS_LESS, id="as shipping does"),
        pytest.param({"transfer_cost": Cost(0.1, 0.0)}, Reason.COSTS_LESS, id="messages take as long"),
        pytest.param({"transfer_cost": Cost(0.02, 1e9)}, Reason.COSTS_MORE, id="messages take a fifth of it"),
        pytest.param({"decode_rate": 0.0}, Reason.COSTS_LESS, id="decode has computed nothing, and is tried"),
        pytest.param({"decode_rate": 0.0, "decode_running": 1}, Reason.DECODE_BUSY, id="but not at others' cost"),
        pytest.param({"prefill_rate": 0.0}, Reason.UNMEASURED, id="prefill has computed nothing"),
        pytest.param({"transfer_cost": Cost(0.0, 0.0)}, Reason.UNMEASURED, id="nothing has been shipped"),
        pytest.param({"transfer_cost": Cost(0.0, float("nan"))}, Reason.UNMEASURED, id="no number"),
    ],
)  # fmt: skip
def test_who_computes_a_prompt(changes: dict[str, Any], reason: Reason) -> None:
    assert decide(AUTO, replace(PLAIN, **changes)) is reason


@pytest.mark.parametrize(("policy", "reason"), [(Policy.ALWAYS, Reason.ALWAYS), (Policy.NEVER, Reason.NEVER)])
@pytest.mark.parametrize("changes", [{}, {"num_tokens": 4000}, {"decode_rate": 0.0}])
def test_a_fixed_policy_asks_for_nothing(policy: Policy, reason: Reason, changes: dict[str, float]) -> None:
    assert decide(Disaggregation(policy=policy), replace(PLAIN, **changes)) is reason
    assert reason.local == (policy is Policy.NEVER)


def test_no_local_prefill_where_none_is_allowed() -> None:
    assert decide(replace(AUTO, max_local_prefill_length=0), replace(PLAIN, num_tokens=1)) is Reason.TOO_LONG


COUNTS = st.integers(0, 10_000)
RATES = st.floats(1e-3, 1e12)
COSTS = st.builds(Cost, st.floats(0, 100), RATES)


@given(
    st.builds(
        Case, num_tokens=st.integers(1, 10_000), decode_cached=st.just(0), prefill_cached=st.just(0),
        decode_rate=RATES, prefill_rate=RATES, transfer_cost=COSTS, token_bytes=st.floats(0, 1e6),
        decode_running=COUNTS, decode_queued=COUNTS, prefill_queued=COUNTS,
    )
)  # fmt: skip
def test_what_speaks_against_decode_never_brings_a_prompt_there(case: Case) -> None:
    if decide(AUTO, case).local:
        return
    for changes in (
        {"decode_running": case.decode_running + 1}, {"decode_queued": case.decode_queued + 1},
        {"decode_rate": case.decode_rate / 2}, {"prefill_rate": case.prefill_rate * 2},
        {"transfer_cost": case.transfer_cost._replace(rate=case.transfer_cost.rate * 2)},
        {"transfer_cost": case.transfer_cost._replace(latency=case.transfer_cost.latency / 2)},
    ):  # fmt: skip
        assert not decide(AUTO, replace(case, **changes)).local


@given(st.integers(1, 512), st.integers(0, 64), st.integers(0, 5000), RATES, RATES, COSTS)
def test_a_local_prefill_holds_nobody_up_for_longer_than_it_saves(
    tokens: int, running: int, queued: int, decode_rate: float, prefill_rate: float, transfer_cost: Cost
) -> None:
    case = replace(
        PLAIN, num_tokens=tokens, decode_running=running, prefill_queued=queued,
        decode_rate=decode_rate, prefill_rate=prefill_rate, transfer_cost=transfer_cost,
    )  # fmt: skip
    if decide(AUTO, case).local:
        step = max(tokens, 32) / decode_rate
        handed_over = (queued + max(tokens, 32)) / prefill_rate + transfer_cost.seconds(tokens * case.token_bytes)
        assert (1 + running) * step <= CLEARLY * handed_over


def test_every_reason_is_counted() -> None:
    decisions = Decisions()
    for times, reason in enumerate(Reason):
        for _ in range(times):
            decisions.add(reason)
    counts = decisions.counts()
    assert counts.__struct_fields__ == tuple(reason.value for reason in Reason)
    assert counts == DecisionCounts(*range(len(Reason)))


def test_a_rate_follows_what_is_measured_and_one_outlier_does_not_rule_it() -> None:
    rate = RecentRate()
    assert rate.value == 0.0
    rate.took(0, 1.0, now=0.0)
    rate.took(100, 0.0, now=0.0)
    assert rate.value == 0.0  # nothing, or no time: no measurement
    for _ in range(20):
        rate.took(100, 0.1, now=0.0)
    assert rate.value == pytest.approx(1000)
    rate.took(100, 0.2, now=0.0)
    assert 800 < rate.value < 1000
    for _ in range(20):
        rate.took(100, 0.2, now=1.0)
    assert rate.value == pytest.approx(500, rel=0.02)
    rate.forget_old(31.0)
    assert rate.value > 0
    rate.forget_old(31.1)
    assert rate.value == 0.0


def test_small_hand_overs_say_nothing_of_what_bytes_cost_and_large_ones_tell_them_apart() -> None:
    cost = RecentCost()
    assert cost.value == Cost(0.0, 0.0)
    cost.took(0, 1.0, now=0.0)
    cost.took(1e6, 0.0, now=0.0)
    assert cost.value == Cost(0.0, 0.0)
    for _ in range(20):
        cost.took(1e6, 0.003, now=0.0)
    assert cost.value == (pytest.approx(0.003), 0.0)
    for size in (1e6, 50e6, 10e6, 30e6):
        cost.took(size, 0.003 + size / 3e9, now=1.0)
    assert cost.value == (pytest.approx(0.003, rel=0.2), pytest.approx(3e9, rel=0.1))
    assert cost.value.seconds(60e6) == pytest.approx(0.023, rel=0.1)
    cost.forget_old(31.1)
    assert cost.value == Cost(0.0, 0.0)


def test_after_many_short_prompts_a_longer_one_is_still_handed_over() -> None:
    """3 ms of messages and digests each, whatever the size."""
    cost = RecentCost()
    for _ in range(20):
        cost.took(16 * 24_000, 0.003 + 16 * 24_000 / 3e9, now=0.0)
    case = replace(PLAIN, num_tokens=500, decode_rate=1400.0, prefill_rate=1400.0, token_bytes=24_000.0)
    assert decide(AUTO, replace(case, transfer_cost=cost.value)) is Reason.COSTS_MORE


def test_one_slow_hand_over_is_soon_outweighed() -> None:
    cost = RecentCost()
    cost.took(1e6, 0.7, now=0.0)
    for _ in range(20):
        cost.took(1e6, 0.003, now=0.0)
    assert cost.value.seconds(1e6) < 0.01


@given(st.lists(st.tuples(st.floats(1, 1e10), st.floats(1e-5, 100)), min_size=1, max_size=30))
def test_a_cost_is_never_negative_and_never_falls_with_the_size(taken: list[tuple[float, float]]) -> None:
    cost = RecentCost()
    for size, seconds in taken:
        cost.took(size, seconds, now=0.0)
    latency, rate = cost.value
    assert latency >= 0 and 0 <= rate <= 1e18 and latency + rate > 0
    assert cost.value.seconds(1e9) >= cost.value.seconds(1e6)

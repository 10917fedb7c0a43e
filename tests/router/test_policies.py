"""The lazy heap against the obvious way."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messages.common import Role
from messages.ids import RequestId
from router.core.policies.base import LOOK
from router.core.policies.least_load import LeastLoad, Load, outstanding_sequences, outstanding_tokens
from router.core.views import WorkerView
from tests.router.world import register

STEPS = st.tuples(st.integers(0, 7), st.sampled_from(["load", "add", "remove", "choose"]), st.integers(0, 5))


@given(st.lists(STEPS, max_size=60))
def test_least_load_chooses_what_a_scan_of_all_workers_would(steps: list[tuple[int, str, int]]) -> None:
    """Among equals it is the one whose load has not changed for the longest time: no two runs differ."""
    views = [WorkerView.registered(register(f"w{i}", Role.PREFILL), 0.0) for i in range(8)]
    policy = LeastLoad(outstanding_tokens)
    changed: dict[WorkerView, int] = {}  # those that can be chosen, and when their load was last another one
    for time, (index, what, number) in enumerate(steps):
        view = views[index]
        match what:
            case "load":
                view.tokens = number
                policy.changed(view)
                if view in changed:
                    changed[view] = time
            case "add" if view not in changed:
                policy.add(view)
                changed[view] = time
            case "remove":
                policy.remove(view)
                changed.pop(view, None)
            case _:
                suitable = [v for v in changed if v is not view]
                expected = min(suitable, key=lambda v: (v.tokens, changed[v]), default=None)
                for _ in range(2):  # asking changes nothing
                    assert policy.choose(lambda v, avoided=view: v is not avoided) is expected
        assert len(policy) == len(changed)
        assert all((v in policy) == (v in changed) for v in views)


@pytest.mark.parametrize(("load", "best"), [(outstanding_tokens, "many short"), (outstanding_sequences, "few long")])
def test_prefill_counts_tokens_and_decode_counts_sequences(load: Callable[[WorkerView], Load], best: str) -> None:
    few, many = (WorkerView.registered(register(name, Role.DECODE), 0.0) for name in ("few long", "many short"))
    few.tokens, few.requests = 900, {RequestId("a"): None}
    many.tokens, many.requests = 30, {RequestId(name): None for name in "bcd"}
    policy = LeastLoad(load)
    policy.add(few)
    policy.add(many)
    chosen = policy.choose(lambda view: True)
    assert chosen is not None and chosen.worker == best


def test_the_search_for_room_ends_after_a_few_workers_without_and_changes_nothing() -> None:
    policy = LeastLoad(outstanding_tokens)
    views = [WorkerView.registered(register(f"w{i}", Role.DECODE), 0.0) for i in range(LOOK + 1)]
    for view in views:
        policy.add(view)
    asked: list[WorkerView] = []
    assert policy.choose(lambda view: True, lambda view: asked.append(view) is not None) is None
    assert asked == views[:LOOK]
    assert policy.choose(lambda view: view not in views[1:3], lambda view: view is views[LOOK]) is views[LOOK]
    assert policy.choose(lambda view: True) is views[0]


def test_workers_without_room_come_last() -> None:
    """By the pool first, in eighths, then by sequences; those whose batch is full are the last of all."""
    batch, most, some, free = (
        WorkerView.registered(register(name, Role.DECODE, max_num_seqs=3, blocks=80), 0.0) for name in "bmsf"
    )
    for view, sequences, tokens in ((batch, 3, 16), (most, 1, 1000), (some, 1, 100), (free, 2, 90)):
        view.requests, view.tokens = {RequestId(str(number)): None for number in range(sequences)}, tokens
    assert sorted((batch, most, some, free), key=outstanding_sequences) == [some, free, most, batch]


def test_stale_entries_do_not_pile_up() -> None:
    policy = LeastLoad(outstanding_tokens)
    views = [WorkerView.registered(register(f"w{i}", Role.PREFILL), 0.0) for i in range(4)]
    for view in views:
        policy.add(view)
    for step in range(10_000):
        views[3].tokens = 10_000 - step
        policy.changed(views[3])
    assert len(policy._heap) <= 2 * 4 + 64

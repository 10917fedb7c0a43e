"""The lazy heap against the obvious way."""

from hypothesis import given
from hypothesis import strategies as st

from messages.common import Role
from router.core.policies.least_load import LeastLoad, outstanding_tokens
from router.core.views import WorkerView
from tests.router.world import register


@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from(["load", "add", "remove", "choose"]), st.integers(0, 50))))
def test_least_load_chooses_what_a_scan_of_all_workers_would(steps: list[tuple[int, str, int]]) -> None:
    views = [WorkerView.registered(register(f"w{i}", Role.PREFILL), 0.0) for i in range(8)]
    policy = LeastLoad(outstanding_tokens)
    there: set[WorkerView] = set()
    for index, what, number in steps:
        view = views[index]
        match what:
            case "load":
                view.tokens = number
                policy.changed(view)
            case "add" if view not in there:
                policy.add(view)
                there.add(view)
            case "remove":
                policy.remove(view)
                there.discard(view)
            case _:
                suitable = [v for v in there if v is not view]
                chosen = policy.choose(lambda v, avoided=view: v is not avoided)
                assert (chosen is None) == (not suitable)
                assert chosen is None or chosen.tokens == min(v.tokens for v in suitable)
        assert len(policy) == len(there)


def test_stale_entries_do_not_pile_up() -> None:
    policy = LeastLoad(outstanding_tokens)
    views = [WorkerView.registered(register(f"w{i}", Role.PREFILL), 0.0) for i in range(4)]
    for view in views:
        policy.add(view)
    for step in range(10_000):
        views[3].tokens = 10_000 - step
        policy.changed(views[3])
    assert len(policy._heap) <= 2 * 4 + 64

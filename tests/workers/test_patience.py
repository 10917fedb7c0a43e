"""Promise: a hand-over that drags is left for another way when that is clearly quicker, and only then."""

import pytest

from prefill_worker.core.patience import AT_LEAST, TIMES, patience
from runtime.core.recent import Cost

UNKNOWN = Cost(0.0, 0.0)
QUICK, LONG_WAY = Cost(0.01, 1e9), Cost(0.5, 1e7)


@pytest.mark.parametrize(
    ("compute", "others", "expected"),
    [
        (0.05, [], AT_LEAST),
        (3.0, [], TIMES * 3.0),
        (3.0, [UNKNOWN], TIMES * 3.0),
        (3.0, [UNKNOWN, QUICK], AT_LEAST),
        (3.0, [LONG_WAY], TIMES * 1.5),
        (0.5, [LONG_WAY], TIMES * 0.5),
    ],
)
def test_it_lasts_as_long_as_the_quickest_other_way_would_take_and_some_more(
    compute: float, others: list[Cost], expected: float
) -> None:
    assert patience(compute, 10_000_000, others) == pytest.approx(expected)

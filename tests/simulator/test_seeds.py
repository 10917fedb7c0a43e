"""Promise: whatever happens to processes, links and memories: every client gets its answer, whole and once."""

import pytest

from tests.simulator.seeds import check_seeds


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 1000, 250))
def test_whatever_goes_wrong_no_promise_is_broken(first: int) -> None:
    check_seeds(first, 250)

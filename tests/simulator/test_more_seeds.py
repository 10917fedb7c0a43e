"""Promise: the same as in ``test_seeds.py``; half of it here, so that two processes can share it."""

import pytest

from tests.simulator.seeds import check_seeds


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 2000, 250))
def test_whatever_goes_wrong_no_promise_is_broken(first: int) -> None:
    check_seeds(first, 250)

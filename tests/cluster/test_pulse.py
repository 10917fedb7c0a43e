"""Promise: a router that stands still is told from one that nobody has looked at."""

from cluster.core.pulse import PAUSE, Pulse

EVERY = 0.1


def looks(pulse: Pulse, begin: float, end: float) -> float | None:
    """When ``pulse`` was found to stand still between these, if it was."""
    count = round((end - begin) / EVERY)
    return next((at for at in (begin + number * EVERY for number in range(1, count + 1)) if pulse.still(at)), None)


def test_who_answers_turns() -> None:
    pulse = Pulse(1.95, 0.0)
    for second in range(60):
        assert looks(pulse, second, second + 1) is None
        pulse.beat(second + 1)


def test_who_does_not_answer_stands_still_after_the_timeout_and_not_before() -> None:
    pulse = Pulse(1.95, 0.0)
    pulse.beat(0.3)
    found = looks(pulse, 0.0, 5.0)
    assert found is not None and 2.25 <= found < 2.25 + 2 * EVERY


def test_time_for_which_nobody_looked_does_not_count() -> None:
    pulse = Pulse(1.95, 0.0)
    assert looks(pulse, 0.0, 1.0) is None
    assert not pulse.still(61.0)
    found = looks(pulse, 61.0, 70.0)
    assert found is not None and 61.9 <= found <= 62.1
    assert PAUSE > 2 * EVERY, "a look that is a little late is none that is missing"

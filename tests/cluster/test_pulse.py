"""Promise: a router that stands still is told from one that nobody has looked at, or asked."""

from cluster.core.pulse import Pulse

EVERY = 0.1


def looks(pulse: Pulse, begin: float, end: float) -> float | None:
    """When ``pulse`` was found to stand still between these, if it was."""
    count = round((end - begin) / EVERY)
    return next((at for at in (begin + number * EVERY for number in range(1, count + 1)) if pulse.still(at)), None)


def test_who_answers_turns_however_long_nobody_asks() -> None:
    pulse = Pulse(1.95)
    for second in range(0, 60, 10):
        pulse.ask(second)
        assert looks(pulse, second, second + 1.9) is None
        pulse.beat()
        assert looks(pulse, second + 1.9, second + 10) is None


def test_who_does_not_answer_stands_still_after_the_timeout_and_not_before() -> None:
    pulse = Pulse(1.95)
    pulse.ask(0.3)
    found = looks(pulse, 0.3, 5.0)
    assert found is not None and 2.25 <= found < 2.25 + 2 * EVERY


def test_a_question_that_is_asked_again_is_as_old_as_it_was() -> None:
    pulse = Pulse(1.95)
    pulse.ask(0.0)
    assert looks(pulse, 0.0, 1.5) is None
    pulse.ask(1.5)
    found = looks(pulse, 1.5, 5.0)
    assert found is not None and found < 2.2


def test_time_for_which_nobody_looked_does_not_count() -> None:
    for timeout in (0.5, 1.95):
        pulse = Pulse(timeout)
        pulse.ask(0.0)
        assert looks(pulse, 0.0, timeout / 2) is None
        assert not pulse.still(60.0)
        found = looks(pulse, 60.0, 70.0)
        assert found is not None and 60 + timeout / 2 - EVERY <= found <= 60 + timeout / 2 + 2 * EVERY

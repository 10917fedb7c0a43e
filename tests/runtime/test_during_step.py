"""Promise: while a step runs only what may be is handled, and what is about one request is handled as it came."""

from typing import NamedTuple

from runtime.core.during_step import DuringStep


class Early(NamedTuple):
    request: str


class Other(NamedTuple):
    request: str


class OfNobody(NamedTuple):
    """Like an answer of a transport, or a question of another thread."""


def test_what_is_early_is_admitted_and_all_else_waits_in_order() -> None:
    during = DuringStep((Early,), limit=10)
    came = [OfNobody(), Early("a"), Other("b"), OfNobody(), Early("c")]
    assert [during.admits(event) for event in came] == [False, True, False, False, True]
    assert during.take() == [OfNobody(), Other("b"), OfNobody()]
    assert during.take() == []


def test_what_is_early_does_not_overtake_what_waits_of_its_request() -> None:
    during = DuringStep((Early,), limit=10)
    came = [Other("a"), Early("a"), Early("b"), Early("a")]
    assert [during.admits(event) for event in came] == [False, False, True, False]
    assert during.take() == [Other("a"), Early("a"), Early("a")]
    assert during.admits(Early("a"))


def test_where_nothing_is_early_all_waits() -> None:
    during = DuringStep((), limit=10)
    assert not during.admits(Early("a"))
    assert during.take() == [Early("a")]


def test_it_is_full_when_so_many_wait() -> None:
    during = DuringStep((Early,), limit=2)
    for event in (Other("a"), Early("b"), Early("c")):
        during.admits(event)
    assert not during.full
    during.admits(OfNobody())
    assert during.full
    during.take()
    assert not during.full

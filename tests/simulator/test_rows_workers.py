"""Promise: the rows of the failure table about workers that die, restart, hang, and clients that go."""

import time
from dataclasses import replace

import pytest

from messages.common import Role
from simulator.faults import Kind
from simulator.history import DeclaredLost, Frozen, Idle, Killed, Left, Started, Thawed
from simulator.plan import NEVER
from tests.simulator.rows import LONG, Story, colocated, first_pair, freeze, kill, topology, wish

WAYS = pytest.mark.parametrize("one_sided", [True, False], ids=["one-sided", "two-sided"])
RANKS = pytest.mark.parametrize("ranks", [1, 2])


@pytest.mark.parametrize("moment", ["Prefill", "OpenTransfer", "TransferAccepted"])
def test_a1_a_prefill_worker_killed_queued_or_in_a_chunk_is_replaced_and_nobody_notices(moment: str) -> None:
    prefill, _ = first_pair()
    story = Story([wish()], [kill(prefill, moment, after=0.01)]).clean().resumed()
    assert story.placed(2).prefill.name != prefill
    assert story.lost_after(story.killed_at()) <= 0.5
    assert story.next_token_after(story.killed_at()) <= 1.0


@WAYS
@RANKS
@pytest.mark.parametrize("part", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_a2_a_prefill_worker_killed_in_a_transfer_leaves_nothing_that_is_believed(
    part: float, one_sided: bool, ranks: int
) -> None:
    of = topology(one_sided=one_sided, ranks=dict.fromkeys(Role, ranks))
    prefill, _ = first_pair(of)
    story = Story([wish()], [kill(prefill, "TransferAccepted", after=0.04 * part)], of).clean().resumed()
    assert story.next_token_after(story.killed_at()) <= 1.0
    first = story.placed(1).decode.name
    if first != story.placed(2).decode.name:
        assert story.held(first, story.killed_at() + 1.0) == 0


@WAYS
@RANKS
def test_a2_killed_after_the_last_byte_before_the_ack_it_costs_at_most_an_attempt(one_sided: bool, ranks: int) -> None:
    of = topology(one_sided=one_sided, ranks=dict.fromkeys(Role, ranks))
    prefill, _ = first_pair(of)
    story = Story([wish()], [kill(prefill, "EndTransfer", after=0.0001)], of).clean()
    assert story.ended() == 1 and story.verdict.resumes <= 1


@WAYS
def test_a3_after_a_restart_of_prefill_its_old_handles_are_rejected_and_the_next_transfer_is_good(
    one_sided: bool,
) -> None:
    of = topology(1, 2, one_sided=one_sided)
    story = Story([wish()], [kill("prefill-0", "TransferAccepted", after=0.01, seconds=0.4)], of).clean().resumed()
    ready = [record for record in story.all(Started) if record.process.name == "prefill-0"][-1]
    assert story.placed(2).prefill == ready.process, "the old incarnation was used again"
    assert story.next_token_after(ready.at) <= 2.0


@pytest.mark.parametrize("of", [topology(), colocated()], ids=["prefill and decode", "colocated"])
@pytest.mark.parametrize("token", [1, 2, 4, 7, 8])
def test_b1_a_decode_worker_killed_at_any_token_is_replaced_without_gap_or_repeat(token: int, of) -> None:  # type: ignore[no-untyped-def]
    _, decode = first_pair(of)
    story = Story([wish(tokens=8)], [kill(decode, "TokenBatch", token)], of).clean()
    if story.verdict.resumes:
        killed = story.killed_at()
        assert story.lost_after(killed) <= 0.5
        assert story.next_token_after(killed) <= 1.5
        if of.of(Role.PREFILL):
            assert story.held(story.placed(1).prefill.name, killed + 2.0) == 0
    assert story.ended() == 1


def test_b1_killed_after_the_last_token_but_before_its_ack_it_costs_nothing() -> None:
    _, decode = first_pair()
    story = Story([wish()], [kill(decode, "EndAck")]).clean().resumed(0)
    assert story.ended() == 1


def test_b2_decode_and_its_prefill_both_die_and_the_stream_goes_on() -> None:
    pair = first_pair()
    story = Story([wish()], [kill(name, "TokenBatch", 3) for name in pair]).clean().resumed()
    assert {story.placed(2).prefill.name, story.placed(2).decode.name}.isdisjoint(pair)


def test_b2_two_deaths_in_a_row_are_two_resumes() -> None:
    of = topology(decode=3)
    first = kill(first_pair(of)[1], "TokenBatch", 3)
    second = Story([wish()], [first], of).placed(2).decode.name
    Story([wish()], [first, kill(second, "TokenBatch", 6)], of).clean().resumed(2)


def test_b2_when_the_last_decode_worker_dies_there_is_one_typed_error_and_no_silence() -> None:
    story = Story([wish(tokens=14)], [kill("decode-0", "TokenBatch", 3)], topology(1, 1)).clean()
    (failed,) = story.failures()
    assert failed.status == 503 and failed.code and failed.retry_after
    assert failed.at - story.killed_at() <= 5.0


@pytest.mark.parametrize("when", ["PlacementWanted", "Prefill", "OpenTransfer", "EndTransfer", "TokenBatch"])
def test_f_when_a_client_goes_away_nothing_of_it_is_left_a_second_later(when: str) -> None:
    asked = wish(tokens=14)
    whole = Story([asked], []).clean()
    at = next(record.at for record in whole.history if getattr(record, "kind", "") == when)
    story = Story([replace(asked, leaves_at=at + 0.0001)], []).clean()
    (left,) = story.all(Left)
    for name in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
        assert story.held(name, left.at + 1.0) == 0
    assert story.all(Idle)[0].at - left.at <= 2.0


def test_f_half_of_all_clients_go_away_and_everybody_else_has_the_whole_answer() -> None:
    wishes = [wish(n, at=1.5 + n / 50, leaves_after=n % 7 if n % 2 else None, tokens=10) for n in range(16)]
    story = Story(wishes, []).clean()
    assert story.ended() >= 8 and len(story.all(Left)) >= 6
    assert all(story.held(name, story.all(Idle)[0].at) == 0 for name in ("prefill-0", "decode-0"))


def test_f_a_client_that_stops_reading_delays_nobody_and_loses_nothing() -> None:
    story = Story([wish(0, rests=(1.52, 4.0)), wish(1, at=1.5)], []).clean()
    assert story.ended() == 2
    assert min(record.at for record in story.history if type(record).__name__ == "Ended") < 3.0


@pytest.mark.parametrize("seconds", [2.5, 10.0, 60.0])
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_h_a_worker_that_hangs_is_left_and_after_it_goes_on_its_late_tokens_count_for_nothing(
    role: Role, seconds: float
) -> None:
    moment, nth = ("TransferAccepted", 1) if role is Role.PREFILL else ("TokenBatch", 4)
    name = first_pair()[role is Role.DECODE]
    story = Story([wish(tokens=12)], [freeze(name, seconds, moment, nth)]).clean()
    (frozen,), (thawed,) = story.all(Frozen), story.all(Thawed)
    assert story.all(DeclaredLost)[0].at - frozen.at <= 3.0
    assert story.next_token_after(frozen.at + 0.01) <= 4.0
    assert thawed.at - frozen.at >= seconds - 0.001
    assert story.verdict.repeated == 0 and story.ended() == 1


@pytest.mark.parametrize("seconds", [1.0, 2.0])
def test_h_a_router_that_hangs_shortly_takes_nobody_for_lost_when_it_goes_on(seconds: float) -> None:
    story = Story([wish(0, tokens=14), wish(1, at=2.0 + seconds)], [freeze("router", seconds, "TokenBatch", 2)])
    assert not story.clean().all(DeclaredLost) and not story.all(Killed)
    assert story.ended() == 2


@pytest.mark.parametrize("seconds", [2.5, 10.0, 60.0])
def test_h_a_router_that_hangs_for_longer_is_replaced_and_nobody_waits_for_it_for_four_seconds(seconds: float) -> None:
    late = [wish(number, at=2.0 + number / 10) for number in range(1, 30)]
    story = Story([wish(0, tokens=14), *late], [freeze("router", seconds, "TokenBatch", 2)]).clean()
    (frozen,), (killed,) = story.all(Frozen), story.all(Killed)
    assert killed.process == frozen.process and not story.all(DeclaredLost)
    assert story.ended() == 30
    assert max(story.next_token_after(frozen.at, each.request) - (each.at - frozen.at) for each in late) < 4.0
    assert max(story.pauses()) < 1.0, "who had a place did not need it"


def test_j_every_worker_is_restarted_under_load_and_no_client_sees_an_error() -> None:
    names = ("prefill-0", "prefill-1", "decode-0", "decode-1")
    stops = [replace(kill(name, seconds=0.3), kind=Kind.STOP, at=1.6 + 0.8 * place) for place, name in enumerate(names)]
    wishes = [wish(n, at=1.5 + n / 10, tokens=12, prompt=LONG[: 5 + n % 17]) for n in range(40)]
    story = Story(wishes, stops).clean()
    assert story.ended() == 40 and not story.failures()
    assert len([record for record in story.all(Started) if record.process.name in names]) == 8


def test_j_in_a_rolling_restart_every_worker_is_drained_first_and_no_stream_pauses_for_two_seconds() -> None:
    names = ("prefill-0", "prefill-1", "decode-0", "decode-1")
    retired = [
        replace(kill(name, seconds=0.3), kind=Kind.RETIRE, at=1.6 + 1.5 * place) for place, name in enumerate(names)
    ]
    wishes = [wish(n, at=1.5 + n / 8, tokens=14, prompt=LONG[: 5 + n % 17]) for n in range(50)]
    story = Story(wishes, retired).clean()
    assert story.ended() == 50 and not story.failures()
    assert len({record.process for record in story.all(Started) if record.process.name in names}) == 8
    assert max(story.pauses()) < 2.0


def test_j_a_worker_that_changes_its_role_loses_no_request() -> None:
    flip = replace(kill("decode-1"), kind=Kind.FLIP, at=1.7)
    wishes = [wish(n, at=1.5 + n / 8, tokens=14, prompt=LONG[: 5 + n % 17]) for n in range(30)]
    story = Story(wishes, [flip]).clean()
    assert story.ended() == 30 and not story.failures()
    (flipped,) = [record for record in story.all(Started) if record.at > 1.0]
    assert (flipped.process.name, flipped.role) == ("decode-1", Role.PREFILL)
    assert max(story.pauses()) < 2.0


def test_k_clocks_that_differ_by_hours_change_nothing() -> None:
    """Each process of a run has a clock that began at another time, up to two hours apart."""
    for seed in range(5):
        Story([wish(n) for n in range(3)], [], seed=seed).clean().resumed(0)


def test_k_no_simulated_process_reads_a_wall_clock_so_none_can_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor may a core import what could (``tests/test_shape.py``)."""

    def read() -> float:
        raise AssertionError("a wall clock is read")

    for name in ("time", "time_ns", "localtime", "gmtime", "ctime"):
        monkeypatch.setattr(time, name, read)
    away = replace(kill("router", seconds=0.3), at=1.55)
    story = Story([wish(n) for n in range(3)], [kill(first_pair()[1], "TokenBatch", 3), away]).clean()
    assert story.ended() == 3


def test_nobody_is_taken_for_lost_for_nothing() -> None:
    story = Story([wish(n, at=1.5 + n, tokens=14) for n in range(10)], []).clean()
    assert not story.all(DeclaredLost) and story.verdict.resumes == 0
    assert story.all(Idle)[0].at < NEVER

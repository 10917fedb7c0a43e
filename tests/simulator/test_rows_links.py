"""Promise: the rows of the failure table about links, memories, Ray's head, the router, and too much to do."""

from dataclasses import replace

import pytest

from messages.common import Role
from runtime.core.disaggregation import Policy
from simulator.faults import Kind
from simulator.history import Dropped, Ended, Got, Healed, Idle, Killed, Offered, Started
from tests.simulator.rows import LONG, Story, first_pair, kill, link, topology, wish

WAYS = pytest.mark.parametrize("one_sided", [True, False], ids=["one-sided", "two-sided"])


@WAYS
@pytest.mark.parametrize("direction", ["there", "back", "both"])
@pytest.mark.parametrize("moment", ["OpenTransfer", "TransferAccepted", "EndTransfer"])
def test_d1_where_prefill_cannot_reach_decode_the_request_goes_another_way(
    moment: str, direction: str, one_sided: bool
) -> None:
    of = topology(one_sided=one_sided)
    prefill, decode = first_pair(of)
    ways = [(prefill, decode)] if direction != "back" else []
    ways += [(decode, prefill)] if direction != "there" else []
    cuts = [link(Kind.CUT, *way, 60.0, moment) for way in ways]
    story = Story([wish()], cuts, of).clean()
    assert story.ended() == 1


@WAYS
@pytest.mark.parametrize("policy", [Policy.ALWAYS, Policy.AUTO])
@pytest.mark.parametrize("decode", [1, 2])
def test_d1_where_no_prefill_worker_can_reach_decode_it_computes_the_prompts(
    decode: int, policy: Policy, one_sided: bool
) -> None:
    of = topology(1, decode, one_sided=one_sided, policy=policy)
    cuts = [replace(link(Kind.CUT, "prefill-0", name, 60.0), at=1.0) for name in of.of(Role.DECODE)]
    story = Story([wish(n, at=1.5 + n / 10) for n in range(3)], cuts, of).clean()
    assert story.ended() == 3 and not story.failures()


def test_where_it_was_lost_that_requests_are_over_their_places_are_free_two_seconds_later() -> None:
    cut = replace(link(Kind.CUT, "gateway-0", "router", 1.0), at=1.52)
    story = Story(
        [wish(n, at=1.5, tokens=2) for n in range(4)] + [wish(n, at=2.5) for n in range(4, 8)], [cut], topology(1, 1)
    ).clean()  # fmt: skip
    assert story.ended() == 8 and max(record.at for record in story.all(Ended)) < 5.0


@pytest.mark.parametrize("held", [True, False], ids=["held back", "dropped"])
@pytest.mark.parametrize("seconds", [1.0, 5.0])
def test_d3_what_comes_after_a_partition_from_the_router_heals_is_fenced(held: bool, seconds: float) -> None:
    _, decode = first_pair()
    cuts = [
        link(Kind.CUT, *way, seconds, "TokenBatch", 3, holds=held) for way in ((decode, "router"), ("router", decode))
    ]
    story = Story([wish(tokens=14), wish(1, at=1.6, tokens=14), wish(2, at=8.0)], cuts).clean()
    assert story.ended() == 3 and story.verdict.repeated == 0 and story.all(Healed)


def test_d3_late_tokens_of_a_worker_that_was_cut_off_are_dropped_and_counted() -> None:
    _, decode = first_pair()
    cuts = [link(Kind.CUT, decode, to, 4.0, "TokenBatch", 3, holds=True) for to in ("router", "gateway-0")]
    story = Story([wish(tokens=14)], cuts).clean().resumed()
    assert story.verdict.late_tokens > 0 and story.verdict.repeated == 0


@pytest.mark.parametrize("told", [True, False], ids=["the launcher sees it", "nobody sees it"])
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_e_while_rays_head_is_gone_nothing_fails_and_a_death_is_found_all_the_same(role: Role, told: bool) -> None:
    """Nothing is started again meanwhile. Where nobody tells the router of the death, missed reports do."""
    victim = first_pair()[role is Role.DECODE]
    moment, nth = ("TransferAccepted", 1) if role is Role.PREFILL else ("TokenBatch", 3)
    misfortunes = [kill(victim, moment, nth)]
    if not told:
        misfortunes.append(replace(link(Kind.HEADLESS, "", "", 60.0), at=1.0))
    wishes = [wish(n, at=1.5 + n * 0.7, tokens=10) for n in range(60)]
    story = Story(wishes, misfortunes).clean()
    assert story.ended() == 60 and not story.failures() and story.verdict.resumes >= 1
    assert story.lost_after(story.killed_at()) <= (0.5 if told else 3.0)


def test_g_more_than_all_pools_hold_waits_its_turn_and_all_get_their_answers() -> None:
    of = topology(1, 1, num_blocks=dict.fromkeys(Role, 12))
    story = Story([wish(n, at=1.5 + n / 100, tokens=14) for n in range(12)], [], of).clean()
    assert story.ended() == 12 and story.all(Idle)[0].at < 31.5


def test_g_what_was_preempted_goes_on_with_the_same_tokens() -> None:
    of = topology(1, 1, num_blocks={**dict.fromkeys(Role, 40), Role.DECODE: 14}, policy=Policy.NEVER)
    story = Story([wish(n, prompt=LONG[: 4 + n], tokens=24) for n in range(4)], [], of).clean()
    assert story.ended() == 4


def test_g_a_request_that_can_never_fit_is_refused_for_good() -> None:
    story = Story([wish(prompt=LONG * 3, tokens=8)], []).clean()
    (failed,) = story.failures()
    assert failed.status == 400 and failed.retry_after is None


def test_g_a_decode_worker_that_is_lost_at_full_load_stalls_nobody() -> None:
    of = topology(2, 2, num_blocks=dict.fromkeys(Role, 14))
    _, decode = first_pair(of)
    story = Story([wish(n, at=1.5 + n / 50, tokens=14) for n in range(16)], [kill(decode, "TokenBatch", 9)], of).clean()
    assert story.ended() == 16


@WAYS
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", [Kind.CORRUPT, Kind.SWAP, Kind.STALE])
def test_i_a_bad_block_is_found_before_anything_reads_it_and_the_client_sees_no_error(
    kind: Kind, ranks: int, one_sided: bool
) -> None:
    """Each read of KV looks whether it is the right one: none ever finds it wrong."""
    of = topology(one_sided=one_sided, ranks=dict.fromkeys(Role, ranks))
    ways = [(prefill, decode) for prefill in of.of(Role.PREFILL) for decode in of.of(Role.DECODE)]
    spoils = [replace(link(kind, *way, 3.0), chance=chance) for way in ways for chance in (0.3,)]
    story = Story([wish(n, at=1.5 + n / 5, tokens=5, prompt=LONG[n:]) for n in range(10)], spoils, of).clean()
    assert story.ended() == 10 and not story.failures()


@WAYS
def test_i_blocks_that_are_always_bad_are_prefilled_again_elsewhere(one_sided: bool) -> None:
    of = topology(one_sided=one_sided)
    story = Story([wish()], [replace(link(Kind.CORRUPT, *first_pair(of), 30.0), chance=1.0)], of).clean()
    assert story.ended() == 1 and story.verdict.resumes >= 1


@pytest.mark.parametrize("kind", [Kind.LOSE, Kind.REPEAT, Kind.REORDER])
def test_i_frames_that_are_lost_repeated_or_reordered_change_nothing(kind: Kind) -> None:
    of = topology(one_sided=False)
    ways = [(prefill, decode) for prefill in of.of(Role.PREFILL) for decode in of.of(Role.DECODE)]
    spoils = [replace(link(kind, *way, 4.0), chance=0.3) for way in ways]
    story = Story([wish(n, at=1.5 + n / 5, tokens=5) for n in range(10)], spoils, of).clean()
    assert story.ended() == 10


def test_d2_other_pairs_do_not_wait_for_a_slow_one() -> None:
    of = topology(one_sided=False)
    slow = first_pair(of)
    story = Story(
        [wish(n, at=1.5 + n / 10, tokens=6, prompt=LONG[n:]) for n in range(8)],
        [replace(link(Kind.SLOW, *slow, 30.0), chance=300.0)], of,
    ).clean()  # fmt: skip
    assert story.ended() == 8


@pytest.mark.parametrize("slowness", [1500.0, 4000.0])
@pytest.mark.parametrize("decode", [1, 2])
def test_d2_a_hand_over_that_drags_is_given_up_within_a_second_for_a_quicker_way(decode: int, slowness: float) -> None:
    of = topology(decode=decode, one_sided=False)
    before = [wish(number, at=1.5 + number / 20, tokens=3, prompt=LONG[number:]) for number in range(8)]
    late = wish(8, at=4.0, prompt=LONG[9:] + LONG)
    calm = Story([*before, late], [], of).placed(request=late.request)
    assert calm.prefill is not None
    slow = link(Kind.SLOW, calm.prefill.name, calm.decode.name, 60.0, at=3.0, chance=slowness)
    story = Story([*before, late], [slow], of).clean().resumed()
    assert story.ended() == 9
    first = next(record.at for record in story.all(Got) if record.request == late.request)
    again = story.placed(attempt=2, request=late.request)
    assert again.at - first < 1.0
    assert (again.prefill, again.decode) != (calm.prefill, calm.decode)
    assert story.next_token_after(first, late.request) < 1.5


@pytest.mark.parametrize("away", [0.3, 1.0, 3.0])
def test_c2_a_router_that_is_restarted_serves_again_and_streams_go_on_meanwhile(away: float) -> None:
    wishes = [wish(n, at=1.5 + n / 10, tokens=14) for n in range(10)] + [wish(10, at=2.0 + away)]
    story = Story(wishes, [replace(kill("router", seconds=away), at=1.7)]).clean()
    ready = [record for record in story.all(Started) if record.kind == "router"][-1]
    assert story.ended() == 11 and not story.failures()
    assert story.next_token_after(ready.at, wishes[-1].request) <= 3.0


def test_c2_a_worker_that_dies_while_the_router_is_away_is_missed_by_the_new_one() -> None:
    _, decode = first_pair()
    away = replace(kill("router", seconds=1.0), at=1.45)
    story = Story([wish(tokens=14, at=1.3)], [away, replace(kill(decode, notice=None), at=1.5)]).clean()
    assert story.ended() == 1 and story.all(Killed)


def test_nothing_is_sent_to_nobody_where_nothing_goes_wrong() -> None:
    story = Story([wish(n, at=1.5 + n / 10) for n in range(5)], []).clean()
    assert not story.all(Dropped) and story.all(Offered)

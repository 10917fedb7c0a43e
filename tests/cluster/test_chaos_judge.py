"""Promise: a stream is the same as its failure-free one, or it is said what of it was lost, repeated or wrong."""

import math
import os
from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from cluster.chaos.catalogue import Case
from cluster.chaos.core.answers import Answer, Comparison, Verdict
from cluster.chaos.core.faults import Fault, Kind
from cluster.chaos.core.figures import percentile, slope
from cluster.chaos.core.report import REACTION, Memory, Report, Resume, Strike, Tally, held, resumes_of, unexplained
from cluster.chaos.meters import GRPC_POOLS, LATE, Uses, uses
from cluster.chaos.page import page
from cluster.chaos.recorder import Recorder

TOKENS = [7, 3, 9, 4, 4, 8, 1, 2, 6, 5, 11, 13, 12, 10, 17, 15]
USAGE = {"prompt_tokens": 3, "completion_tokens": 16, "total_tokens": 19}
Event = dict[str, Any]


def piece(tokens: list[int], *, finish: str | None = None, index: int = 0, shift: float = 0.0) -> Event:
    """An event with some tokens, of which each is a word; their log-probabilities are wrong by ``shift``."""
    scores = [-token / 10 + shift for token in tokens]
    tops = [{f"t{token}": score} for token, score in zip(tokens, scores, strict=True)]
    logprobs = {"tokens": [f"t{token}" for token in tokens], "token_logprobs": scores, "top_logprobs": tops}
    text = "".join(f"t{token} " for token in tokens)
    choice = {"index": index, "text": text, "token_ids": tokens, "logprobs": logprobs, "finish_reason": finish}
    return {"choices": [choice | ({"baton": {"attempts": 2}} if finish else {})], "usage": None}


def pieces(tokens: list[int], size: int = 3) -> list[Event]:
    """A whole answer of these tokens."""
    parts = [tokens[at : at + size] for at in range(0, len(tokens), size)]
    events = [piece(part, finish="length" if number == len(parts) - 1 else None) for number, part in enumerate(parts)]
    return [*events, {"choices": [], "usage": USAGE}]


def expected() -> Answer:
    answer = Answer()
    for event in pieces(TOKENS):
        answer.feed(event)
    return answer


def judged(events: list[Event], broken: str = "") -> tuple[Verdict, str]:
    comparison = Comparison(expected())
    for event in events:
        comparison.feed(event)
    return comparison.verdict(broken), comparison.detail


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_however_it_is_cut_into_events_an_answer_is_the_same(size: int) -> None:
    assert judged(pieces(TOKENS, size)) == (Verdict.SAME, "")


def test_log_probabilities_may_differ_by_their_rounding() -> None:
    assert judged([piece(TOKENS, finish="length", shift=1e-4), pieces(TOKENS)[-1]])[0] is Verdict.SAME
    assert judged([piece(TOKENS, finish="length", shift=0.05), pieces(TOKENS)[-1]])[0] is Verdict.WRONG


@pytest.mark.parametrize(
    ("tokens", "verdict"),
    [
        (TOKENS[:8] + TOKENS[6:], Verdict.REPEATED),
        (TOKENS + TOKENS[-1:], Verdict.REPEATED),
        (TOKENS[:8] + TOKENS[10:], Verdict.LOST),
        (TOKENS[1:], Verdict.LOST),
        (TOKENS[:-1], Verdict.LOST),
        ([*TOKENS[:8], 99, 98, 97, 96, *TOKENS[12:]], Verdict.WRONG),
        ([*TOKENS[:15], 99], Verdict.WRONG),
    ],
    ids=["again", "one too many", "a gap", "without a beginning", "without an end", "others", "another one at the end"],
)
def test_what_is_different_is_called_by_its_name(tokens: list[int], verdict: Verdict) -> None:
    found, detail = judged(pieces(tokens))
    assert found is verdict and detail


def test_a_stream_that_breaks_off_is_lost() -> None:
    assert judged(pieces(TOKENS)[:3], "the connection broke") == (Verdict.LOST, "the connection broke")
    assert judged(pieces(TOKENS)[:-1])[0] is Verdict.LOST  # its usage


def test_another_reason_to_finish_or_another_usage_is_wrong() -> None:
    events = pieces(TOKENS)
    assert judged([*events[:-2], piece(TOKENS[-1:], finish="stop"), events[-1]])[0] is Verdict.WRONG
    assert judged([*events[:-1], {"choices": [], "usage": USAGE | {"total_tokens": 20}}])[0] is Verdict.WRONG


def test_chat_events_are_read_too() -> None:
    logprobs = {"content": [{"token": "a", "logprob": -1.0, "top_logprobs": [{"logprob": -1.0}, {"logprob": -2.0}]}]}
    choice = {"index": 0, "delta": {"content": "a"}, "token_ids": [1], "logprobs": logprobs, "finish_reason": "stop"}
    answer = Answer()
    assert answer.feed({"choices": [choice]}) == [0]
    assert answer.samples[0].text == "a" and answer.samples[0].logprobs[0].top == (-1.0, -2.0)


def strike(kind: Kind, began: float, victim: str = "decode-0") -> Strike:
    return Strike(Fault(0, kind, victim), "decode", began)


def test_a_pause_belongs_to_the_death_that_falls_into_it() -> None:
    strikes = [strike(Kind.CORRUPT, 10.0), strike(Kind.KILL, 10.1), strike(Kind.STOP, 20.0)]
    assert resumes_of([(10.0, 0.7), (30.0, 1.0)], 1, strikes) == []
    assert resumes_of([(10.0, 0.7), (14.0, 0.3)], 2, strikes) == [Resume(10.7, pytest.approx(0.6), Kind.KILL, "decode")]
    assert len(resumes_of([(10.0, 0.7), (19.9, 2.3)], 3, strikes)) == 2


def test_a_connection_that_broke_early_is_excused_by_a_kill_of_its_gateway_only() -> None:
    strikes = [strike(Kind.KILL, 10.0, "gateway-0"), strike(Kind.STOP, 30.0, "gateway-1")]
    assert unexplained([(10.1, "gateway-0"), (14.0, "gateway-0")], strikes) == []
    strikes[0].restarted = 13.0
    assert unexplained([(13.0, "gateway-0"), (13.0 + 2 * REACTION, "gateway-0")], strikes) == ["gateway-0"]
    assert unexplained([(9.9, "gateway-0"), (10.1, "gateway-1"), (30.1, "gateway-1")], strikes) == [
        "gateway-0", "gateway-1", "gateway-1",
    ]  # fmt: skip


def test_what_is_held_at_idle_is_leaked() -> None:
    idle = {"free": 5, "held": 0, "cached": 3, "total": 8, "legs": 0, "prefix_cache_hits": 12}
    assert held({"prefill-0": idle, "router": {"placed": 0, "workers": 4}}) == []
    assert held({"prefill-0": idle | {"held": 2, "free": 3}}) == ["prefill-0: held 2"]
    assert held({"prefill-0": idle | {"free": 4}}) == ["prefill-0: blocks do not add up to 8"]


def test_a_slope_is_that_of_the_points_and_not_of_the_outliers() -> None:
    rng = Random(0)
    times = [float(number) for number in range(200)]
    values = [3.0 * at + rng.uniform(-1, 1) + (1000.0 if at % 50 == 0 else 0.0) for at in times]
    assert slope(times, values) == pytest.approx(3.0, abs=0.05)
    assert math.isnan(slope([1.0], [2.0]))
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5 and math.isnan(percentile([], 99))


def test_memory_is_judged_after_its_warm_up_and_by_its_own_pace() -> None:
    times = [float(at) for at in range(500)]
    grows = Memory("decode-0", 1, times, [int(1e6 * min(at, 60)) for at in times])
    assert grows.growth == 0
    assert math.isnan(Memory("decode-0", 1, times[:410], [0] * 410).growth)
    late = Memory("decode-0", 1, [at + 200 for at in times], [int(1e6 * min(at, 60)) for at in times])
    assert late.growth == 0, "a process that is started later warms up too"


def test_memory_that_comes_and_goes_is_no_growth_and_hides_none() -> None:
    """As that of a prefill worker does, whose steps are of one long prompt or of none."""
    rng, times = Random(0), [float(at) for at in range(600)]
    for kept in (0.0, 0.4, 0.6, 2.0):
        sizes, works = [], 0.0
        for at in times:
            works = rng.choice([0.0, 4e6, 8e6, 16e6]) if at % 10 == 0 else works
            sizes.append(int(3e8 + works + kept * 1e6 * at / 60))
        assert Memory("prefill-0", 1, times, sizes).growth == pytest.approx(kept, abs=0.1)


def report(*verdicts: Verdict, leaked: tuple[str, ...] = ()) -> Report:
    tally = Tally()
    for verdict in verdicts:
        tally.add(verdict, 2, 0, 0.5, "a <story>", [Resume(5.0, 0.4, Kind.KILL, "decode")])
    memory = [Memory("decode-0", 1, [0.0, 1.0], [1_000_000, 2_000_000])]
    return Report(
        topology="local", seed=0, every=5.0, concurrency=8, began=0.0, seconds=60.0, strikes=[strike(Kind.KILL, 4.0)],
        skipped=0, tally=tally, tokens=100, tokens_per_second=[(0.5, 10.0), (1.0, 20.0)],
        leaked=[*leaked], left_out=[], violations=[],
        memory=memory,
    )  # fmt: skip


def test_a_run_is_good_unless_something_was_lost_repeated_leaked_or_wrong() -> None:
    assert report(Verdict.SAME, Verdict.SAME).ok
    assert not report(Verdict.SAME, leaked=("decode-0: held 1",)).ok
    for bad in (Verdict.LOST, Verdict.REPEATED, Verdict.WRONG):
        assert not report(Verdict.SAME, bad).ok


@pytest.mark.parametrize(("mb_per_minute", "fine"), [(0.4, True), (0.6, False), (-3.0, True)])
def test_memory_that_grows_fails_a_run(mb_per_minute: float, fine: bool) -> None:
    times = [float(at) for at in range(500)]
    sizes = [int(1e8 + mb_per_minute * 1e6 * at / 60) for at in times]
    found = replace(report(Verdict.SAME), memory=[Memory("router", 7, times, sizes)])
    assert found.ok is fine and bool(found.growing) is not fine
    assert f"{mb_per_minute:+.3f} MB/min" in page(found)


def test_a_thread_beyond_those_that_a_pool_keeps_is_left_over() -> None:
    before = Uses(Counter({"threads": 30, "threads of event_engine": 2, "sockets": 20}))
    assert before.beyond(before) == {}
    busy = Uses(Counter({"threads": 30, "threads of event_engine": GRPC_POOLS["event_engine"], "sockets": 19}))
    assert busy.beyond(before) == {}
    leaking = Uses(Counter({"threads": 31, "threads of event_engine": 99, "sockets": 21}))
    assert leaking.beyond(before).keys() == {"threads", "threads of event_engine", "sockets"}
    assert "threads" not in leaking.beyond(before, LATE), "Ray's own, in the launcher"
    assert Uses(Counter({"threads": 32})).beyond(before, LATE) == {"threads": 1}
    assert "threads of event_engine" not in uses(os.getpid()).counts, "this process speaks no gRPC"  # type: ignore[union-attr]


def recorded(events: list[Event], *, fails: bool = False) -> list[str]:
    """What the checker says of an answer with these events, for which the one without faults was expected."""
    body = {"max_tokens": 16, "temperature": 1.0}
    case = Case("0 seeded", "/v1/completions", body, expected=expected(), prompt=[1, 2, 3])
    with Recorder(None) as recorder:
        number, got = recorder.ask(1.0, case), Answer()
        for event in events:
            recorder.get(2.0, number, case, got, event)
            got.feed(event)
        if fails:
            recorder.fail(3.0, number, case, 0, "", None, "the connection broke")
        else:
            recorder.end(3.0, number, got)
        return [violation.invariant.name for violation in recorder.judge().violations]


def test_the_checker_is_told_the_same() -> None:
    assert recorded(pieces(TOKENS)) == []
    assert "CONTIGUOUS" not in recorded(pieces(TOKENS[:-1]))
    assert set(recorded(pieces(TOKENS[:8] + TOKENS[6:]))) == {"SAME_TOKENS", "USAGE"}
    assert recorded(pieces(TOKENS)[:2], fails=True) == ["TYPED_ERROR"]


def test_the_page_tells_what_went_wrong_and_needs_nothing_else() -> None:
    text = page(report(Verdict.SAME, Verdict.LOST), [("faults", "1 kill")])
    assert "a &lt;story&gt;" in text and "<svg" in text
    assert "http" not in text and "<script" not in text

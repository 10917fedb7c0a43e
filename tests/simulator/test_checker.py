"""Promise: the checker finds each broken promise in a history, names it, and finds nothing in a good one.

The histories are written by hand: one request on a prefill and a decode worker, of which there are two each.
"""

from collections.abc import Callable

import pytest

from messages.common import Role
from messages.ids import Attempt, Epoch, RequestId, WorkerId
from messages.sampling import FinishReason, SamplingParams
from simulator.checker import check
from simulator.history import (
    Anything,
    Asked,
    Attached,
    AttemptBegun,
    AttemptPlaced,
    Blocks,
    Crashed,
    Cut,
    DeclaredLost,
    Draining,
    Ended,
    Failed,
    Frozen,
    Got,
    Healed,
    Idle,
    Incarnation,
    Injected,
    Killed,
    Ledger,
    LedgerEntry,
    Left,
    Offered,
    Owner,
    Read,
    Record,
    Sent,
    Started,
    Thawed,
    Wrote,
)
from simulator.story import story
from simulator.verdict import Answer, Bounds, Fault, Invariant, Times, Verdict, quantile

R = RequestId("r")
ROUTER, GATEWAY, GATEWAY_1 = (Incarnation(name, Epoch(1)) for name in ("router", "gateway-0", "gateway-1"))
P0, P1, D0, D1 = (
    Incarnation(name, Epoch(number)) for number, name in enumerate(("prefill-0", "prefill-1", "decode-0", "decode-1"))
)
ROUTER_AGAIN = Incarnation("router", Epoch(2))
D0_AGAIN = Incarnation("decode-0", Epoch(99))
WORKERS = {P0: Role.PREFILL, P1: Role.PREFILL, D0: Role.DECODE, D1: Role.DECODE}
PARAMS = SamplingParams(max_tokens=6, logprobs=0)
TOKENS = (10, 11, 12, 13, 14, 15)
LOGPROBS = (-0.5, -1.0, -1.5, -2.0, -2.5, -3.0)
SECOND = Attempt(2)


def truth(_asked: Asked) -> Answer:
    return Answer(TOKENS, FinishReason.LENGTH, LOGPROBS)


def judge(history: list[Anything]) -> Verdict:
    return check(sorted(history, key=lambda record: record.at), truth)


def world() -> list[Anything]:
    up: list[Anything] = [
        Started(0.0, ROUTER, "router"),
        Started(0.0, GATEWAY, "gateway"),
        *(Started(0.0, worker, "worker", role, 64, 16, 16) for worker, role in WORKERS.items()),
    ]
    return up


def begin(attempt: int = 1, prefill: Incarnation = P0, decode: Incarnation = D0, at: float = 10.0) -> list[Anything]:
    number = Attempt(attempt)
    return [AttemptBegun(at, R, number), AttemptPlaced(at, R, number, prefill, decode)]


def got(
    index: int, at: float, source: Incarnation = D0, attempt: int = 1, tokens: tuple[int, ...] | None = None
) -> Got:
    tokens = TOKENS[index : index + 1] if tokens is None else tokens
    return Got(at, R, index, tokens, LOGPROBS[index : index + len(tokens)], "", "", Attempt(attempt), source)


def pool(at: float, worker: Incarnation = D0, *owners: Owner, held: int | None = None) -> Blocks:
    held = sum(owner.num_blocks for owner in owners) if held is None else held
    return Blocks(at, worker, 60 - held, held, 4, 64, owners)


def clean() -> list[Anything]:
    """Six tokens from 10.1 s on, one each 0.1 s."""
    entry = LedgerEntry(R, Attempt(1), (WorkerId("decode-0"),))
    return [
        *world(),
        Asked(10.0, R, (1, 2, 3), PARAMS, gateway="gateway-0"),
        *begin(),
        Ledger(10.1, ROUTER, (entry,)),
        got(0, 10.1, P0),
        Wrote(10.15, D0, P0, R, Attempt(1), (5,), ((R, Attempt(1)),)),
        Read(10.16, D0, R, Attempt(1), (5,), (77,), (77,)),
        *(got(index, 10.1 + index / 10) for index in range(1, 6)),
        pool(10.3, D0, Owner(R, Attempt(1), 2)),
        Ended(10.6, R, FinishReason.LENGTH, 3, 6),
        Idle(15.0),
        *(pool(15.0, worker) for worker in WORKERS),
        Ledger(15.0, ROUTER, ()),
    ]


def resumed(fault: Anything, back_at: float = 11.0, detected_at: float = 10.7) -> list[Anything]:
    """A fault at 10.25 s, after two tokens; the others come from ``back_at`` on, from other workers."""
    return [
        *world(),
        Asked(10.0, R, (1, 2, 3), PARAMS, gateway="gateway-0"),
        *begin(),
        got(0, 10.1, P0),
        got(1, 10.2),
        fault,
        DeclaredLost(detected_at, D0),
        *begin(2, P1, D1, detected_at),
        *(got(index, back_at + index / 100, D1, 2) for index in range(2, 6)),
        Ended(back_at + 0.1, R, FinishReason.LENGTH, 3, 6),
    ]


def orphaned(at: float, looked_at: float) -> list[Anything]:
    """The router dies at 10.26 s and is restarted, the gateway dies at ``at``, and its client goes on at another one
    when the new router's empty ledger was looked at."""
    return [
        *world(),
        Asked(10.0, R, (1, 2, 3), PARAMS, gateway="gateway-0"),
        *begin(),
        got(0, 10.1, P0),
        got(1, 10.2),
        Killed(10.26, ROUTER),
        Started(10.4, ROUTER_AGAIN, "router"),
        Started(10.4, GATEWAY_1, "gateway"),
        Killed(at, GATEWAY),
        Ledger(looked_at, ROUTER_AGAIN, ()),
        Attached(looked_at, R, "gateway-1", 2),
        *(got(index, looked_at + 0.1) for index in range(2, 6)),
        Ended(looked_at + 0.1, R, FinishReason.LENGTH, 3, 6),
    ]


KILLED = Killed(10.25, D0)


def without(kind: type[Record]) -> list[Anything]:
    return [record for record in clean() if not isinstance(record, kind)]


def swapped(index: int, **changes: Anything) -> list[Anything]:
    """The clean history with another token, or other tokens, at ``index``."""
    return [changes["by"] if isinstance(record, Got) and record.index == index else record for record in clean()]


def up_to(at: float) -> list[Anything]:
    return [record for record in clean() if record.at <= at]


BROKEN: dict[str, tuple[Invariant, Callable[[], list[Anything]]]] = {
    # Clients
    "never ended": (Invariant.ONE_END, lambda: up_to(10.55)),
    "ended twice": (Invariant.ONE_END, lambda: [*clean(), Ended(10.61, R, FinishReason.LENGTH, 3, 6)]),
    "failed after its end": (Invariant.ONE_END, lambda: [*clean(), Failed(10.61, R, 503, "unavailable", 1.0)]),
    "a token after its end": (Invariant.ONE_END, lambda: [*clean(), got(5, 10.65)]),
    "asked twice": (Invariant.ONE_END, lambda: [*clean(), Asked(10.05, R, (1,), PARAMS)]),
    "a token twice": (Invariant.CONTIGUOUS, lambda: [*clean(), got(2, 10.31)]),
    "a gap": (Invariant.CONTIGUOUS, lambda: [r for r in clean() if not (isinstance(r, Got) and r.index == 3)]),
    "re-attached elsewhere than it was": (Invariant.CONTIGUOUS, lambda: [*clean(), Attached(10.35, R, "gateway-1", 9)]),
    "another token": (Invariant.SAME_TOKENS, lambda: swapped(3, by=got(3, 10.4, tokens=(99,)))),
    "another logprob": (
        Invariant.SAME_TOKENS,
        lambda: swapped(3, by=Got(10.4, R, 3, (13,), (-1.5,), "", "", Attempt(1), D0)),
    ),
    "no logprobs": (Invariant.SAME_TOKENS, lambda: swapped(3, by=Got(10.4, R, 3, (13,), None, "", "", Attempt(1), D0))),
    "another reason": (
        Invariant.SAME_TOKENS,
        lambda: [*without(Ended), Ended(10.6, R, FinishReason.STOP, 3, 6)],
    ),
    "an early end": (
        Invariant.SAME_TOKENS,
        lambda: [*up_to(10.35), Ended(10.4, R, FinishReason.LENGTH, 3, 3)],
    ),
    "usage of the prompt": (Invariant.USAGE, lambda: [*without(Ended), Ended(10.6, R, FinishReason.LENGTH, 4, 6)]),
    "usage of the answer": (Invariant.USAGE, lambda: [*without(Ended), Ended(10.6, R, FinishReason.LENGTH, 3, 7)]),
    # Attempts
    "a token of an older attempt": (
        Invariant.FENCED,
        lambda: [*up_to(10.35), AttemptBegun(10.36, R, SECOND), got(3, 10.4), got(4, 10.5), got(5, 10.6),
                 Ended(10.6, R, FinishReason.LENGTH, 3, 6)],
    ),
    "a token of another epoch": (Invariant.FENCED, lambda: swapped(3, by=got(3, 10.4, D0_AGAIN))),
    "a token of an attempt that has moved": (
        Invariant.FENCED,
        lambda: [*up_to(10.35), AttemptBegun(10.31, R, SECOND, True), AttemptPlaced(10.33, R, SECOND, D0, D1),
                 *(got(index, 10.4) for index in range(3, 6)), Ended(10.6, R, FinishReason.LENGTH, 3, 6)],
    ),
    "an attempt again": (Invariant.FENCED, lambda: [*clean(), AttemptBegun(10.4, R, Attempt(1))]),
    # Errors
    "an error for nothing": (
        Invariant.NO_ERROR, lambda: [*up_to(10.35), Failed(10.4, R, 503, "unavailable", 1.0)],
    ),
    "an error after one fault": (
        Invariant.NO_ERROR,
        lambda: [*up_to(10.24), KILLED, DeclaredLost(10.5, D0), Failed(10.6, R, 503, "attempts_exhausted", 1.0)],
    ),
    "a good request refused": (Invariant.NO_ERROR, lambda: [*up_to(10.05), Failed(10.1, R, 400, "bad", None)]),
    "a broken answer": (Invariant.TYPED_ERROR, lambda: [*up_to(10.35), Failed(10.4, R, 0, "")]),
    "no time to come back": (
        Invariant.TYPED_ERROR,
        lambda: [*up_to(10.05), Killed(10.06, D0), Killed(10.06, D1), DeclaredLost(10.1, D0), DeclaredLost(10.1, D1),
                 Failed(10.2, R, 503, "unavailable", None)],
    ),
    "silence with nobody to serve it": (
        Invariant.TYPED_ERROR,
        lambda: [*up_to(10.24), Killed(10.25, D0), Killed(10.25, D1), DeclaredLost(10.5, D0), DeclaredLost(10.5, D1),
                 Failed(15.3, R, 503, "unavailable", 1.0)],
    ),
    "an unhandled exception": (Invariant.NO_CRASH, lambda: [*clean(), Crashed(10.4, "router", "KeyError")]),
    # Time
    "a crash detected late": (Invariant.DETECTED, lambda: resumed(KILLED, 11.6, detected_at=11.3)),
    "a hang detected late": (Invariant.DETECTED, lambda: resumed(Frozen(10.25, D0), 13.6, detected_at=13.5)),
    "a crash never detected": (
        Invariant.DETECTED, lambda: [*clean(), Killed(11.0, D1), Injected(12.5, "later")],
    ),
    "a busy worker taken for lost": (Invariant.DETECTED, lambda: [*clean(), DeclaredLost(10.4, P0)]),
    "a slow resume": (Invariant.RESUMED, lambda: resumed(KILLED, 13.3)),
    "a stream that stands still": (Invariant.RESUMED, lambda: [r for r in clean() if r.at < 10.25]
     + [got(2, 14.3), got(3, 14.4), got(4, 14.5), got(5, 14.6), Ended(14.6, R, FinishReason.LENGTH, 3, 6)]),
    "a long pause at another gateway": (
        Invariant.RESUMED,
        lambda: [Started(0.0, GATEWAY_1, "gateway"), *up_to(10.25), Killed(10.26, GATEWAY),
                 Attached(10.5, R, "gateway-1", 2), *(got(index, 12.6) for index in range(2, 6)),
                 Ended(12.6, R, FinishReason.LENGTH, 3, 6)],
    ),
    # Blocks
    "blocks that do not add up": (Invariant.ACCOUNTED, lambda: [*clean(), Blocks(10.3, D0, 60, 1, 4, 64)]),
    "another pool": (Invariant.ACCOUNTED, lambda: [*clean(), Blocks(10.3, D0, 60, 0, 4, 65)]),
    "blocks of nobody": (Invariant.ACCOUNTED, lambda: [*clean(), pool(10.3, D0, Owner(R, Attempt(1), 2), held=3)]),
    "a leak": (Invariant.ACCOUNTED, lambda: [*clean(), pool(15.1, D0, Owner(R, Attempt(1), 2))]),
    "blocks after the end": (Invariant.FREED, lambda: [*clean(), pool(12.7, D0, Owner(R, Attempt(1), 2))]),
    "blocks after the client left": (
        Invariant.FREED, lambda: [*up_to(10.25), Left(10.25, R), pool(12.3, P0, Owner(R, Attempt(1), 2))],
    ),
    "blocks of an older attempt": (
        Invariant.FREED,
        lambda: [*up_to(10.25), *begin(2, P1, D1, 10.3), *(got(index, 10.4, D1, 2) for index in range(2, 5)),
                 pool(12.5, D0, Owner(R, Attempt(1), 2)), got(5, 12.6, D1, 2),
                 Ended(12.6, R, FinishReason.LENGTH, 3, 6)],
    ),
    "another's block read": (
        Invariant.OWN_BLOCKS, lambda: [*clean(), Read(10.3, D0, R, Attempt(1), (5, 6), (77, 78), (77, 79))],
    ),
    "a block read unverified": (
        Invariant.OWN_BLOCKS, lambda: [*clean(), Read(10.3, D0, R, Attempt(1), (5,), (77,), (77,), False)],
    ),
    "another's block written": (
        Invariant.OWN_BLOCKS,
        lambda: [*clean(), Wrote(10.3, D0, P0, R, Attempt(1), (5, 6), ((R, Attempt(1)), None))],
    ),
    "a ledger that forgets": (
        Invariant.LEDGER,
        lambda: [*up_to(10.25), *(got(i, 10.3 + i, D0) for i in range(2, 6)), Ledger(14.0, ROUTER, ()),
                 Ended(15.6, R, FinishReason.LENGTH, 3, 6)],
    ),
    "a new router's ledger that forgets what it was told": (Invariant.LEDGER, lambda: orphaned(13.6, 17.0)),
    "a ledger that keeps": (
        Invariant.LEDGER, lambda: [*clean(), Ledger(15.1, ROUTER, (LedgerEntry(R, Attempt(1), (WorkerId("d"),)),))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_found_and_named(name: str) -> None:
    invariant, history = BROKEN[name]
    verdict = judge(history())
    assert {violation.invariant for violation in verdict.violations} == {invariant}, verdict.violations


def test_every_invariant_has_a_history_that_breaks_it() -> None:
    assert {invariant for invariant, _ in BROKEN.values()} == set(Invariant)


GOOD: dict[str, Callable[[], list[Anything]]] = {
    "nothing happens": clean,
    "a decode worker dies": lambda: resumed(KILLED),
    "a decode worker dies, and is back": lambda: [
        *resumed(KILLED), Started(10.4, D0_AGAIN, "worker", Role.DECODE, 64, 16, 16)
    ],
    "a prefill worker stands still for a moment": lambda: [*clean(), Frozen(10.4, P0), Thawed(10.5, P0)],
    "a decode worker stands still": lambda: resumed(Frozen(10.25, D0), 13.5, detected_at=13.2),
    "nobody serves it, and its gateway stands still": lambda: [
        Started(0.0, GATEWAY_1, "gateway"), *up_to(10.24), Killed(10.25, D0), Killed(10.25, D1),
        Frozen(10.26, GATEWAY), DeclaredLost(10.5, D0), DeclaredLost(10.5, D1), Thawed(20.0, GATEWAY),
        Failed(20.1, R, 503, "unavailable", 1.0),
    ],
    "a zombie's tokens come late": lambda: [
        *resumed(Frozen(10.25, D0), 13.5, 13.2), Thawed(13.55, D0), Offered(13.56, R, Attempt(1), D0, 2, 3, False),
    ],
    "a client leaves": lambda: [*up_to(10.25), Left(10.3, R), pool(12.2, D0, Owner(R, Attempt(1), 2))],
    "what an aborted sender may still write waits": lambda: [
        *up_to(10.25), Left(10.3, R), pool(14.2, D0, Owner(R, Attempt(1), 2, True)),
    ],
    "the last decode workers die": lambda: [
        *up_to(10.24), Killed(10.25, D0), Killed(10.25, D1), DeclaredLost(10.5, D0), DeclaredLost(10.5, D1),
        Failed(14.9, R, 503, "unavailable", 1.0),
    ],
    "too many at once": lambda: [
        *world(), Asked(10.0, R, (1,) * 2000, PARAMS), Failed(10.1, R, 429, "overloaded", 1.0),
    ],
    "every attempt meets a fault": lambda: [
        *up_to(10.05), *(AttemptBegun(10.06, R, Attempt(number)) for number in range(2, 6)),
        *(Injected(10.1, "a step fails") for _ in range(5)), Failed(10.4, R, 503, "attempts_exhausted", 1.0),
    ],
    "a pair is cut, and another one does it": lambda: [
        *up_to(10.05), Cut(10.06, "prefill-0", "decode-0"), *begin(2, P1, D0, 13.9),
        *(got(index, 13.95, D0, 2) for index in range(6)), Ended(14.0, R, FinishReason.LENGTH, 3, 6),
    ],
    "a worker is drained": lambda: resumed(Draining(10.25, D0), 12.0),
    "a sequence moves, and goes on meanwhile": lambda: [
        *up_to(10.35), AttemptBegun(10.25, R, SECOND, True), AttemptPlaced(10.33, R, SECOND, D0, D1),
        *(got(index, 10.4, D1, 2) for index in range(3, 6)), Ended(10.6, R, FinishReason.LENGTH, 3, 6),
    ],
    "a gateway dies with its clients": lambda: [*up_to(10.25), Killed(10.26, GATEWAY), Failed(10.3, R, 0, "")],
    "a client goes on at another gateway": lambda: [
        Started(0.0, GATEWAY_1, "gateway"), *up_to(10.25), Killed(10.26, GATEWAY), Attached(11.0, R, "gateway-1", 2),
        *(got(index, 11.5) for index in range(2, 6)), Ended(11.5, R, FinishReason.LENGTH, 3, 6),
    ],
    "the router is restarted": lambda: [
        *clean(), Killed(10.15, ROUTER), Started(10.3, ROUTER_AGAIN, "router"), Ledger(10.35, ROUTER_AGAIN, ()),
    ],
    "the router dies, and a gateway before it has told the new one": lambda: orphaned(10.5, 14.0),
    "the router does not hear a worker": lambda: [
        *clean(), Cut(10.2, "decode-1", "router"), DeclaredLost(12.5, D1), Healed(13.0, "decode-1", "router"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_nothing_is_found_where_every_promise_was_kept(name: str) -> None:
    assert judge(GOOD[name]()).violations == []


def test_a_request_that_has_to_be_refused_is_refused() -> None:
    history = [*world(), Asked(10.0, R, (1,), PARAMS), Failed(10.1, R, 400, "capacity_exceeded")]
    assert check(history, lambda _: Answer((), None, status=400)).clean
    assert not check(history, truth).clean
    answered = [*world(), Asked(10.0, R, (1,), PARAMS), Ended(10.1, R, FinishReason.LENGTH)]
    assert not check(answered, lambda _: Answer((), None, status=400)).clean


def test_where_only_text_is_seen_the_text_is_compared() -> None:
    def history(*pieces: str) -> list[Anything]:
        return [
            *world(), Asked(1.0, R, (1,), PARAMS), *(Got(1.1, R, 0, text=piece) for piece in pieces),
            Ended(1.2, R, FinishReason.STOP, 1, 2),
        ]  # fmt: skip

    def text(_asked: Asked) -> Answer:
        return Answer(None, FinishReason.STOP, text="To be")

    assert check(history("To ", "be"), text).clean
    assert not check(history("To ", "To ", "be"), text).clean
    assert not check(history("To "), text).clean


def test_times_to_detect_and_to_resume_are_measured_where_one_fault_came_alone() -> None:
    verdict = judge(resumed(KILLED))
    assert verdict.times.detect == {"crash": [pytest.approx(0.45)]}
    assert verdict.times.resume == {Fault.DECODE_CRASH: [pytest.approx(0.77)]}
    assert (verdict.requests, verdict.faults, verdict.resumes) == (1, 1, 1)
    another = judge([*resumed(KILLED), Injected(10.5, "slow")])
    assert another.times.resume == {}


def test_what_was_lost_repeated_late_and_leaked_is_counted() -> None:
    assert judge(without(Ended)).lost == 1
    assert judge([*clean(), got(2, 10.31)]).repeated == 1
    assert judge([*clean(), pool(15.1, D0, held=3), pool(15.2, D0, held=3)]).leaked == 3
    late = judge([*resumed(KILLED), Offered(11.01, R, Attempt(1), D0, 2, 3, False)])
    assert (late.late_tokens, late.repeated, late.lost) == (3, 0, 0)


def test_the_bound_for_99_of_100_is_held_against_all_times_together() -> None:
    assert quantile([], 0.5) != quantile([], 0.5)
    assert quantile(range(1, 101), 0.99) == 99
    assert quantile([3.0], 0.5) == 3.0
    times = Times({"crash": [0.1] * 99 + [0.9]}, {Fault.HANG: [3.0]})
    assert times.broken(Bounds()) == []
    times.add(Times({"crash": [0.9]}, {Fault.DECODE_CRASH: [1.7]}))
    assert [line.partition(":")[0] for line in times.broken(Bounds())] == [
        "time to detect (crash)", "time to resume (decode crash)",
    ]  # fmt: skip


def test_the_story_of_a_request_has_its_lines_and_the_world_s() -> None:
    other = RequestId("other")
    history = [
        *resumed(KILLED),
        Asked(10.0, other, (1,), PARAMS),
        Sent(10.0, 1, "gateway-0", "router", "PlacementWanted", R, Attempt(1)),
        Sent(10.0, 2, "gateway-0", "router", "PlacementWanted", other, Attempt(1)),
    ]
    told = "\n".join(story(history, R))
    assert "Killed         process=decode-0@2" in told
    assert "1: gateway-0 -> router PlacementWanted #1" in told
    assert "other" not in told and "2: gateway-0" not in told
    verdict = judge(resumed(KILLED, 13.3))
    (violation,) = verdict.violations
    assert (violation.request, violation.at) == (R, pytest.approx(13.32))
    assert "from the decode crash to the next token" in str(violation)


def test_a_history_out_of_order_is_refused() -> None:
    with pytest.raises(ValueError, match="comes after"):
        check([Idle(2.0), Idle(1.0)], truth)

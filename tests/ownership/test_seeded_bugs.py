"""Promise: the property test would find these bugs. Each is put into the real code, and has to be caught."""

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest

from decode_worker.core.reservation import Reservations
from engine.core.blocks import BlockPool
from kv_transfer.core.events import Live, TransferKey
from kv_transfer.core.receiving import ReceiveSession, ReceiveState
from kv_transfer.core.sending import SendSession, SendState
from kv_transfer.core.session import Digested, Outcome, TakeDigests
from kv_transfer.transports.copying import Landings
from prefill_worker.core.handoff import Handoffs
from runtime.core.during_step import DuringStep
from runtime.core.fences import Fences
from tests.ownership.test_property import run
from tests.ownership.world import Faults

Patch = Callable[[pytest.MonkeyPatch], None]
SCHEDULES = 600
"""Within which each has to be caught; most take a few."""


def ack_before_verifying(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("kv_transfer.core.receiving.mismatches", lambda expected, actual: np.empty(0, np.int32))


def free_without_quarantine(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReceiveSession, "_writable", property(lambda session: False))


def believe_that_all_of_a_dead_worker_is_gone(patch: pytest.MonkeyPatch) -> None:
    def peer_lost(session: ReceiveSession, *, dead: bool, now: float) -> list[Any]:
        if dead and session.state is not ReceiveState.CLOSED:
            session._outcome = Outcome.FAILED
            return session._close()
        return session.give_up("silent", Outcome.FAILED, now=now)

    patch.setattr(ReceiveSession, "peer_lost", peer_lost)


def forget_the_attempt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Fences, "admits", lambda fences, request, attempt: True)


def leave_the_landing_open(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Landings, "close", lambda landings, key: None)


def free_while_the_transport_reads(patch: pytest.MonkeyPatch) -> None:
    give_up = SendSession.give_up

    def at_once(session: SendSession, detail: str, outcome: Outcome = Outcome.CLOSED) -> list[Any]:
        actions = give_up(session, detail, outcome)
        return [*actions, *session._close(outcome, detail)] if session.state is SendState.CLOSING else actions

    patch.setattr(SendSession, "give_up", at_once)


def leak_what_was_cached(patch: pytest.MonkeyPatch) -> None:
    free = BlockPool.free

    def some(pool: BlockPool, blocks: Any) -> None:
        free(pool, blocks[:-1] if len(blocks) > 2 else blocks)

    patch.setattr(BlockPool, "free", some)


def share_what_is_still_landing(patch: pytest.MonkeyPatch) -> None:
    open_session = Reservations._open_session

    def known_at_once(reservations: Reservations, waiting: Any, cached: Any, blocks: Any, *rest: Any) -> Any:
        steps = open_session(reservations, waiting, cached, blocks, *rest)
        for block, name in zip(blocks.tolist(), waiting.hashes.names[len(cached) :], strict=False):
            reservations._pool._by_hash[name] = block
            reservations._pool._hashes[block] = name
            reservations._pool._registered[block] = True
        return steps

    patch.setattr(Reservations, "_open_session", known_at_once)


def verify_while_data_may_land(patch: pytest.MonkeyPatch) -> None:
    verify = ReceiveSession._verify_if_landed

    def only_digests(session: ReceiveSession) -> list[Any]:
        return [action for action in verify(session) if isinstance(action, TakeDigests)]

    patch.setattr(ReceiveSession, "_verify_if_landed", only_digests)


def hash_what_is_not_there(patch: pytest.MonkeyPatch) -> None:
    """The sender's own digests are taken for the receiver's."""
    handle = ReceiveSession.handle

    def believe(session: ReceiveSession, event: Any, now: float) -> list[Any]:
        if isinstance(event, Digested) and session._end is not None:
            event = event._replace(digests=session._end.digests)
        return handle(session, event, now)

    patch.setattr(ReceiveSession, "handle", believe)


def leave_a_prompt_to_decode_that_is_being_pushed(patch: pytest.MonkeyPatch) -> None:
    leave = Handoffs.leave_to_decode

    def always(handoffs: Handoffs, key: TransferKey, now: float) -> Any:
        session = handoffs._open[key].session
        if session.state is SendState.PUSHING:
            session.state = SendState.OPENING
        return leave(handoffs, key, now)

    patch.setattr(Handoffs, "leave_to_decode", always)


def push_what_the_step_that_runs_has_not_computed(patch: pytest.MonkeyPatch) -> None:
    push = SendSession._push

    def as_if_final(session: SendSession, end: int, now: float, live: Live) -> list[Any]:
        return push(session, end, now, Live.NO if live is Live.RUNNING else live)

    patch.setattr(SendSession, "_push", as_if_final)


def hear_everything_while_a_step_runs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DuringStep, "admits", lambda during, message: True)


class Bug(NamedTuple):
    caught_by: str
    """What the invariant that it breaks says."""
    faults: Faults = Faults()
    one_sided: bool | None = None
    """None: either, by the schedule."""
    prefill_ranks: int = 1


WRITABLE = r"could write into \["
NOT_VERIFIED = "reads wrong KV on"
BUGS: dict[Patch, Bug] = {
    ack_before_verifying: Bug(NOT_VERIFIED, Faults(corrupt=0.5)),
    hash_what_is_not_there: Bug(NOT_VERIFIED, Faults(corrupt=0.5)),
    free_without_quarantine: Bug(WRITABLE + "'FREE'", Faults(aborts=True), one_sided=True),
    believe_that_all_of_a_dead_worker_is_gone: Bug(
        WRITABLE + "'FREE'", Faults(deaths=True), one_sided=True, prefill_ranks=2
    ),
    forget_the_attempt: Bug("is here already", Faults(aborts=True, reorder=True)),
    leave_the_landing_open: Bug(WRITABLE + "'(FREE|HELD|LANDED)'", one_sided=False),
    free_while_the_transport_reads: Bug(WRITABLE + "'FREE'", Faults(aborts=True), one_sided=True),
    leak_what_was_cached: Bug("blocks have an owner, of"),
    share_what_is_still_landing: Bug(f"nobody may read block|{NOT_VERIFIED}"),
    verify_while_data_may_land: Bug(
        WRITABLE + "'LANDED'", Faults(loss=0.3, corrupt=0.5, reorder=True), one_sided=False
    ),
    leave_a_prompt_to_decode_that_is_being_pushed: Bug(
        WRITABLE + "'FREE'", Faults(reorder=True, offers=True), one_sided=True
    ),
    push_what_the_step_that_runs_has_not_computed: Bug("leave before they are computed"),
    hear_everything_while_a_step_runs: Bug("writes into", Faults(aborts=True)),
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__.replace("_", " "))
def test_a_seeded_bug_is_caught_by_the_invariant_that_it_breaks(bug: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first schedule that fails at all: nothing else that goes wrong, in the harness least of all, counts."""
    wanted = BUGS[bug]
    bug(monkeypatch)
    with pytest.raises(AssertionError, match=wanted.caught_by):
        for seed in range(SCHEDULES):
            rng = Random(seed)
            one_sided = rng.random() < 0.5 if wanted.one_sided is None else wanted.one_sided
            schedule = [rng.getrandbits(32) for _ in range(rng.randint(20, 80))]
            run(seed, schedule, wanted.faults, one_sided, wanted.prefill_ranks, 1)

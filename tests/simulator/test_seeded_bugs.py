"""Promise: simulator and checker would find these bugs. Each is put into the real code, and has to be caught."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import pytest
from msgspec import structs

from engine.core.blocks import BlockPool
from gateway.core.session import Session
from gateway.core.stop_strings import StopStrings
from kv_transfer.core.receiving import ReceiveSession
from kv_transfer.core.sending import SendSession
from kv_transfer.core.session import Outcome
from messages.common import Generation, Role
from messages.gateway_to_router import PlacementWanted
from messages.gateway_to_worker import Abort
from router.core.machine import Router
from router.core.membership import Members
from runtime.core.deliveries import Deliveries
from runtime.core.fences import Fences
from runtime.core.work import sequence
from simulator.campaign import judged
from simulator.faults import Kind, Misfortune
from simulator.gateways import GatewayProcess
from simulator.plan import Plan, draw
from simulator.verdict import Invariant
from worker.core.machine import WorkerMachine

Patch = Callable[[pytest.MonkeyPatch], None]
RUNS = 120
"""Within which each has to be caught; most take a few."""


def ack_before_verifying(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("kv_transfer.core.receiving.mismatches", lambda expected, actual: np.empty(0, np.int32))


def check_no_attempt_in_the_session(patch: pytest.MonkeyPatch) -> None:
    chunk = Session._chunk

    def any_attempt(session: Session, worker: Any, part: Any, now: float) -> list[Any]:
        return chunk(session, worker, structs.replace(part, attempt=session.attempt), now)

    patch.setattr(Session, "_chunk", any_attempt)


def free_without_quarantine(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReceiveSession, "_writable", property(lambda session: False))


def resume_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """A worker goes on behind the last token but one, and believes that it goes on behind the last."""
    for half in ("decode_worker.core.machine", "prefill_worker.core.machine"):
        patch.setattr(f"{half}.sequence", _forgetful)


def _forgetful(request: Any, generation: Generation, **how: Any) -> Any:
    if "blocks" not in how:
        generation = structs.replace(generation, generated=generation.generated[:-4])
    return sequence(request, generation, **how)


def release_twice(patch: pytest.MonkeyPatch) -> None:
    """A block that two sequences share is taken from both."""
    free = BlockPool.free

    def twice(pool: BlockPool, blocks: Any) -> None:
        free(pool, blocks)
        free(pool, blocks[pool._refs[blocks] > pool._pins[blocks]])

    patch.setattr(BlockPool, "free", twice)


def lose_a_wake_up(patch: pytest.MonkeyPatch) -> None:
    """A session asks for no wake: what was lost is not asked for again."""
    patch.setattr(Session, "_with_wake", lambda session, actions: actions)


def forget_the_stop_string_at_resume(patch: pytest.MonkeyPatch) -> None:
    begun = GatewayProcess._tell_begun

    def anew(gateway: GatewayProcess, relay: Any, wanted: PlacementWanted) -> None:
        if wanted.attempt > max(1, relay.begun):
            relay.choice._stops = StopStrings(relay.client.wish.stop, include=False)
        begun(gateway, relay, wanted)

    patch.setattr(GatewayProcess, "_tell_begun", anew)


def deliver_the_first_token_from_both(patch: pytest.MonkeyPatch) -> None:
    """Decode sends the token that prefill has delivered as the next one."""
    add = Deliveries.add

    def again(deliveries: Deliveries, request: Any, token: int, logprobs: Any = None, *, deliver: bool = True) -> None:
        if not deliver:
            deliveries._streams[request].start += 1
        add(deliveries, request, token, logprobs)

    patch.setattr(Deliveries, "add", again)


def ignore_that_a_worker_is_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Session, "_on_worker_lost", lambda session, event, now: [])


def miss_no_report(patch: pytest.MonkeyPatch) -> None:
    """The router waits for ever for a worker that says nothing."""
    patch.setattr(Members, "silent", lambda members, timeout, now: [])


def forget_the_attempt_at_the_workers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Fences, "admits", lambda fences, request, attempt: True)


def ignore_that_a_peer_is_lost(patch: pytest.MonkeyPatch) -> None:
    """A worker keeps what a dead one was to take, or to bring."""
    patch.setattr(WorkerMachine, "_peer_lost", lambda machine, event, now: [])


def ignore_an_abort(patch: pytest.MonkeyPatch) -> None:
    """A worker goes on with what nobody wants any more."""
    handle = WorkerMachine.handle

    def stubborn(machine: WorkerMachine, event: Any, now: float) -> list[Any]:
        return [] if isinstance(event, Abort) else handle(machine, event, now)

    patch.setattr(WorkerMachine, "handle", stubborn)


def forget_what_gateways_hold(patch: pytest.MonkeyPatch) -> None:
    """A router that was restarted does not build its ledger again."""
    patch.setattr(Router, "_hold", lambda router, event, now: [])


def free_before_the_ack(patch: pytest.MonkeyPatch) -> None:
    """Prefill lets go of the blocks when it has sent the end."""
    end = SendSession._end_if_pushed

    def and_free(session: SendSession, now: float) -> list[Any]:
        actions = end(session, now)
        return [*actions, *session._close(Outcome.DONE, "")] if actions else []

    patch.setattr(SendSession, "_end_if_pushed", and_free)


def forget_a_stream_before_its_end_is_acked(patch: pytest.MonkeyPatch) -> None:
    flush = Deliveries.flush

    def and_forget(deliveries: Deliveries, now: float) -> list[Any]:
        sends = flush(deliveries, now)
        for request in list(deliveries._ended):
            deliveries.close(request)
        return sends

    patch.setattr(Deliveries, "flush", and_forget)


def shift_logprobs_at_resume(patch: pytest.MonkeyPatch) -> None:
    """A stream that does not begin with the first token tells the log-probabilities of the token before."""
    add = Deliveries.add

    def shifted(deliveries: Deliveries, request: Any, token: int, logprobs: Any = None, **how: Any) -> None:
        stream = deliveries._streams[request]
        before = stream.logprobs[-1] if stream.start and stream.logprobs else logprobs
        add(deliveries, request, token, before, **how)

    patch.setattr(Deliveries, "add", shifted)


def believe_that_there_is_no_gap(patch: pytest.MonkeyPatch) -> None:
    chunk = Session._chunk

    def gapless(session: Session, worker: Any, part: Any, now: float) -> list[Any]:
        if part.attempt == session.attempt and part.index > session.num_generated:
            part = structs.replace(part, index=session.num_generated)
        return chunk(session, worker, part, now)

    patch.setattr(Session, "_chunk", gapless)


def count_what_was_generated_as_prompt(patch: pytest.MonkeyPatch) -> None:
    """A resumed sequence may make ``max_tokens`` tokens more."""
    start = Session._start_message

    def longer(session: Session, placed: Any) -> Any:
        send = start(session, placed)
        work = send.message.generation
        work = structs.replace(work, prompt=work.prompt + work.generated, generated=b"")
        return send._replace(message=structs.replace(send.message, generation=work))

    patch.setattr(Session, "_start_message", longer)


Scene = Callable[[Plan], list[Misfortune]]


def left_for_dead(plan: Plan) -> list[Misfortune]:
    """A decode worker stands still while it streams, for about as long as it takes to give it up."""
    worker = next(name for name, role in plan.topology.workers.items() if role is not Role.PREFILL)
    seconds = 1.9 + plan.seed % 10 / 10
    return [Misfortune(number=0, kind=Kind.FREEZE, target=worker, message="TokenBatch", nth=3, seconds=seconds)]


def a_long_sleep(plan: Plan) -> list[Misfortune]:
    return [Misfortune(number=0, kind=Kind.FREEZE, target=next(iter(plan.topology.workers)), at=1.5, seconds=5.0)]


def spoiled(plan: Plan) -> list[Misfortune]:
    """Half of the KV that is written to another worker is not there when it says so."""
    topology = plan.topology
    pairs = [(source, target) for source in topology.of(Role.PREFILL) for target in topology.of(Role.DECODE)]
    return [
        Misfortune(number=number, kind=Kind.STALE, source=source, target=target, seconds=2.0, chance=0.5)
        for number, (source, target) in enumerate(pairs)
    ]


def unheard(plan: Plan) -> list[Misfortune]:
    """Half of what workers send to gateways is lost."""
    pairs = [(worker, gateway) for worker in plan.topology.workers for gateway in plan.topology.gateway_names]
    return [
        Misfortune(number=number, kind=Kind.LOSE, source=source, target=target, seconds=2.0, chance=0.5)
        for number, (source, target) in enumerate(pairs)
    ]


def asked_in_vain(plan: Plan) -> list[Misfortune]:
    """Half of what gateways send is lost."""
    others = ["router", *plan.topology.workers]
    pairs = [(gateway, other) for gateway in plan.topology.gateway_names for other in others]
    return [
        Misfortune(number=number, kind=Kind.LOSE, source=source, target=target, seconds=2.0, chance=0.5)
        for number, (source, target) in enumerate(pairs)
    ]


def late_at_the_workers(plan: Plan) -> list[Misfortune]:
    """What gateways send to workers comes twice, and late; sequences are resumed, for steps fail."""
    workers = [*plan.topology.workers]
    pairs = [(source, to) for source in plan.topology.gateway_names for to in workers]
    links = [(kind, *pair) for kind in (Kind.REPEAT, Kind.REORDER) for pair in pairs]
    return [
        *(
            Misfortune(number=number, kind=kind, source=source, target=target, seconds=3.0, chance=0.5)
            for number, (kind, source, target) in enumerate(links)
        ),
        *(
            Misfortune(number=len(links) + number, kind=Kind.FAIL, target=worker, at=0.3, seconds=0.5, chance=0.3)
            for number, worker in enumerate(workers)
        ),
    ]


def a_new_router(plan: Plan) -> list[Misfortune]:
    """The router is restarted while workers stream, and they take their time."""
    return [Misfortune(number=0, kind=Kind.KILL, target="router", message="TokenBatch", nth=2, seconds=0.2)]


class Bug(NamedTuple):
    caught_by: set[Invariant]
    """One of these must be broken by the first run that breaks anything."""
    needs: tuple[Kind, ...] = ()
    """Runs without any of these are left out: they could not show it."""
    unheard: str = ""
    """Those in which no message of this type is lost by itself too."""
    begin: int = 0
    """The first seed: of a bug that few seeds show, one that does is not far behind."""
    pace: float = 0.0
    """Those whose steps are faster too."""
    scene: Scene | None = None
    """What goes wrong, where that which a seed draws would seldom show it."""


BUGS: dict[Patch, Bug] = {
    ack_before_verifying: Bug({Invariant.OWN_BLOCKS}, scene=spoiled),
    check_no_attempt_in_the_session: Bug({Invariant.FENCED, Invariant.RESUMED}, scene=left_for_dead),
    free_without_quarantine: Bug({Invariant.OWN_BLOCKS}),
    resume_off_by_one: Bug({Invariant.SAME_TOKENS}, (Kind.KILL,)),
    release_twice: Bug({Invariant.NO_CRASH}),
    miss_no_report: Bug({Invariant.DETECTED, Invariant.RESUMED}, scene=a_long_sleep),
    lose_a_wake_up: Bug({Invariant.RESUMED, Invariant.ONE_END}, scene=asked_in_vain),
    forget_the_stop_string_at_resume: Bug({Invariant.SAME_TOKENS}, (Kind.KILL, Kind.STOP)),
    deliver_the_first_token_from_both: Bug({Invariant.SAME_TOKENS}),
    ignore_that_a_worker_is_lost: Bug({Invariant.RESUMED, Invariant.ONE_END}, (Kind.KILL,)),
    forget_the_attempt_at_the_workers: Bug({Invariant.NO_CRASH, Invariant.ACCOUNTED}, scene=late_at_the_workers),
    ignore_that_a_peer_is_lost: Bug({Invariant.FREED}, (Kind.KILL,), unheard="Abort", begin=3900),
    ignore_an_abort: Bug({Invariant.FREED}, pace=20.0),
    forget_what_gateways_hold: Bug({Invariant.LEDGER}, begin=750, pace=20.0, scene=a_new_router),
    free_before_the_ack: Bug({Invariant.NO_CRASH, Invariant.RESUMED}, scene=spoiled),
    forget_a_stream_before_its_end_is_acked: Bug({Invariant.RESUMED, Invariant.ONE_END}, scene=unheard),
    shift_logprobs_at_resume: Bug({Invariant.SAME_TOKENS}, (Kind.KILL, Kind.FREEZE)),
    believe_that_there_is_no_gap: Bug({Invariant.SAME_TOKENS}, scene=unheard),
    count_what_was_generated_as_prompt: Bug({Invariant.SAME_TOKENS, Invariant.RESUMED}, (Kind.KILL, Kind.STOP)),
}


def plans(bug: Bug) -> Iterator[Plan]:
    for seed in count(bug.begin):
        plan = draw(seed, faults=True)
        if plan.topology.pace < bug.pace:
            continue
        if bug.scene is not None:
            yield replace(plan, misfortunes=tuple(bug.scene(plan)))
        elif _shows(plan, bug):
            yield plan


def _shows(plan: Plan, bug: Bug) -> bool:
    """Whether something of what the bug needs goes wrong."""
    lost = {each.message for each in plan.misfortunes if each.kind is Kind.LOSE}
    some = not bug.needs or any(each.kind in bug.needs for each in plan.misfortunes)
    return some and (not bug.unheard or bug.unheard in lost)


SCENES = {bug.scene: None for bug in BUGS.values() if bug.scene is not None}


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__.replace("_", " "))
def test_without_its_bug_a_scene_breaks_nothing(scene: Scene) -> None:
    for plan in islice(plans(Bug(set(), scene=scene)), 20):
        assert judged(plan).verdict.clean, plan.seed


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__.replace("_", " "))
def test_a_seeded_bug_is_caught_by_the_invariant_that_it_breaks(bug: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first run that breaks anything: nothing else that goes wrong counts."""
    wanted = BUGS[bug]
    bug(monkeypatch)
    for run, plan in enumerate(islice(plans(wanted), RUNS), 1):
        broken = judged(plan).verdict.violations
        if broken:
            print(f"{bug.__name__}: run {run}, seed {plan.seed}: {broken[0]}")
            assert {each.invariant for each in broken} & wanted.caught_by, broken
            return
    raise AssertionError(f"not caught in {RUNS} runs")

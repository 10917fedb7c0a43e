"""Promise: a worker does nothing for a message that does not prove where it comes from, nor sends anything there."""

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from decode_worker.core.reservation import Reservations
from engine.core.blocks import BlockPool
from engine.core.outputs import StepOutput
from engine.core.scheduler import Scheduler, SchedulerLimits
from kv_transfer.core.digest import DIGEST_BYTES
from kv_transfer.core.events import Live, TransferKey
from kv_transfer.core.session import Digested, LandingOpened, Push, TakeDigests, TransferTimeouts
from messages.codec import pack_tokens, unpack_tokens
from messages.common import FailReason, Generation, KVRank, KVWay, Role, Ticket, WorkerAddress
from messages.decode_to_prefill import CancelTransfer, TransferAccepted
from messages.gateway_to_worker import Abort, EndAck, Generate, Prefill, TokensWanted
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.prefill_to_decode import EndTransfer, FirstToken, OpenTransfer, TransferClosed
from messages.router_to_worker import Adopt, GatewayBack, GatewayLost, PeerLost
from messages.sampling import SamplingParams
from messages.seals import seal
from messages.tickets import mint
from messages.worker_to_gateway import AttemptFailed, NotHere, Superseded, TokenBatch
from messages.worker_to_router import Report
from prefill_worker.core.handoff import Handoffs
from runtime.core.actions import ForgetPeer, Send
from runtime.core.shared import WorkerSettings
from tests.kv_transfer.kv_pair import shard_of_bytes
from worker.core.machine import WorkerMachine

KEY = b"k" * 32
ROUTER, GATEWAY = Address("tcp://127.0.0.1:1"), Address("tcp://127.0.0.1:2")
VOCABULARY = 100
REQUEST, ATTEMPT = RequestId("f" * 32), Attempt(1)
KEY_OF_TRANSFER = TransferKey(REQUEST, ATTEMPT)
SHARD = shard_of_bytes(64)
MEMORY = "/proc/1/fd/3#" + "0" * 32 + ":512"
KV = (KVRank(SHARD, 8, "host", (KVWay("shm", MEMORY), KVWay("zmq", "tcp://127.0.0.1:9"))),)
SOURCE = (KVRank(SHARD, 8, "host", (KVWay("shm", MEMORY), KVWay("zmq"))),)
PREFILL = WorkerAddress(WorkerId("prefill-0"), Epoch(1), Address("tcp://127.0.0.1:3"))
DECODE = WorkerAddress(WorkerId("decode-0"), Epoch(2), Address("tcp://127.0.0.1:4"), KV)
GENERATION = Generation(pack_tokens([1] * 20), SamplingParams(max_tokens=5))
TICKET = mint(KEY, REQUEST, ATTEMPT, PREFILL, DECODE)
OPEN = OpenTransfer(REQUEST, ATTEMPT, PREFILL, GATEWAY, GENERATION, "shm", SOURCE, TICKET)
ORDER = Prefill(REQUEST, ATTEMPT, GATEWAY, GENERATION, DECODE, TICKET)
ORDER_OF_60 = replace(ORDER, generation=Generation(pack_tokens([1] * 60), SamplingParams(max_tokens=1)))
END = EndTransfer(REQUEST, ATTEMPT, PREFILL.mailbox, 1, FirstToken(7), 2, bytes(2 * DIGEST_BYTES))


def engine() -> tuple[Scheduler, BlockPool]:
    pool = BlockPool(8, 16)
    limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, prefill_chunk=64)
    return Scheduler(pool, limits, frozenset()), pool


@pytest.fixture
def decode() -> WorkerMachine:
    scheduler, pool = engine()
    settings = WorkerSettings(
        address=DECODE, role=Role.DECODE, router=ROUTER, cluster_key=KEY, block_bytes=64,
        max_num_seqs=4, max_model_len=64, vocab_size=VOCABULARY,
    )  # fmt: skip
    reservations = Reservations(DECODE.mailbox, DECODE.kv, pool, timeouts=TransferTimeouts())
    return WorkerMachine(settings, scheduler, pool, Handoffs(DECODE, KV, pool, TransferTimeouts()), reservations)


@pytest.fixture
def prefill() -> WorkerMachine:
    scheduler, pool = engine()
    settings = WorkerSettings(
        address=PREFILL, role=Role.PREFILL, router=ROUTER, cluster_key=KEY, block_bytes=64,
        max_num_seqs=4, max_model_len=64, vocab_size=VOCABULARY,
    )  # fmt: skip
    reservations = Reservations(PREFILL.mailbox, SOURCE, pool, timeouts=TransferTimeouts())
    return WorkerMachine(settings, scheduler, pool, Handoffs(PREFILL, SOURCE, pool, TransferTimeouts()), reservations)


def sent(actions: list[Any]) -> list[Any]:
    return [action.message for action in actions if isinstance(action, Send)]


def lost_peer(peer: WorkerAddress, *, dead: bool) -> PeerLost:
    return seal(KEY, PeerLost(peer=peer, dead=dead, detail="killed"))


OTHER = WorkerAddress(WorkerId("decode-1"), Epoch(2), DECODE.mailbox, DECODE.kv)
FORGED = [
    pytest.param(Ticket(PREFILL.worker, Epoch(1), DECODE.worker, Epoch(2), bytes(32)), id="made up"),
    pytest.param(mint(b"x" * 32, REQUEST, ATTEMPT, PREFILL, DECODE), id="under another key"),
    pytest.param(mint(KEY, REQUEST, Attempt(2), PREFILL, DECODE), id="of another attempt"),
    pytest.param(mint(KEY, REQUEST, ATTEMPT, PREFILL, OTHER), id="for another pair"),
]


@pytest.mark.parametrize("ticket", FORGED)
def test_an_open_without_its_ticket_is_dropped_unanswered(decode: WorkerMachine, ticket: Ticket) -> None:
    assert decode.handle(replace(OPEN, ticket=ticket), 0.0) == []
    assert decode.schedule(0.0) == (None, [])
    assert decode.inspect()["forged"] == 1
    decode.handle(OPEN, 0.0)  # and does not fence the true one
    assert decode.schedule(0.0)[1]


@pytest.mark.parametrize("ticket", FORGED)
def test_a_prefill_without_its_ticket_is_dropped_unanswered(prefill: WorkerMachine, ticket: Ticket) -> None:
    assert prefill.handle(replace(ORDER, ticket=ticket), 0.0) == []
    assert prefill.inspect()["legs"] == 0
    assert prefill.inspect()["forged"] == 1
    prefill.handle(ORDER, 0.0)
    assert prefill.inspect()["legs"] == 1


def test_a_stranger_who_says_that_a_transfer_is_over_is_not_answered(
    decode: WorkerMachine, prefill: WorkerMachine
) -> None:
    cancel = CancelTransfer(REQUEST, Attempt(9), DECODE.mailbox, "over")
    assert decode.handle(replace(END, attempt=Attempt(9)), 0.0) == []
    assert prefill.handle(cancel, 0.0) == []
    assert decode.inspect()["forged"] == prefill.inspect()["forged"] == 1
    decode.handle(OPEN, 0.0)
    prefill.handle(ORDER, 0.0)
    assert [type(message) for message in sent(decode.handle(replace(END, attempt=Attempt(9)), 0.0))] == [CancelTransfer]
    assert [type(message) for message in sent(prefill.handle(cancel, 0.0))] == [TransferClosed]


def test_of_a_dead_peer_nothing_is_kept_and_nothing_is_sent_to_it(
    decode: WorkerMachine, prefill: WorkerMachine
) -> None:
    prefill.handle(ORDER, 0.0)
    prefill.schedule(0.0)
    lost = prefill.handle(lost_peer(DECODE, dead=True), 0.0)
    assert lost[-1] == ForgetPeer(DECODE)
    assert [type(message) for message in sent(lost)] == [AttemptFailed]
    decode.handle(OPEN, 0.0)
    decode.schedule(0.0)
    lost = decode.handle(lost_peer(PREFILL, dead=True), 0.0)
    assert lost[-1] == ForgetPeer(PREFILL) and not sent(lost)
    for machine in (decode, prefill):
        machine.check_integrity()
        assert machine.inspect()["held"] == 0
    assert decode.handle(END, 0.0) == []  # it is a stranger now


def test_only_the_router_can_say_that_a_peer_is_dead(decode: WorkerMachine, prefill: WorkerMachine) -> None:
    decode.handle(OPEN, 0.0)
    decode.schedule(0.0)
    prefill.handle(ORDER, 0.0)
    prefill.schedule(0.0)
    for forged in (replace(lost_peer(PREFILL, dead=False), dead=True), PeerLost(peer=DECODE, dead=True, detail="")):
        assert decode.handle(forged, 0.0) == prefill.handle(forged, 0.0) == []
    assert decode.inspect()["forged"] == prefill.inspect()["forged"] == 2
    assert decode.inspect()["held"] == prefill.inspect()["held"] == 2


def test_a_peer_that_is_only_silent_is_told_that_its_transfer_is_over_and_kept(
    decode: WorkerMachine, prefill: WorkerMachine
) -> None:
    prefill.handle(ORDER, 0.0)
    prefill.schedule(0.0)
    actions = prefill.handle(lost_peer(DECODE, dead=False), 0.0)
    assert [type(message) for message in sent(actions)] == [TransferClosed, AttemptFailed]
    decode.handle(OPEN, 0.0)
    decode.schedule(0.0)
    decode.handle(LandingOpened(KEY_OF_TRANSFER), 0.0)
    actions = decode.handle(lost_peer(PREFILL, dead=False), 0.0)
    assert [type(message) for message in sent(actions)] == [CancelTransfer]
    assert decode.inspect()["held"] == 2


def test_a_first_token_beyond_the_vocabulary_fails_its_own_attempt_and_frees_its_blocks(decode: WorkerMachine) -> None:
    decode.handle(OPEN, 0.0)
    decode.schedule(0.0)
    decode.handle(LandingOpened(KEY_OF_TRANSFER), 0.0)
    decode.handle(replace(END, first=FirstToken(VOCABULARY)), 0.0)
    failed = sent(decode.handle(Digested(KEY_OF_TRANSFER, 0, bytes(2 * DIGEST_BYTES)), 0.0))[-1]
    assert isinstance(failed, AttemptFailed) and failed.reason is FailReason.TRANSFER
    decode.check_integrity()
    assert decode.inspect()["held"] == decode.inspect()["runs"] == 0


def test_on_a_slow_machine_a_prompt_comes_in_steps_that_leave_time_to_report(prefill: WorkerMachine) -> None:
    prefill.handle(ORDER_OF_60, 0.0)
    now, taken = 0.0, []
    while (plan := prefill.schedule(now)[0]) is not None:
        taken.append(plan.num_tokens.sum() / 16)  # this machine computes 16 tokens a second
        now += taken[-1]
        tokens = np.zeros(int(plan.samples.sum()), np.int32)
        prefill.update(plan, StepOutput(tokens), now)
    assert len(taken) == 3 and max(taken[1:]) <= 1.0


ACCEPTED = TransferAccepted(REQUEST, ATTEMPT, pack_tokens([5, 3]), 0)


def pushes(actions: list[Any]) -> list[tuple[int, int, Live]]:
    return [(action.first, len(action.source), action.live) for action in actions if isinstance(action, Push)]


def test_a_prefill_worker_listens_while_a_step_runs_until_decode_has_accepted(prefill: WorkerMachine) -> None:
    assert not prefill.listens
    prefill.handle(ORDER, 0.0)
    assert not prefill.listens
    plan, opened = prefill.schedule(0.0)
    assert plan is not None and isinstance(sent(opened)[0], OpenTransfer) and prefill.listens
    assert isinstance(ACCEPTED, prefill.early)
    assert pushes(prefill.handle(ACCEPTED, 0.1)) == [(0, 2, Live.RUNNING)]
    assert not prefill.listens
    done = prefill.update(plan, StepOutput(np.array([7], np.int32)), 0.2)
    assert pushes(done) == [] and [len(each.blocks) for each in done if isinstance(each, TakeDigests)] == [2]
    prefill.check_integrity()


def test_an_accept_during_a_step_of_others_pushes_what_is_final(prefill: WorkerMachine) -> None:
    prefill.handle(ORDER, 0.0)
    plan, _ = prefill.schedule(0.0)
    assert plan is not None
    prefill.update(plan, StepOutput(np.array([7], np.int32)), 0.1)
    other = RequestId("e" * 32)
    ticket = mint(KEY, other, ATTEMPT, PREFILL, DECODE)
    prefill.handle(replace(ORDER, request=other, ticket=ticket, generation=ORDER_OF_60.generation), 0.2)
    plan, _ = prefill.schedule(0.3)
    assert plan is not None and [seq.seq_id for seq in plan.sequences] == [other] and prefill.listens
    assert pushes(prefill.handle(ACCEPTED, 0.4)) == [(0, 2, Live.NO)]
    prefill.update(plan, StepOutput(np.array([7], np.int32)), 0.5)
    prefill.check_integrity()


def test_a_step_that_fails_after_its_push_began_gives_the_attempt_up(prefill: WorkerMachine) -> None:
    prefill.handle(ORDER, 0.0)
    plan, _ = prefill.schedule(0.0)
    assert plan is not None
    prefill.handle(ACCEPTED, 0.1)
    failed = prefill.fail_step(plan, "out of luck", 0.2)
    assert [each.reason for each in sent(failed)] == [FailReason.ENGINE]
    assert [type(each).__name__ for each in failed] == ["CancelPushes", "Send"]
    prefill.check_integrity()


def test_a_worker_that_hands_nothing_over_handles_nothing_while_a_step_runs(decode: WorkerMachine) -> None:
    decode.handle(OPEN, 0.0)
    decode.handle(Generate(RequestId("e" * 32), ATTEMPT, GATEWAY, GENERATION), 0.0)
    plan, opened = decode.schedule(0.0)
    assert plan is not None and opened and not decode.listens


ELSEWHERE = Address("tcp://127.0.0.1:5")
DESCRIBED = replace(GENERATION, description=b"what gateways know")
ADOPT = seal(KEY, Adopt(request=REQUEST, gateway=ELSEWHERE, number=1))


def steps(machine: WorkerMachine, tokens: list[int]) -> list[Any]:
    """What the machine says while it samples ``tokens``, a step each."""
    said = []
    for token in tokens:
        plan, _ = machine.schedule(0.0)
        assert plan is not None
        output = StepOutput(np.array([token], np.int32))
        said += machine.update(plan, output, 0.0)
    return said


def test_a_running_request_goes_on_for_the_gateway_that_adopts_it(decode: WorkerMachine) -> None:
    decode.handle(Generate(REQUEST, ATTEMPT, GATEWAY, DESCRIBED), 0.0)
    steps(decode, [7, 8])
    over, adopted = decode.handle(ADOPT, 0.0)
    assert over == Send(GATEWAY, Superseded(REQUEST, ATTEMPT, DECODE.worker))
    assert adopted.to == ELSEWHERE
    assert (adopted.message.attempt, adopted.message.running, adopted.message.generation) == (3, True, DESCRIBED)
    assert unpack_tokens(adopted.message.tokens.tokens).tolist() == [7, 8]
    # A gateway that has not heard of it can neither stop nor take anything.
    assert decode.handle(Abort(REQUEST, ATTEMPT), 0.0) == []
    assert decode.handle(Abort(REQUEST, Attempt(2)), 0.0) == []  # which was to move it when it was adopted
    assert decode.handle(TokensWanted(REQUEST, ATTEMPT, 0, GATEWAY), 0.0) == [over]
    (batch,) = steps(decode, [9])
    assert batch.to == ELSEWHERE and [chunk.attempt for chunk in batch.message.chunks] == [3]
    assert decode.handle(ADOPT, 0.0)[0].message.attempt == 3  # asked again: the answer was lost
    steps(decode, [10, 11])
    decode.handle(EndAck(REQUEST, Attempt(3), keep=True), 0.0)
    assert decode.inspect()["deliveries"] == decode.inspect()["runs"] == decode.inspect()["held"] == 0
    (kept,) = decode.handle(seal(KEY, Adopt(request=REQUEST, gateway=GATEWAY, number=1)), 9.0)
    assert unpack_tokens(kept.message.tokens.tokens).tolist() == [7, 8, 9, 10, 11]
    assert (kept.message.attempt, kept.message.tokens.finish) == (5, "length")
    decode.handle(EndAck(REQUEST, Attempt(5), keep=True), 9.0)
    decode.tick(19.1)
    assert sent(decode.handle(ADOPT, 19.1)) == [NotHere(REQUEST, DECODE.worker)]


def test_an_adoption_that_is_repeated_late_takes_the_stream_from_nobody(decode: WorkerMachine) -> None:
    decode.handle(Generate(REQUEST, ATTEMPT, GATEWAY, DESCRIBED), 0.0)
    steps(decode, [7, 8])
    third = Address("tcp://127.0.0.1:6")
    decode.handle(ADOPT, 0.0)
    _, adopted = decode.handle(seal(KEY, Adopt(request=REQUEST, gateway=third, number=1)), 0.0)
    assert (adopted.to, adopted.message.attempt) == (third, 5)
    assert decode.handle(ADOPT, 0.0) == [Send(ELSEWHERE, NotHere(REQUEST, DECODE.worker))]
    assert [batch.to for batch in steps(decode, [9])] == [third]
    _, again = decode.handle(seal(KEY, replace(ADOPT, number=2)), 0.0)  # its client has come back to it
    assert (again.to, again.message.attempt) == (ELSEWHERE, 7)


def test_who_asks_for_tokens_of_an_attempt_that_is_over_hears_that_it_is(decode: WorkerMachine) -> None:
    asked = TokensWanted(REQUEST, ATTEMPT, 0, GATEWAY)
    assert decode.handle(asked, 0.0) == [], "it may be on its way"
    decode.handle(Generate(REQUEST, ATTEMPT, GATEWAY, GENERATION), 0.0)
    steps(decode, [7])
    assert [type(send.message) for send in decode.handle(asked, 0.0)] == [TokenBatch]
    plan, _ = decode.schedule(0.0)
    assert plan is not None
    (failed,) = decode.fail_step(plan, "out of luck", 0.0)
    assert decode.handle(asked, 0.0) == [failed], "it was said before, and lost"
    assert decode.handle(Generate(REQUEST, ATTEMPT, GATEWAY, GENERATION), 0.0) == [failed]
    decode.handle(Generate(REQUEST, Attempt(2), GATEWAY, GENERATION), 0.0)
    steps(decode, [7])
    decode.handle(EndAck(REQUEST, Attempt(2)), 0.0)
    decode.handle(Abort(REQUEST, Attempt(2)), 0.0)
    (unknown,) = decode.handle(replace(asked, attempt=Attempt(2)), 0.0)
    assert (unknown.to, unknown.message.reason, unknown.message.attempt) == (GATEWAY, FailReason.UNKNOWN, 2)


def test_an_order_that_comes_again_for_an_attempt_that_has_failed_is_answered_as_before(prefill: WorkerMachine) -> None:
    prefill.handle(ORDER, 0.0)
    assert prefill.handle(ORDER, 0.0) == []
    plan, _ = prefill.schedule(0.0)
    assert plan is not None
    failed = [send for send in prefill.fail_step(plan, "out of luck", 0.2) if isinstance(send.message, AttemptFailed)]
    assert len(failed) == 1 and prefill.handle(ORDER, 0.3) == failed


def test_a_worker_says_for_as_long_as_it_takes_a_gateway_for_lost_that_it_does(decode: WorkerMachine) -> None:
    decode.handle(seal(KEY, GatewayLost(gateway=GATEWAY)), 0.0)
    reports = [
        action.message for tick in range(10) for action in decode.tick(tick / 10) if isinstance(action.message, Report)
    ]
    assert {each.lost_gateways for each in reports} == {(), (GATEWAY,)}
    decode.handle(seal(KEY, GatewayBack(gateway=GATEWAY)), 1.0)
    reports = [
        action.message
        for tick in range(10, 20)
        for action in decode.tick(tick / 10)
        if isinstance(action.message, Report)
    ]
    assert {each.lost_gateways for each in reports} == {()}


def test_what_a_stop_string_has_ended_is_kept_without_its_blocks(decode: WorkerMachine) -> None:
    decode.handle(Generate(REQUEST, ATTEMPT, GATEWAY, DESCRIBED), 0.0)
    steps(decode, [7, 8])
    decode.handle(Abort(REQUEST, ATTEMPT, keep=True), 0.0)
    assert decode.inspect()["held"] == decode.inspect()["runs"] == 0
    (adopted,) = decode.handle(ADOPT, 1.0)
    assert unpack_tokens(adopted.message.tokens.tokens).tolist() == [7, 8] and adopted.message.running
    decode.tick(11.1)
    assert sent(decode.handle(ADOPT, 11.1)) == [NotHere(REQUEST, DECODE.worker)]


def test_an_attempt_without_a_token_is_told_to_who_adopts_it_but_does_not_go_on(
    decode: WorkerMachine, prefill: WorkerMachine
) -> None:
    prefill.handle(replace(ORDER, generation=DESCRIBED), 0.0)
    decode.handle(replace(OPEN, generation=DESCRIBED), 0.0)
    for machine in (prefill, decode):
        over, adopted = machine.handle(ADOPT, 0.0)
        assert over.message == Superseded(REQUEST, ATTEMPT, adopted.message.worker.worker)
        assert (adopted.message.attempt, adopted.message.running, adopted.message.generation) == (1, False, DESCRIBED)
        machine.handle(Abort(REQUEST, ATTEMPT), 0.0)
        assert machine.inspect()["held"] == 0


def test_nothing_is_let_go_without_the_clusters_word_or_the_first_gateways_consent(decode: WorkerMachine) -> None:
    decode.handle(Generate(REQUEST, ATTEMPT, GATEWAY, GENERATION), 0.0)
    steps(decode, [7])
    assert decode.handle(replace(ADOPT, mac=bytes(32)), 0.0) == [] and decode.inspect()["forged"] == 1
    assert sent(decode.handle(ADOPT, 0.0)) == [NotHere(REQUEST, DECODE.worker)]  # it has no description

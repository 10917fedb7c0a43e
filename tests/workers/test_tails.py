"""Promise: a prompt that decode offers to compute is computed by one of the two, whatever is lost on the way, and its
first token comes from one of them."""

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from decode_worker.core.reservation import Reservations
from engine.core.blocks import BlockPool
from engine.core.outputs import StepOutput
from engine.core.scheduler import Scheduler, SchedulerLimits
from kv_transfer.core.events import TransferKey
from kv_transfer.core.session import CloseLanding, LandingOpened, OpenLanding, TransferTimeouts
from messages.codec import pack_tokens
from messages.common import FailReason, Generation, KVRank, KVWay, Role, WorkerAddress
from messages.decode_to_prefill import TailOffered, TransferAccepted, TransferAcked
from messages.gateway_to_worker import Abort, Generate, Prefill
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.prefill_to_decode import OpenTransfer, TailYielded
from messages.router_to_worker import PeerLost
from messages.sampling import SamplingParams
from messages.seals import seal
from messages.tickets import mint
from messages.worker_to_gateway import AttemptFailed, TokenBatch
from messages.worker_to_router import Report
from prefill_worker.core.handoff import Handoffs
from runtime.core.actions import Send
from runtime.core.disaggregation import Disaggregation, Policy
from runtime.core.shared import WorkerSettings
from tests.kv_transfer.kv_pair import shard_of_bytes
from worker.core.machine import WorkerMachine

KEY = b"k" * 32
ROUTER, GATEWAY = Address("tcp://127.0.0.1:1"), Address("tcp://127.0.0.1:2")
REQUEST, FIRST = RequestId("f" * 32), Attempt(1)
SHARD = shard_of_bytes(64)
PREFILL = WorkerAddress(WorkerId("prefill-0"), Epoch(1), Address("tcp://127.0.0.1:3"))
SOURCE = (KVRank(SHARD, 8, "host", (KVWay("zmq"),)),)
KV = (KVRank(SHARD, 8, "host", (KVWay("zmq", "tcp://127.0.0.1:9"),)),)
DECODE = WorkerAddress(WorkerId("decode-0"), Epoch(2), Address("tcp://127.0.0.1:4"), KV)
PROMPT = [*range(60)]
"""Two steps: a worker's first one has 32 tokens."""
NEVER = Disaggregation(policy=Policy.NEVER)
AUTO = Disaggregation(policy=Policy.AUTO)


class Pair:
    """Both machines and the link between them; the test delivers, loses and repeats what is sent."""

    def __init__(self, disaggregation: Disaggregation = NEVER) -> None:
        self.now = 0.0
        scheduler, self.prefill_pool = _engine()
        settings = WorkerSettings(
            address=PREFILL, role=Role.PREFILL, router=ROUTER, cluster_key=KEY, block_bytes=64, max_num_seqs=4,
            max_model_len=64, vocab_size=100, disaggregation=disaggregation,
        )  # fmt: skip
        handoffs = Handoffs(PREFILL, SOURCE, self.prefill_pool, TransferTimeouts())
        reservations = Reservations(PREFILL.mailbox, SOURCE, self.prefill_pool, timeouts=TransferTimeouts())
        self.prefill = WorkerMachine(settings, scheduler, self.prefill_pool, handoffs, reservations)
        scheduler, self.decode_pool = _engine()
        decode = WorkerSettings(
            address=DECODE, role=Role.DECODE, router=ROUTER, cluster_key=KEY, block_bytes=64, max_num_seqs=4,
            max_model_len=64, vocab_size=100, disaggregation=disaggregation,
        )  # fmt: skip
        reservations = Reservations(DECODE.mailbox, DECODE.kv, self.decode_pool, timeouts=TransferTimeouts())
        handoffs = Handoffs(DECODE, DECODE.kv, self.decode_pool, TransferTimeouts())
        self.decode = WorkerMachine(decode, scheduler, self.decode_pool, handoffs, reservations)
        self.sent: dict[Address, list[Any]] = {}
        """What has been sent and not been taken, by receiver."""
        self.performed: list[Any] = []
        """What was asked of transports."""

    def order(self, attempt: int = 1, **sampling: Any) -> None:
        """The gateway orders a prompt."""
        params = SamplingParams(**{"max_tokens": 2, "temperature": 0.0, "ignore_eos": True} | sampling)
        ticket = mint(KEY, REQUEST, Attempt(attempt), PREFILL, DECODE)
        generation = Generation(pack_tokens(PROMPT), params)
        self.see(self.prefill.handle(Prefill(REQUEST, Attempt(attempt), GATEWAY, generation, DECODE, ticket), self.now))

    def see(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.sent.setdefault(action.to, []).append(action.message)
            else:
                self.performed.append(action)
        self.prefill.check_integrity()
        self.decode.check_integrity()

    def take(self, who: WorkerAddress | Address, kind: type[Any]) -> list[Any]:
        """Take what was sent to someone of this kind."""
        box = self.sent.setdefault(who.mailbox if isinstance(who, WorkerAddress) else who, [])
        taken = [message for message in box if isinstance(message, kind)]
        box[:] = [message for message in box if not isinstance(message, kind)]
        return taken

    def deliver(self, who: WorkerAddress, kind: type[Any], times: int = 1) -> None:
        """Hand over the one message of this kind."""
        (message,) = self.take(who, kind)
        machine: Any = self.prefill if who is PREFILL else self.decode
        for _ in range(times):
            self.see(machine.handle(message, self.now))

    def step(self, who: WorkerAddress) -> int:
        """One turn of its loop, without messages; the tokens it computed. Everyone samples token 7."""
        machine: Any = self.prefill if who is PREFILL else self.decode
        self.now += 0.01
        self.see(machine.tick(self.now))
        plan, actions = machine.schedule(self.now)
        self.see(actions)
        if plan is None:
            return 0
        self.now += 0.01
        tokens = np.full(int(plan.samples.sum()), 7, np.int32)
        self.see(machine.update(plan, StepOutput(tokens), self.now))
        return int(plan.num_tokens.sum())

    def offer(self) -> None:
        """Up to decode's offer, which is under way: prefill has computed one of its two steps."""
        self.order()
        assert self.step(PREFILL) == 32
        self.deliver(DECODE, OpenTransfer)
        assert self.step(DECODE) == 0

    def tokens(self) -> list[tuple[str, int, int]]:
        """Who sent a gateway how many tokens, and from which position on."""
        chunks = [(batch.worker, chunk) for batch in self.take(GATEWAY, TokenBatch) for chunk in batch.chunks]
        return [(worker, chunk.index, len(chunk.tokens) // 4) for worker, chunk in chunks if chunk.tokens]

    def counted(self) -> dict[str, int]:
        counts = self.decode.membership.decisions.counts()
        return {name: getattr(counts, name) for name in counts.__struct_fields__ if getattr(counts, name)}


def _engine() -> tuple[Scheduler, BlockPool]:
    pool = BlockPool(8, 16)
    limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, prefill_chunk=64)
    return Scheduler(pool, limits, frozenset()), pool


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_decode_computes_what_prefill_leaves_to_it_and_sends_every_token(pair: Pair) -> None:
    pair.offer()
    pair.deliver(PREFILL, TailOffered)
    assert pair.prefill.inspect()["legs"] == pair.prefill.inspect()["handoffs"] == 0
    assert pair.prefill_pool.counts().held == 0
    pair.deliver(DECODE, TailYielded)
    assert pair.decode_pool.counts().held == 0  # the promise is gone; the sequence takes its blocks when it starts
    pair.deliver(PREFILL, TransferAcked)
    assert [pair.step(DECODE) for _ in range(3)] == [32, 28, 1]
    assert pair.step(PREFILL) == 0
    assert pair.tokens() == [("decode-0", 0, 1), ("decode-0", 1, 1)]
    assert pair.counted() == {"never": 1}
    assert pair.prefill.inspect()["tails_yielded"] == 1
    assert pair.take(GATEWAY, AttemptFailed) == []


def test_the_landing_that_was_opened_for_it_is_closed_again(pair: Pair) -> None:
    pair.offer()
    assert [type(each) for each in pair.performed] == [OpenLanding]
    pair.see(pair.decode.handle(LandingOpened(TransferKey(REQUEST, FIRST)), pair.now))
    pair.deliver(PREFILL, TailOffered)
    pair.deliver(PREFILL, TransferAccepted)  # comes too late
    pair.deliver(DECODE, TailYielded)
    assert [type(each) for each in pair.performed] == [OpenLanding, CloseLanding]


def test_the_offer_leaves_ahead_of_the_accept_behind_which_pushes_begin(pair: Pair) -> None:
    pair.order()
    pair.step(PREFILL)
    pair.deliver(DECODE, OpenTransfer)
    _, actions = pair.decode.schedule(pair.now)
    assert isinstance(actions[0], Send) and isinstance(actions[0].message, TailOffered)
    assert isinstance(actions[1], OpenLanding)  # some transports answer it at once


def test_an_offer_that_comes_when_the_first_token_is_there_changes_nothing(pair: Pair) -> None:
    pair.offer()
    assert pair.step(PREFILL) == 28
    assert pair.tokens() == [("prefill-0", 0, 1)]
    pair.deliver(PREFILL, TailOffered)
    assert pair.take(DECODE, TailYielded) == []
    assert pair.prefill.inspect()["handoffs"] == 1


def test_nor_does_one_that_comes_behind_the_accept_or_not_at_all(pair: Pair) -> None:
    pair.offer()
    pair.see(pair.decode.handle(LandingOpened(TransferKey(REQUEST, FIRST)), pair.now))
    pair.deliver(PREFILL, TransferAccepted)
    pair.deliver(PREFILL, TailOffered)
    assert pair.take(DECODE, TailYielded) == []
    assert pair.step(PREFILL) == 28 and pair.prefill.inspect()["handoffs"] == 1


def test_a_lost_yield_is_sent_again_until_it_is_acked_and_taken_once(pair: Pair) -> None:
    pair.offer()
    pair.deliver(PREFILL, TailOffered)
    assert len(pair.take(DECODE, TailYielded)) == 1  # lost
    pair.now += 0.6
    assert pair.prefill.wake_at <= pair.now
    pair.step(PREFILL)
    pair.deliver(DECODE, TailYielded, times=2)
    assert pair.decode.inspect()["never"] == pair.decode.inspect()["runs"] == 1
    assert len(pair.take(PREFILL, TransferAcked)) == 2  # both lost
    pair.now += 0.6
    pair.step(PREFILL)
    pair.deliver(DECODE, TailYielded)
    pair.deliver(PREFILL, TransferAcked)
    pair.now += 0.6
    pair.step(PREFILL)
    assert pair.take(DECODE, TailYielded) == []
    assert pair.decode.inspect()["never"] == 1


def test_a_yield_that_comes_behind_the_abort_starts_nothing(pair: Pair) -> None:
    pair.offer()
    pair.deliver(PREFILL, TailOffered)
    pair.see(pair.decode.handle(Abort(REQUEST, FIRST), pair.now))
    pair.deliver(DECODE, TailYielded)
    assert pair.decode.inspect()["runs"] == 0 and pair.decode_pool.counts().held == 0
    pair.see(pair.prefill.handle(Abort(REQUEST, FIRST), pair.now))
    pair.now += 0.6
    pair.step(PREFILL)
    assert pair.take(DECODE, TailYielded) == []


def test_a_newer_attempt_fences_an_older_yield(pair: Pair) -> None:
    pair.offer()
    pair.deliver(PREFILL, TailOffered)
    (late,) = pair.take(DECODE, TailYielded)
    pair.order(attempt=2)
    pair.step(PREFILL)
    pair.deliver(DECODE, OpenTransfer)
    pair.see(pair.decode.handle(late, pair.now))
    assert pair.decode.inspect()["runs"] == 0
    pair.now += 0.6
    pair.step(PREFILL)
    assert pair.take(DECODE, TailYielded) == []  # of the first attempt nobody hears again


@pytest.mark.parametrize("dead", [False, True])
def test_a_lost_decode_worker_is_told_no_more(pair: Pair, dead: bool) -> None:
    pair.offer()
    pair.deliver(PREFILL, TailOffered)
    pair.see(pair.prefill.handle(seal(KEY, PeerLost(peer=DECODE, dead=dead, detail="")), pair.now))
    pair.take(DECODE, TailYielded)
    pair.now += 0.6
    pair.step(PREFILL)
    assert pair.take(DECODE, TailYielded) == []


def test_that_decode_was_lost_is_not_the_prefill_workers_fault(pair: Pair) -> None:
    pair.offer()
    pair.see(pair.prefill.handle(seal(KEY, PeerLost(peer=DECODE, dead=True, detail="")), pair.now))
    assert [failed.reason for failed in pair.take(GATEWAY, AttemptFailed)] == [FailReason.PEER_LOST]
    assert pair.prefill_pool.counts().held == 0


def test_strangers_offer_and_yield_nothing(pair: Pair) -> None:
    pair.offer()
    stranger = Address("tcp://127.0.0.1:66")
    (offer,) = pair.take(PREFILL, TailOffered)
    assert pair.prefill.handle(replace(offer, mailbox=stranger), pair.now) == []
    assert pair.decode.handle(TailYielded(REQUEST, FIRST, stranger), pair.now) == []
    assert pair.prefill.inspect()["forged"] == pair.decode.inspect()["forged"] == 1
    assert pair.prefill.inspect()["legs"] == pair.decode.inspect()["reservations"] == 1


def opened(pair: Pair, *, prefill_rate: float = 1000.0, transfer_rate: float = 1.0, cached: int = 0, **sampling: Any,
           ) -> list[TailOffered]:  # fmt: skip
    """A prefill worker that says so of itself opens a transfer; what decode offers."""
    pair.order(**sampling)
    pair.step(PREFILL)
    (message,) = pair.take(DECODE, OpenTransfer)
    said = replace(message, prefill_rate=prefill_rate, transfer_rate=transfer_rate, cached_tokens=cached)
    pair.see(pair.decode.handle(said, pair.now))
    pair.step(DECODE)
    return pair.take(PREFILL, TailOffered)


def test_decode_offers_by_what_it_has_measured_and_is_told() -> None:
    pair = Pair(AUTO)
    assert opened(pair, transfer_rate=0.0) == []
    assert pair.counted() == {"unmeasured": 1}
    pair = Pair(AUTO)
    pair.decode.membership.prefill_rate.took(1000, 1.0, pair.now)
    assert len(opened(pair)) == 1
    assert pair.counted() == {}  # only when it is known what came of it
    pair = Pair(AUTO)
    pair.decode.membership.prefill_rate.took(1000, 1.0, pair.now)
    assert opened(pair, transfer_rate=1e9, cached=59) == []
    assert pair.counted() == {"costs_more": 1}


def test_what_decode_has_cached_shortens_the_tail() -> None:
    brief = Disaggregation(policy=Policy.AUTO, max_local_prefill_length=32)
    pair = Pair(brief)
    pair.decode.membership.prefill_rate.took(1000, 1.0, pair.now)
    assert opened(pair) == []
    assert pair.counted() == {"too_long": 1}
    pair = Pair(brief)
    generation = Generation(pack_tokens(PROMPT[:48]), SamplingParams(max_tokens=1, temperature=0.0))
    pair.see(pair.decode.handle(generate(generation), pair.now))
    while pair.step(DECODE):
        pass
    pair.decode.membership.prefill_rate.took(1000, 1.0, pair.now)
    assert len(opened(pair)) == 1


def generate(generation: Generation) -> Generate:
    return Generate(RequestId("e" * 32), FIRST, GATEWAY, generation)


def test_a_prompt_that_is_to_be_scored_is_computed_from_its_first_token_on() -> None:
    pair = Pair(Disaggregation(policy=Policy.AUTO, max_local_prefill_length=32))
    generation = Generation(pack_tokens(PROMPT[:48]), SamplingParams(max_tokens=1, temperature=0.0))
    pair.see(pair.decode.handle(generate(generation), pair.now))
    while pair.step(DECODE):
        pass
    pair.decode.membership.prefill_rate.took(1000, 1.0, pair.now)
    assert opened(pair, prompt_logprobs=0) == []
    assert pair.counted() == {"too_long": 1}


def test_a_pace_that_was_slow_by_chance_is_not_believed_for_ever() -> None:
    pair = Pair(AUTO)
    pair.see(pair.decode.handle(generate(Generation(pack_tokens(PROMPT), SamplingParams(max_tokens=1))), pair.now))
    while pair.step(DECODE):
        pass
    assert pair.decode.membership.prefill_rate.value == pytest.approx(32 / 0.01)
    pair.now += 29.0
    pair.see(pair.decode.tick(pair.now))
    assert pair.decode.membership.prefill_rate.value == pytest.approx(32 / 0.01)
    pair.now += 2.0
    pair.see(pair.decode.tick(pair.now))
    assert pair.decode.membership.prefill_rate.value == 0.0


def test_workers_report_how_fast_they_compute_prompts() -> None:
    pair = Pair(AUTO)
    pair.order()
    while pair.step(PREFILL):
        pass
    pair.now += 0.2
    pair.see(pair.prefill.tick(pair.now))
    (*_, report) = pair.take(ROUTER, Report)
    assert report.prefill_rate == pytest.approx(32 / 0.01)  # the second step is too short to say anything
    pair.see(pair.decode.handle(generate(Generation(pack_tokens(PROMPT), SamplingParams(max_tokens=9))), pair.now))
    while pair.step(DECODE):
        pass
    pair.now += 0.2
    pair.see(pair.decode.tick(pair.now))
    (*_, report) = pair.take(ROUTER, Report)
    assert report.prefill_rate == pytest.approx(32 / 0.01)  # steps of one token a sequence do not count

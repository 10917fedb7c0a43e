"""Promise: over every transport, whatever it does to the data, a hand-over ends with the sender's blocks or not at all.

Both session cores, real transports with faults between them, and a link for messages that loses nothing.
"""

import queue
from collections.abc import Iterable
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest

from kv_transfer.core.digest import digests
from kv_transfer.core.lanes import Route, plan_lanes
from kv_transfer.core.session import (
    CancelPushes,
    CloseLanding,
    Digested,
    Ended,
    LandingOpened,
    OpenLanding,
    Outcome,
    Push,
    ReceiveSession,
    SendSession,
    TakeDigests,
    TransferTimeouts,
)
from kv_transfer.transports.build import TRANSPORTS, allocate_pool, make_receiver, make_sender
from kv_transfer.transports.faulty import Fault, FaultySender
from messages.codec import pack_tokens
from messages.common import Generation, Ticket, WorkerAddress
from messages.decode_to_prefill import CancelTransfer, TransferAcked
from messages.ids import Address, Epoch, WorkerId
from messages.prefill_to_decode import EndTransfer, FirstToken, OpenTransfer
from messages.sampling import SamplingParams
from tests.kv_transfer.kv_pair import ALL, key, scattered, shard_of_bytes

COUNT = 24
TIMEOUTS = TransferTimeouts()
PREFILL, DECODE = Address("tcp://prefill"), Address("tcp://decode")


class Relay:
    """One hand-over: the transports' threads report into a queue, and time passes when nothing happens."""

    def __init__(self, transport: str, block_bytes: int, faults: Iterable[Fault], seed: int) -> None:
        self.here, self.there = (allocate_pool(transport, 64, block_bytes) for _ in range(2))
        self.here.pool[:] = np.random.default_rng(seed).integers(0, 256, self.here.pool.shape, np.uint8)
        self.there.pool[:] = 7
        self.source, self.target = scattered(seed, COUNT), scattered(seed + 1, COUNT)
        self.events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        shard = shard_of_bytes(block_bytes)
        self.receiver = make_receiver(transport, "127.0.0.1", self.there, shard, lambda e: self.post("decode", e))
        self.sender = FaultySender(
            self.here.pool, lambda pool, report: make_sender(transport, pool, shard, report),
            lambda event: self.post("prefill", event), faults, Random(seed),
        )  # fmt: skip
        generation = Generation(pack_tokens([1]), SamplingParams(max_tokens=4))
        order = OpenTransfer(
            *key(), WorkerAddress(WorkerId("p"), Epoch(1), PREFILL), Address("tcp://gateway"), generation, transport,
            (shard,), (), Ticket(WorkerId("p"), Epoch(1), WorkerId("d"), Epoch(1), b"m" * 32),
        )  # fmt: skip
        route = Route((self.receiver.endpoint,), plan_lanes([shard], [shard]))
        self.prefill = SendSession(key(), order, route, TIMEOUTS)
        self.decode = ReceiveSession(key(), DECODE, self.target, 0, route, self.receiver.one_sided, TIMEOUTS)
        self.ended: dict[str, Ended] = {}
        self.now = 0.0

    def post(self, to: str, event: Any) -> None:
        self.events.put((to, event))

    def perform(self, who: str, actions: Iterable[Any]) -> None:
        for action in actions:
            match action:
                case Ended():
                    assert who not in self.ended
                    self.ended[who] = action
                case Push(of, route, first, source, target):
                    self.sender.push(of, route.to[0], ALL, first, source, target)
                case CancelPushes():
                    self.sender.cancel(action.key)
                case OpenLanding():
                    self.receiver.open(action.key, action.first, action.blocks, (ALL,))
                    self.perform(who, self.decode.handle(LandingOpened(action.key), self.now))
                case CloseLanding():
                    self.receiver.close(action.key)
                case TakeDigests(of, _, first, blocks):
                    pool = (self.here if who == "prefill" else self.there).pool
                    self.post(who, Digested(of, first, digests(pool, blocks, of, first)))
                case OpenTransfer():
                    self.perform("decode", self.decode.accept(self.now))
                case message:
                    self.post("decode" if who == "prefill" else "prefill", message)

    def run(self, chunks: int) -> None:
        """From the first chunk to the end of both sessions."""
        self.perform("prefill", self.prefill.open(self.now))
        for ready in range(COUNT // chunks, COUNT + 1, COUNT // chunks):
            self.perform("prefill", self.prefill.computed(self.source, ready, self.now))
            self.turn()
        self.perform("prefill", self.prefill.end(FirstToken(42), self.now))
        while len(self.ended) < 2:
            assert self.now < 300, "the hand-over does not end"
            self.turn()

    def turn(self) -> None:
        try:
            who, event = self.events.get(timeout=0.05)
        except queue.Empty:
            self.now += TIMEOUTS.resend
            self.perform("prefill", self.prefill.tick(self.now))
            self.perform("decode", self.decode.tick(self.now))
        else:
            if who == "decode" and who in self.ended and isinstance(event, EndTransfer):  # the worker remembers
                done = self.ended[who].outcome is Outcome.DONE
                self.post("prefill", TransferAcked(*key()) if done else CancelTransfer(*key(), DECODE, "it failed"))
                return
            session: Any = self.prefill if who == "prefill" else self.decode
            self.perform(who, session.handle(event, self.now))

    def close(self) -> None:
        self.sender.shutdown()
        self.receiver.shutdown()
        self.here.release()
        self.there.release()


def hand_over(transport: str, block_bytes: int, faults: list[Fault], seed: int, chunks: int = 4) -> set[Outcome]:
    relay = Relay(transport, block_bytes, faults, seed)
    try:
        relay.run(chunks)
        if relay.ended["decode"].outcome is Outcome.DONE:
            np.testing.assert_array_equal(relay.there.pool[relay.target], relay.here.pool[relay.source])
        assert (np.delete(relay.there.pool, relay.target, axis=0) == 7).all()
        return {ended.outcome for ended in relay.ended.values()}
    finally:
        relay.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("block_bytes", [512, 100_000])
def test_a_hand_over_without_faults_is_done(transport: str, block_bytes: int) -> None:
    assert hand_over(transport, block_bytes, [], seed=1) == {Outcome.DONE}


SPOILT = [Fault.DROP, Fault.DUPLICATE, Fault.CORRUPT, Fault.SWAP, Fault.DELAY]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("fault", SPOILT)
def test_a_push_that_is_lost_repeated_late_or_spoiled_is_made_good(transport: str, fault: Fault) -> None:
    for place in range(3):
        faults = [Fault.NONE] * place + [fault]
        assert hand_over(transport, 2048, faults, seed=place) == {Outcome.DONE}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_mixture_of_faults_lets_a_wrong_block_through(transport: str) -> None:
    rng = Random(3)
    for seed in range(12):
        faults = rng.choices([Fault.NONE, *SPOILT[:-1]], k=12)
        assert len(hand_over(transport, 2048, faults, seed)) == 1, "the two sides differ"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_link_that_spoils_everything_ends_in_failure_on_both_sides(transport: str) -> None:
    for fault in (Fault.DROP, Fault.CORRUPT, Fault.FAIL):
        outcomes = hand_over(transport, 2048, [fault] * 500, seed=1)
        assert outcomes and Outcome.DONE not in outcomes, fault


def test_chunks_of_any_number_make_one_hand_over() -> None:
    for fewer, more in pairwise((1, 2, 3, 6, 24)):
        assert hand_over("inproc", 512, [], seed=fewer, chunks=more) == {Outcome.DONE}

"""Promise: whatever a link does, a hand-over ends once, and decode reads only blocks that are verified.

Both session cores run over a simulated link that loses, repeats and reorders messages, and over a simulated one-copy
transport that may corrupt what it moves. Time is a number.
"""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.core.digest import digests
from kv_transfer.core.events import Cancelled, Landed, Pushed, TransferKey
from kv_transfer.core.lanes import Route, plan_lanes
from kv_transfer.core.receiving import ReceiveSession, ReceiveState
from kv_transfer.core.sending import SendSession, SendState
from kv_transfer.core.session import (
    CancelPushes,
    CloseLanding,
    Digested,
    Ended,
    LandingOpened,
    LookForWriters,
    OpenLanding,
    Outcome,
    Push,
    TakeDigests,
    TransferTimeouts,
    WritersGone,
)
from messages.codec import pack_tokens, unpack_tokens
from messages.common import Generation, KVEndpoint, Ticket, WorkerAddress
from messages.decode_to_prefill import BlocksWanted, CancelTransfer, TransferAccepted, TransferRefused
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.prefill_to_decode import EndTransfer, FirstToken, OpenTransfer, TransferClosed
from messages.sampling import SamplingParams
from tests.kv_transfer.kv_pair import shard_of_bytes

KEY = TransferKey(RequestId("f" * 32), Attempt(1))
PREFILL, DECODE = Address("tcp://prefill"), Address("tcp://decode")
SHARD = shard_of_bytes(32)
ENDPOINT = KVEndpoint("test", "nowhere", SHARD, 64)
ROUTE = Route((ENDPOINT,), plan_lanes([SHARD], [SHARD]))
TIMEOUTS = TransferTimeouts()
BLOCK_BYTES = 32


def landing(receiver: ReceiveSession) -> None:
    """From here on the sender may write."""
    receiver.accept(0.0)
    (accepted,) = receiver.handle(LandingOpened(KEY), 0.0)
    assert isinstance(accepted, TransferAccepted)


def open_message() -> OpenTransfer:
    return OpenTransfer(
        request=KEY.request,
        attempt=KEY.attempt,
        prefill=WorkerAddress(WorkerId("p"), Epoch(1), PREFILL),
        gateway=Address("tcp://gateway"),
        generation=Generation(pack_tokens([1]), SamplingParams(max_tokens=4)),
        transport="test",
        ranks=(),
        ticket=Ticket(WorkerId("p"), Epoch(1), WorkerId("d"), Epoch(1), b"m" * 32),
    )


class World:
    """One sender and one receiver, a pool each, and everything that is on its way between them."""

    def __init__(
        self, blocks: int, rng: random.Random, *, one_sided: bool, loss: float = 0.0, corrupt: int = 0
    ) -> None:
        self.rng, self.loss, self.corrupt, self.one_sided = rng, loss, corrupt, one_sided
        self.now = 0.0
        self.here = np.array([[rng.randrange(256) for _ in range(BLOCK_BYTES)] for _ in range(64)], np.uint8)
        self.there = np.zeros((64, BLOCK_BYTES), np.uint8)
        self.source = np.array(rng.sample(range(64), blocks), np.int32)
        self.target = np.array(rng.sample(range(64), blocks), np.int32)
        self.sender = SendSession(KEY, open_message(), ROUTE, TIMEOUTS)
        self.receiver: ReceiveSession | None = None
        self.transit: list[tuple[str, Any]] = []
        self.open_rows: dict[int, int] = {}
        self.ended: dict[str, list[Ended]] = {"sender": [], "receiver": []}
        self.writes_after_release = 0
        self.coming = self.final = blocks
        """Leading blocks that the step makes final, and that are."""

    def post(self, to: str, event: Any, *, lossy: bool) -> None:
        if lossy and self.rng.random() < self.loss:
            return
        self.transit.append((to, event))
        if lossy and self.rng.random() < self.loss / 2:
            self.transit.append((to, event))

    def perform(self, who: str, actions: Iterable[Any]) -> None:
        peer = "receiver" if who == "sender" else "sender"
        for action in actions:
            match action:
                case Ended():
                    self.ended[who].append(action)
                case Push(_, _, first, source, _, live):
                    assert first + len(source) <= (self.coming if live else self.final)
                    self.transit.append(("transport", action))
                case CancelPushes():
                    pushes = [entry for entry in self.transit if entry[0] == "transport"]
                    self.transit = [entry for entry in self.transit if entry not in pushes]
                    self.post("sender", Cancelled(KEY), lossy=False)
                case TakeDigests(key, _, first, blocks):
                    pool = self.here if who == "sender" else self.there
                    assert who == "receiver" or first + len(blocks) <= self.final
                    self.post(who, Digested(key, first, digests(pool, blocks, key, first)), lossy=False)
                case OpenLanding(_, _, first, blocks):
                    self.open_rows = {first + place: int(block) for place, block in enumerate(blocks)}
                    self.post("receiver", LandingOpened(KEY), lossy=False)
                case CloseLanding():
                    if not self.one_sided:
                        self.open_rows = {}
                case message:
                    self.post(peer, message, lossy=True)

    def deliver(self) -> None:
        """One thing that is on its way arrives, any one of them."""
        to, event = self.transit.pop(self.rng.randrange(len(self.transit)))
        if to == "transport":
            self.copy(event)
        elif to == "sender":
            self.perform("sender", self.sender.handle(event, self.now))
        elif isinstance(event, OpenTransfer) and self.receiver is None:
            self.receiver = ReceiveSession(KEY, DECODE, self.target, 0, ROUTE, self.one_sided, TIMEOUTS)
            self.perform("receiver", self.receiver.accept(self.now))
        elif self.receiver is not None:
            self.perform("receiver", self.receiver.handle(event, self.now))

    def copy(self, push: Push) -> None:
        indices = np.arange(push.first, push.first + len(push.source), dtype=np.int32)
        released = any(ended.outcome is not Outcome.DONE for ended in self.ended["receiver"])
        for place, source, target in zip(indices, push.source, push.target, strict=True):
            if not self.one_sided and int(place) not in self.open_rows:
                continue
            self.writes_after_release += released
            self.there[target] = self.here[source]
            if self.corrupt and self.rng.random() < 0.5:
                self.corrupt -= 1
                self.there[target, self.rng.randrange(BLOCK_BYTES)] ^= 1
        self.post("sender", Pushed(KEY, push.first, len(push.source)), lossy=False)
        if not self.one_sided:
            self.post("receiver", Landed(KEY, indices), lossy=False)

    def tick(self) -> None:
        self.now += 0.25
        self.perform("sender", self.sender.tick(self.now))
        if self.receiver is not None:
            self.perform("receiver", self.receiver.tick(self.now))

    def run(self, until: float = 300.0) -> None:
        while self.now < until and not (self.ended["sender"] and (self.receiver is None or self.ended["receiver"])):
            if self.transit and self.rng.random() < 0.9:
                self.deliver()
            else:
                self.tick()

    def prefill(self, chunks: int) -> None:
        """Compute in so many chunks, with time and messages between them."""
        truth, self.final = self.here.copy(), 0
        self.here[self.source] ^= 0xFF
        self.perform("sender", self.sender.open(self.now))
        for chunk in range(1, chunks + 1):
            self.coming = ready = len(self.source) * chunk // chunks
            self.perform("sender", self.sender.computing(self.source, ready, self.now))
            self.here[self.source[:ready]] = truth[self.source[:ready]]
            self.final = ready
            self.perform("sender", self.sender.computed(self.source, ready, self.now))
            for _ in range(self.rng.randrange(4)):
                if self.transit:
                    self.deliver()
        self.perform("sender", self.sender.end(FirstToken(42), self.now))


@pytest.mark.parametrize("one_sided", [True, False])
def test_a_good_link_moves_every_block_once(one_sided: bool) -> None:
    world = World(7, random.Random(0), one_sided=one_sided)
    world.prefill(3)
    world.run()
    assert [ended.outcome for ended in world.ended["sender"] + world.ended["receiver"]] == [Outcome.DONE] * 2
    assert (world.there[world.target] == world.here[world.source]).all()
    assert world.receiver is not None and world.receiver.first == FirstToken(42)


@settings(max_examples=600)
@given(
    seed=st.integers(0, 2**32),
    blocks=st.integers(1, 20),
    chunks=st.integers(1, 5),
    one_sided=st.booleans(),
    loss=st.sampled_from([0.0, 0.1, 0.4]),
    corrupt=st.integers(0, 3),
)
def test_whatever_the_link_does_a_transfer_ends_once_and_only_true_blocks_are_read(
    seed: int, blocks: int, chunks: int, one_sided: bool, loss: float, corrupt: int
) -> None:
    world = World(blocks, random.Random(seed), one_sided=one_sided, loss=loss, corrupt=corrupt)
    world.prefill(chunks)
    world.run()
    assert len(world.ended["sender"]) == 1
    assert world.sender.state is SendState.CLOSED
    if world.receiver is not None:
        assert len(world.ended["receiver"]) <= 1
        if any(ended.outcome is Outcome.DONE for ended in world.ended["receiver"]):
            assert (world.there[world.target] == world.here[world.source]).all()
        if world.ended["sender"][0].outcome is Outcome.DONE:
            assert world.ended["receiver"][0].outcome is Outcome.DONE


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32), one_sided=st.booleans(), loss=st.sampled_from([0.0, 0.3]), after=st.integers(0, 12))
def test_a_receiver_that_gives_up_frees_no_block_that_could_still_be_written(
    seed: int, one_sided: bool, loss: float, after: int
) -> None:
    world = World(8, random.Random(seed), one_sided=one_sided, loss=loss)
    world.prefill(4)
    for _ in range(after):
        if world.transit:
            world.deliver()
    if world.receiver is not None and world.receiver.state is not ReceiveState.CLOSED:
        world.perform("receiver", world.receiver.give_up("the client is gone", now=world.now))
        if one_sided and world.ended["receiver"] == []:
            assert world.receiver.state is ReceiveState.QUARANTINED
    world.run()
    assert world.writes_after_release == 0


@pytest.mark.parametrize("release", ["confirmed", "dead", "process gone"])
def test_blocks_stay_in_quarantine_until_the_sender_confirms_or_is_gone(release: str) -> None:
    receiver = ReceiveSession(KEY, DECODE, np.arange(3, dtype=np.int32), 0, ROUTE, True, TIMEOUTS, (ENDPOINT,))
    landing(receiver)
    actions = receiver.give_up("the client is gone", now=1.0)
    assert [type(action) for action in actions] == [CloseLanding, CancelTransfer]
    assert [type(action) for action in receiver.tick(10.0)] == [CancelTransfer, LookForWriters]
    match release:
        case "confirmed":
            end = receiver.handle(TransferClosed(KEY.request, KEY.attempt, "stopped", Epoch(1)), 11.0)
        case "dead":
            assert [type(action) for action in receiver.peer_lost(dead=True, now=11.0)] == [
                CloseLanding,
                LookForWriters,
            ]
            assert [type(action) for action in receiver.tick(20.0)] == [LookForWriters], "no one hears a cancel"
            end = receiver.handle(WritersGone(KEY), 21.0)
        case _:
            end = receiver.handle(WritersGone(KEY), 11.0)
    assert Ended in [type(action) for action in end]


@pytest.mark.parametrize("state", ["landing", "quarantined"])
def test_a_sender_that_is_only_silent_ends_no_quarantine(state: str) -> None:
    """It may be in the middle of a step, and push when it is over."""
    receiver = ReceiveSession(KEY, DECODE, np.arange(3, dtype=np.int32), 0, ROUTE, True, TIMEOUTS)
    landing(receiver)
    if state == "quarantined":
        receiver.give_up("the client is gone", now=1.0)
    receiver.peer_lost(dead=False, now=5.0)
    assert receiver.state is ReceiveState.QUARANTINED
    (end,) = (action for action in receiver.peer_lost(dead=True, now=9.0) if isinstance(action, Ended))
    assert end.outcome is (Outcome.FAILED if state == "landing" else Outcome.CLOSED)


def test_what_a_silent_sender_still_writes_harms_nobody_where_the_receiver_writes_itself() -> None:
    receiver = ReceiveSession(KEY, DECODE, np.arange(3, dtype=np.int32), 0, ROUTE, False, TIMEOUTS)
    receiver.accept(0.0)
    assert Ended in [type(action) for action in receiver.peer_lost(dead=False, now=5.0)]


def test_an_open_that_nobody_answers_fails_in_time() -> None:
    sender = SendSession(KEY, open_message(), ROUTE, TIMEOUTS)
    assert sender.open(0.0) == [open_message()]
    assert sender.tick(0.4) == []
    assert sender.tick(0.6) == [open_message()]
    ended = sender.tick(TIMEOUTS.open + 1)[-1]
    assert isinstance(ended, Ended) and ended.outcome is Outcome.FAILED


def test_a_refusal_says_whether_another_pair_may_help() -> None:
    for retryable in (True, False):
        sender = SendSession(KEY, open_message(), ROUTE, TIMEOUTS)
        sender.open(0.0)
        refused = TransferRefused(KEY.request, KEY.attempt, retryable, "full")
        assert sender.handle(refused, 0.1) == [Ended(KEY, Outcome.REFUSED, "full", retryable)]


def test_a_sender_that_is_cancelled_waits_for_its_transport_before_it_lets_go() -> None:
    world = World(4, random.Random(1), one_sided=True)
    world.perform("sender", world.sender.open(0.0))
    world.perform("sender", world.sender.computed(world.source, 4, 0.0))
    while not any(to == "transport" for to, _ in world.transit):
        world.deliver()
    assert world.sender.give_up("gone") == [CancelPushes(KEY, "test")]
    assert world.sender.state is SendState.CLOSING
    kinds = [type(action) for action in world.sender.handle(Cancelled(KEY), 0.1)]
    assert kinds == [TransferClosed, Ended]


def test_a_repair_that_is_asked_for_twice_is_made_once() -> None:
    """A late request for blocks must not have them written again into what decode reads already."""
    world = World(3, random.Random(5), one_sided=True)
    world.prefill(1)
    while world.sender.state is not SendState.ENDING:
        world.deliver()
    wanted = BlocksWanted(KEY.request, KEY.attempt, 1, pack_tokens([1]))
    assert [type(action) for action in world.sender.handle(wanted, world.now)] == [Push]
    (end,) = world.sender.handle(Pushed(KEY, 1, 1), world.now)
    assert isinstance(end, EndTransfer) and end.round == 2
    assert world.sender.handle(wanted, world.now) == []


def test_an_end_from_before_a_repair_is_answered_with_the_repair() -> None:
    receiver = ReceiveSession(KEY, DECODE, np.arange(2, dtype=np.int32), 0, ROUTE, True, TIMEOUTS)
    landing(receiver)
    end = EndTransfer(KEY.request, KEY.attempt, PREFILL, 1, FirstToken(1), 2, b"a" * 8 + b"b" * 8)
    receiver.handle(end, 0.0)
    (wanted,) = receiver.handle(Digested(KEY, 0, b"a" * 8 + b"X" * 8), 0.0)
    assert isinstance(wanted, BlocksWanted) and unpack_tokens(wanted.indices).tolist() == [1]
    assert receiver.handle(end, 0.1) == [wanted]
    assert receiver.repairs == 1


@pytest.mark.parametrize(("gone", "drags"), [(0, True), (1, True), (3, False), (5, False)])
def test_a_hand_over_drags_where_the_rest_would_take_longer_than_there_is_patience_for(gone: int, drags: bool) -> None:
    """Six blocks, a push each; ``gone`` of them leave while there is patience yet."""
    sender = SendSession(KEY, open_message(), ROUTE, TIMEOUTS)
    blocks = np.arange(6, dtype=np.int32)
    sender.open(0.0)
    sender.handle(TransferAccepted(KEY.request, KEY.attempt, pack_tokens(blocks), 0), 0.0)
    for ready in range(1, 7):
        sender.computed(blocks, ready, 0.5)
    sender.end(FirstToken(42), 1.0, patience=2.0)
    for first in range(gone):
        sender.handle(Pushed(KEY, first, 1), 1.5)
    assert not sender.drags(2.9)
    assert sender.wake_at <= 3.0 and sender.drags(3.0) is drags


def test_who_looks_late_looks_again_before_a_hand_over_is_said_to_drag() -> None:
    """The process may have stood still, and the pushes with it."""
    blocks = np.arange(6, dtype=np.int32)
    for gone, drags in ((0, True), (6, False)):
        sender = SendSession(KEY, open_message(), ROUTE, TIMEOUTS)
        sender.open(0.0)
        sender.handle(TransferAccepted(KEY.request, KEY.attempt, pack_tokens(blocks), 0), 0.0)
        sender.computed(blocks, 6, 0.5)
        sender.end(FirstToken(42), 1.0, patience=2.0)
        assert not sender.drags(4.0) and sender.wake_at == 4.5
        if gone:
            sender.handle(Pushed(KEY, 0, gone), 4.1)
        assert sender.drags(4.5) is drags


def test_a_hand_over_that_waits_for_room_does_not_drag() -> None:
    sender = SendSession(KEY, open_message(), ROUTE, TIMEOUTS)
    blocks = np.arange(6, dtype=np.int32)
    sender.open(0.0)
    sender.computed(blocks, 6, 0.5)
    sender.end(FirstToken(42), 1.0, patience=2.0)
    assert not sender.drags(9.0)
    sender.handle(TransferAccepted(KEY.request, KEY.attempt, pack_tokens(blocks), 0), 10.0)
    assert not sender.drags(11.9)
    assert sender.drags(12.0), "nothing has left"


def test_where_only_a_digest_is_missing_a_hand_over_does_not_drag_and_nobody_is_woken_for_it_again_and_again() -> None:
    sender = SendSession(KEY, open_message(), ROUTE, TIMEOUTS)
    blocks = np.arange(6, dtype=np.int32)
    sender.open(0.0)
    sender.handle(TransferAccepted(KEY.request, KEY.attempt, pack_tokens(blocks), 0), 0.0)
    sender.computed(blocks, 6, 0.5)
    sender.end(FirstToken(42), 1.0, patience=2.0)
    sender.handle(Pushed(KEY, 0, 6), 1.5)
    assert not sender.drags(3.0) and sender.wake_at > 3.0


def test_a_repair_has_patience_of_its_own() -> None:
    world = World(3, random.Random(5), one_sided=True)
    world.perform("sender", world.sender.open(0.0))
    world.deliver()
    blocks = world.source
    world.sender.computed(blocks, 3, world.now)
    world.sender.end(FirstToken(42), world.now, patience=2.0)
    while world.sender.state is not SendState.ENDING:
        world.deliver()
    late = world.now + 5.0
    world.sender.handle(BlocksWanted(KEY.request, KEY.attempt, 1, pack_tokens([1])), late)
    assert not world.sender.drags(late + 1.9)
    assert world.sender.drags(late + 2.0)

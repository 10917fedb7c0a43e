"""Promise: a block is pushed once, live where decode accepts before its step or in it, and hashed when it is final."""

from typing import Any

import numpy as np
import pytest

from kv_transfer.core.digest import DIGEST_BYTES
from kv_transfer.core.events import Cancelled, Live, Pushed, PushFailed
from kv_transfer.core.sending import SendSession, SendState
from kv_transfer.core.session import CancelPushes, Digested, Ended, Outcome, Push, TakeDigests, TransferTimeouts
from messages.codec import pack_tokens
from messages.decode_to_prefill import BlocksWanted, TransferAccepted, TransferAcked
from messages.prefill_to_decode import EndTransfer, FirstToken
from tests.kv_transfer.test_session import KEY, ROUTE, open_message

SOURCE = np.arange(10, 18, dtype=np.int32)
TARGET = np.arange(30, 38, dtype=np.int32)
FIRST = FirstToken(42)


class Sender:
    """A session, and what it has asked for, by first block and count."""

    def __init__(self) -> None:
        self.session = SendSession(KEY, open_message(), ROUTE, TransferTimeouts())
        self.now = 0.0
        self.pushes: list[tuple[int, int, Live]] = []
        self.hashed: list[tuple[int, int]] = []
        self.others: list[Any] = []
        self.take(self.session.open(self.now))

    def take(self, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Push(_, _, first, source, target, live):
                    self.pushes.append((first, len(source), live))
                    assert (target - TARGET[0] == source - SOURCE[0]).all()
                case TakeDigests(_, _, first, blocks):
                    self.hashed.append((first, len(blocks)))
                case _:
                    self.others.append(action)

    def accept(self, cached: int = 0, blocks: Any = TARGET) -> None:
        self.handle(TransferAccepted(*KEY, pack_tokens(blocks[cached:]), cached))

    def step(self, ready: int, *, during: Any = lambda: None) -> None:
        """A step that makes so many blocks final, of one second, and what comes ``during`` it."""
        self.take(self.session.computing(SOURCE, ready, self.now))
        during()
        self.now += 1
        self.take(self.session.computed(SOURCE, ready, self.now))

    def handle(self, event: Any) -> None:
        self.take(self.session.handle(event, self.now))

    def answer(self, at: float | None = None) -> None:
        """Everything that was asked for is done."""
        for first, count, _ in self.pushes:
            self.handle(Pushed(KEY, first, count, count * 100, count * 60, self.now if at is None else at))
        for first, count in self.hashed:
            self.handle(Digested(KEY, first, bytes([first]) * (count * DIGEST_BYTES)))


def ends(sender: Sender) -> list[EndTransfer]:
    return [each for each in sender.others if isinstance(each, EndTransfer)]


def test_what_a_step_will_finish_is_pushed_before_it_and_hashed_after_it() -> None:
    sender = Sender()
    sender.accept()
    sender.take(sender.session.computing(SOURCE, 3, 0.0))
    assert sender.pushes == [(0, 3, Live.NEXT)] and sender.hashed == []
    sender.take(sender.session.computed(SOURCE, 3, 1.0))
    sender.step(3)  # which finishes no block
    sender.step(8)
    assert sender.pushes == [(0, 3, Live.NEXT), (3, 5, Live.NEXT)]
    assert sender.hashed == [(0, 3), (3, 5)]


def test_an_accept_that_comes_between_two_steps_has_what_is_final_pushed_whole() -> None:
    sender = Sender()
    sender.step(3)
    sender.accept()
    assert sender.pushes == [(0, 3, Live.NO)]
    sender.step(8)
    assert sender.pushes == [(0, 3, Live.NO), (3, 5, Live.NEXT)]
    assert sender.hashed == [(0, 3), (3, 5)]


def test_an_accept_that_comes_during_a_step_has_its_blocks_pushed_in_that_step_and_hashed_after_it() -> None:
    sender = Sender()

    def accept() -> None:
        sender.accept()
        assert sender.pushes == [(0, 3, Live.RUNNING)] and sender.hashed == []

    sender.step(3, during=accept)
    assert sender.hashed == [(0, 3)]
    sender.step(8)
    assert sender.pushes == [(0, 3, Live.RUNNING), (3, 5, Live.NEXT)]
    assert sender.hashed == [(0, 3), (3, 5)]


def test_what_was_final_before_the_step_of_the_accept_goes_whole_ahead_of_what_the_step_makes_final() -> None:
    sender = Sender()
    sender.step(3)
    sender.step(8, during=sender.accept)
    assert sender.pushes == [(0, 3, Live.NO), (3, 5, Live.RUNNING)]
    assert sender.hashed == [(0, 3), (3, 5)]


@pytest.mark.parametrize("cached", [0, 2, 3, 6, 8])
def test_of_a_prompt_of_one_step_all_that_decode_lacks_leaves_in_that_step(cached: int) -> None:
    sender = Sender()
    sender.step(8, during=lambda: sender.accept(cached))
    sender.take(sender.session.end(FIRST, sender.now))
    assert sender.pushes == [(cached, 8 - cached, Live.RUNNING)] * (cached < 8)
    sender.answer()
    assert [end.num_blocks for end in ends(sender)] == [8 - cached]


def test_an_accept_that_comes_twice_during_a_step_pushes_once() -> None:
    sender = Sender()
    sender.step(8, during=lambda: [sender.accept(), sender.accept()])
    assert sender.pushes == [(0, 8, Live.RUNNING)] and sender.hashed == [(0, 8)]


def test_an_accept_that_comes_after_the_prompt_has_all_of_it_pushed_whole() -> None:
    sender = Sender()
    sender.step(3)
    sender.step(8)
    sender.take(sender.session.end(FIRST, sender.now))
    sender.accept()
    assert sender.pushes == [(0, 8, Live.NO)] and sender.hashed == [(0, 8)] and not ends(sender)
    sender.answer()
    assert [end.num_blocks for end in ends(sender)] == [8]


@pytest.mark.parametrize("cached", [2, 3, 5, 8])
def test_what_decode_has_cached_is_neither_pushed_nor_hashed(cached: int) -> None:
    sender = Sender()
    sender.step(3)
    sender.accept(cached)
    sender.step(8)
    whole, live = max(0, 3 - cached), 8 - max(3, cached)
    assert sender.pushes == [(cached, whole, Live.NO)] * (whole > 0) + [(max(3, cached), live, Live.NEXT)] * (live > 0)
    assert sender.hashed == [(first, count) for first, count, _ in sender.pushes]
    sender.take(sender.session.end(FIRST, sender.now))
    sender.answer()
    assert [end.num_blocks for end in ends(sender)] == [8 - cached]
    assert sender.session.trace.cached_blocks == cached and sender.session.trace.num_blocks == 8 - cached


def test_nothing_ends_before_a_live_push_is_through_and_its_blocks_are_hashed() -> None:
    sender = Sender()
    sender.accept()
    sender.step(8)
    sender.take(sender.session.end(FIRST, sender.now))
    sender.handle(Digested(KEY, 0, bytes(8 * DIGEST_BYTES)))
    assert not ends(sender)
    sender.handle(Pushed(KEY, 0, 8))
    assert len(ends(sender)) == 1


def test_a_push_that_is_through_before_the_step_is_told_of_ends_nothing() -> None:
    sender = Sender()
    sender.accept()
    sender.take(sender.session.computing(SOURCE, 8, 0.0))
    sender.handle(Pushed(KEY, 0, 8))
    assert sender.session.state is SendState.PUSHING and not ends(sender)
    sender.take(sender.session.computed(SOURCE, 8, 1.0))
    sender.take(sender.session.end(FIRST, 1.0))
    sender.handle(Digested(KEY, 0, bytes(8 * DIGEST_BYTES)))
    assert len(ends(sender)) == 1


@pytest.mark.parametrize("during", [False, True], ids=["accepted before", "accepted in it"])
@pytest.mark.parametrize("says", ["the machine", "the transport"])
def test_a_step_that_fails_can_never_be_ended(says: str, during: bool) -> None:
    sender = Sender()
    if not during:
        sender.accept()
    sender.step(3)
    sender.take(sender.session.computing(SOURCE, 8, sender.now))
    if during:
        sender.accept()
    if says == "the machine":
        sender.take(sender.session.give_up("the step failed", Outcome.FAILED))
    else:
        sender.handle(PushFailed(KEY, "the step failed"))
    assert CancelPushes(KEY, ROUTE.transport) in sender.others
    sender.answer()
    sender.take(sender.session.computed(SOURCE, 8, sender.now))
    sender.take(sender.session.end(FIRST, sender.now))
    sender.handle(Cancelled(KEY))
    assert not ends(sender) and Ended(KEY, Outcome.FAILED, "the step failed") in sender.others
    how = (Live.NO, Live.RUNNING) if during else (Live.NEXT, Live.NEXT)
    assert sender.pushes == [(0, 3, how[0]), (3, 5, how[1])] and sender.hashed == [(0, 3)]


def test_a_block_that_went_live_is_repaired_whole() -> None:
    sender = Sender()
    sender.accept()
    sender.step(8)
    sender.take(sender.session.end(FIRST, sender.now))
    sender.answer()
    sender.handle(BlocksWanted(*KEY, 1, pack_tokens(np.array([2, 3, 6], np.int32))))
    assert sender.pushes[1:] == [(2, 2, Live.NO), (6, 1, Live.NO)]
    sender.handle(Pushed(KEY, 2, 2, 200))
    sender.handle(Pushed(KEY, 6, 1, 100))
    assert [end.round for end in ends(sender)] == [1, 2]
    assert ends(sender)[0].digests == ends(sender)[1].digests
    assert sender.session.trace.repairs == 1 and sender.session.trace.num_bytes == 800 + 300


@pytest.mark.parametrize("during", [False, True], ids=["accepted before", "accepted in it"])
def test_room_for_too_few_blocks_fails_before_anything_is_pushed(during: bool) -> None:
    sender = Sender()
    if not during:
        sender.accept(blocks=TARGET[:5])
    sender.step(8, during=lambda: sender.accept(blocks=TARGET[:5]) if during else None)
    assert sender.pushes == [] and CancelPushes(KEY, ROUTE.transport) in sender.others


def test_a_step_may_take_longer_than_a_transfer_may_stand_still() -> None:
    sender = Sender()
    sender.accept()
    sender.take(sender.session.computing(SOURCE, 8, 0.0))
    sender.take(sender.session.tick(1000.0))
    sender.take(sender.session.computed(SOURCE, 8, 1000.0))
    sender.take(sender.session.tick(1005.0))
    assert sender.session.state is SendState.PUSHING
    sender.take(sender.session.tick(1011.0))
    assert sender.session.state is SendState.CLOSING


def test_the_trace_tells_what_left_behind_the_prompt() -> None:
    sender = Sender()
    sender.step(2)
    sender.accept()  # pushed whole, and through before the prompt is
    sender.step(4)
    sender.step(8)
    sender.take(sender.session.end(FIRST, sender.now))
    sender.handle(Pushed(KEY, 0, 2, 200, 0, 1.5))
    sender.handle(Pushed(KEY, 2, 2, 200, 180, 2.1))
    sender.handle(Pushed(KEY, 4, 4, 400, 300, 3.2))
    for first, count in sender.hashed:
        sender.handle(Digested(KEY, first, bytes(count * DIGEST_BYTES)))
    sender.now = 4.0
    sender.handle(TransferAcked(*KEY))
    trace = sender.session.trace
    assert (trace.opened, trace.accepted, trace.computed, trace.acked) == (0.0, 1.0, 3.0, 4.0)
    assert (trace.first_push, trace.last_byte) == (1.0, 3.2)
    assert [push.hidden_bytes for push in trace.pushes] == [200, 200, 300]
    assert (trace.num_bytes, trace.hidden_bytes, trace.share_hidden) == (800, 700, 0.875)

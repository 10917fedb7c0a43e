"""Promise: a test of a hand-over moves free blocks only, leaves nothing, and gives way to traffic."""

from typing import Any

import numpy as np
import pytest

from decode_worker.core.machine import DecodeMachine
from kv_transfer.core.digest import DIGEST_BYTES
from kv_transfer.core.events import Cancelled, Pushed
from kv_transfer.core.session import CancelPushes, CloseLanding, Digested, LandingOpened, OpenLanding, Push, TakeDigests
from messages.ids import RequestId
from prefill_worker.core.machine import PrefillMachine
from runtime.core.actions import Send
from runtime.core.probe import ProbeEnded, ProbeStopped, ProbeWanted
from tests.workers.test_machines import DECODE, OPEN, decode, prefill, sent  # noqa: F401

PROBE = RequestId("probe-1")


def wanted(blocks: int = 2) -> ProbeWanted:
    return ProbeWanted(PROBE, DECODE, blocks)


class Link:
    """Both machines, and a transport that does all at once."""

    def __init__(self, prefill: PrefillMachine, decode: DecodeMachine) -> None:  # noqa: F811
        self.prefill, self.decode = prefill, decode
        self.now = 0.0
        self.ended: list[ProbeEnded] = []

    def perform(self, machine: Any, actions: list[Any]) -> None:
        """Everything that follows from ``actions`` of ``machine``."""
        other = self.decode if machine is self.prefill else self.prefill
        for action in actions:
            self.now += 0.5
            match action:
                case Send(to, message) if to in (DECODE.mailbox, OPEN.prefill.mailbox):
                    self.perform(other, other.handle(message, self.now))
                    plan, more = self.decode.schedule(self.now)
                    assert plan is None, "there is nothing to compute"
                    self.perform(self.decode, more)
                case Push(key, first=first, source=source):
                    pushed = Pushed(key, first, len(source), 64 * len(source), 0, self.now)
                    self.perform(machine, machine.handle(pushed, self.now))
                case TakeDigests(key, first=first, blocks=blocks):
                    digested = Digested(key, first, bytes(DIGEST_BYTES * len(blocks)))
                    self.perform(machine, machine.handle(digested, self.now))
                case OpenLanding(key):
                    self.perform(machine, machine.handle(LandingOpened(key), self.now))
                case CancelPushes(key):
                    self.perform(machine, machine.handle(Cancelled(key), self.now))
                case CloseLanding():
                    pass
                case ProbeEnded():
                    self.ended.append(action)
                case _:
                    raise AssertionError(action)

    def check_idle(self) -> None:
        for machine in (self.prefill, self.decode):
            machine.check_integrity()
            figures = machine.inspect()
            assert (figures["free"], figures["prefix_cache_queries"]) == (figures["total"], 0)
            assert machine.membership.transfers == 0, "it is no hand-over of anybody's"


@pytest.fixture
def link(prefill: PrefillMachine, decode: DecodeMachine) -> Link:  # noqa: F811
    return Link(prefill, decode)


def test_a_probe_is_moved_verified_acked_and_gone(link: Link) -> None:
    link.perform(link.prefill, link.prefill.handle(wanted(), 0.0))
    (ended,) = link.ended
    assert (ended.request, ended.problem, ended.num_bytes) == (PROBE, "", 128)
    assert ended.answer_seconds > 0 and ended.push_seconds > 0
    assert ended.whole_seconds > ended.answer_seconds
    link.check_idle()


def test_a_sender_without_free_blocks_refuses_to_probe(link: Link) -> None:
    link.perform(link.prefill, link.prefill.handle(wanted(9), 0.0))
    assert "8 free blocks, of the 9 of a probe" in link.ended[0].problem
    link.check_idle()


def test_a_receiver_without_free_blocks_refuses_a_probe_at_once(link: Link) -> None:
    pool = link.decode._pool
    held = pool.allocate(7)
    assert held is not None
    link.perform(link.prefill, link.prefill.handle(wanted(2), 0.0))
    assert link.ended[0].problem == "no free blocks for a probe"
    pool.free(held)
    link.check_idle()


def test_a_probe_does_not_stand_in_line_where_the_batch_may_need_the_room(link: Link) -> None:
    opened = sent(link.prefill.handle(wanted(2), 0.0))[0]
    assert link.decode.handle(opened, 0.0) == []
    refused = link.decode._reservations.admit(1, lambda *_: False, 0.0)
    link.perform(link.decode, refused)
    assert link.ended[0].problem == "no free blocks for a probe"
    link.check_idle()


def test_who_waits_no_longer_gets_the_blocks_back(link: Link) -> None:
    (opened,) = sent(link.prefill.handle(wanted(), 0.0))
    actions = link.prefill.handle(ProbeStopped(PROBE, "nothing came of it"), 1.0)
    (ended,) = [action for action in actions if isinstance(action, ProbeEnded)]
    assert ended.problem == "nothing came of it" and np.isnan(ended.push_seconds)
    assert opened.probe
    link.check_idle()

"""Promise: a test of a hand-over moves blocks that nobody owns, leaves nothing, and gives way to traffic."""

from typing import Any

import numpy as np
import pytest

from kv_transfer.core.digest import DIGEST_BYTES
from kv_transfer.core.events import Cancelled, Pushed
from kv_transfer.core.session import CancelPushes, CloseLanding, Digested, LandingOpened, OpenLanding, Push, TakeDigests
from messages.codec import decoder_for, pack_tokens
from messages.common import Generation
from messages.decode_to_prefill import TransferRefused
from messages.gateway_to_worker import Generate
from messages.ids import Attempt, RequestId
from messages.sampling import SamplingParams
from runtime.core.actions import Send
from runtime.core.probe import ProbeEnded, ProbeStopped, ProbeWanted
from runtime.core.timeline import Timelines
from runtime.mailbox import Mailbox
from runtime.worker import WorkerLoop
from tests.workers.test_machines import DECODE, GATEWAY, OPEN, ORDER, decode, prefill, sent  # noqa: F401
from worker.core.machine import WorkerMachine

PROBE = RequestId("probe-1")


def wanted(blocks: int = 2) -> ProbeWanted:
    return ProbeWanted(PROBE, DECODE, blocks)


class Link:
    """Both machines, and a transport that does all at once."""

    def __init__(self, prefill: WorkerMachine, decode: WorkerMachine) -> None:  # noqa: F811
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
def link(prefill: WorkerMachine, decode: WorkerMachine) -> Link:  # noqa: F811
    return Link(prefill, decode)


def test_a_probe_is_moved_verified_acked_and_gone(link: Link) -> None:
    link.perform(link.prefill, link.prefill.handle(wanted(), 0.0))
    (ended,) = link.ended
    assert (ended.request, ended.problem, ended.num_bytes) == (PROBE, "", 128)
    assert ended.answer_seconds > 0 and ended.push_seconds > 0
    assert ended.whole_seconds > ended.answer_seconds
    link.check_idle()


def test_a_sender_without_room_refuses_to_probe(link: Link) -> None:
    link.perform(link.prefill, link.prefill.handle(wanted(9), 0.0))
    assert link.ended[0].problem == "prefill-0: no room for a probe now"
    link.check_idle()


def test_a_receiver_without_room_refuses_a_probe_at_once(link: Link) -> None:
    pool = link.decode._pool
    held = pool.allocate(7)
    assert held is not None
    link.perform(link.prefill, link.prefill.handle(wanted(2), 0.0))
    assert link.ended[0].problem == "decode-0: no room for a probe now"
    pool.free(held)
    link.check_idle()


def test_a_probe_finds_room_in_pools_that_the_prefix_cache_has_filled(link: Link) -> None:
    names = [bytes([number] * 16) for number in range(8)]
    for machine in (link.prefill, link.decode):
        blocks = machine._pool.allocate(8)
        assert blocks is not None
        for block, name in zip(blocks.tolist(), names, strict=True):
            machine._pool.register(block, name)
        machine._pool.free(blocks)
        assert machine._pool.counts().cached == 8
    for number in range(3):
        probe = ProbeWanted(RequestId(f"probe-{number}"), DECODE, 2)
        link.perform(link.prefill, link.prefill.handle(probe, 0.0))
    assert [ended.problem for ended in link.ended] == [""] * 3
    for machine in (link.prefill, link.decode):
        kept = machine._pool.match(names)
        assert len(kept) == 6, "it took the least recently used, and the same again"
        machine.check_integrity()


def test_a_prompt_that_waits_at_the_sender_comes_before_a_probe(link: Link) -> None:
    link.prefill.handle(ORDER, 0.0)
    link.perform(link.prefill, link.prefill.handle(wanted(1), 0.0))
    assert link.ended[0].problem == "prefill-0: no room for a probe now"


def generate(number: int, tokens: int = 3) -> Generate:
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    return Generate(RequestId(f"{number:032x}"), Attempt(1), GATEWAY, Generation(pack_tokens([1] * tokens), params))


def refused(link: Link) -> list[TransferRefused]:
    """What decode's next turn refuses, of a probe that has come."""
    (opened,) = sent(link.prefill.handle(wanted(1), 0.0))
    assert link.decode.handle(opened, 0.0) == []
    _, actions = link.decode.schedule(0.0)
    return [message for message in sent(actions) if isinstance(message, TransferRefused)]


def test_a_probe_is_refused_at_once_where_as_many_sequences_run_as_may(link: Link) -> None:
    for number in range(4):
        link.decode.handle(generate(number), 0.0)
    assert [(each.request, each.detail) for each in refused(link)] == [(PROBE, "no room for a probe now")]
    assert link.decode.decode._reservations.num_waiting == 0


def test_a_probe_is_refused_at_once_while_sequences_wait_to_run(link: Link) -> None:
    for number in range(5):
        link.decode.handle(generate(number), 0.0)
    assert [each.request for each in refused(link)] == [PROBE]


def test_a_probe_is_refused_at_once_behind_a_transfer_that_waits_for_blocks(link: Link) -> None:
    pool = link.decode._pool
    held = pool.allocate(7)  # room for the probe, none for the transfer in front of it
    assert held is not None
    link.decode.handle(OPEN, 0.0)
    assert [each.request for each in refused(link)] == [PROBE]
    assert link.decode.decode._reservations.num_waiting == 1
    pool.free(held)


def test_a_transfer_behind_a_probe_that_finds_no_room_is_not_kept_by_it(link: Link) -> None:
    pool = link.decode._pool
    held = pool.allocate(6)  # room for the transfer
    assert held is not None
    (opened,) = sent(link.prefill.handle(wanted(3), 0.0))
    link.decode.handle(opened, 0.0)
    link.decode.handle(OPEN, 0.0)
    _, actions = link.decode.schedule(0.0)
    assert [message.request for message in sent(actions)] == [PROBE]
    assert [action.key.request for action in actions if isinstance(action, OpenLanding)] == [OPEN.request]
    pool.free(held)


def test_a_loop_that_hangs_is_not_waited_for_without_end(prefill: WorkerMachine) -> None:  # noqa: F811
    mailbox = Mailbox("127.0.0.1", decoder_for(TransferRefused))
    nothing: Any = None  # a loop that does not run needs no runner and no port
    timelines = Timelines(OPEN.prefill.worker, "clock", prefill.has)
    loop = WorkerLoop(prefill, nothing, mailbox, nothing, timelines)
    with pytest.raises(TimeoutError, match="the step loop does not answer"):
        loop.probe(wanted(), within=0.01)
    assert [type(event) for event in mailbox.receive(0.0)] == [ProbeWanted, ProbeStopped]
    mailbox.close()


def test_who_waits_no_longer_gets_the_blocks_back(link: Link) -> None:
    (opened,) = sent(link.prefill.handle(wanted(), 0.0))
    actions = link.prefill.handle(ProbeStopped(PROBE, "nothing came of it"), 1.0)
    (ended,) = [action for action in actions if isinstance(action, ProbeEnded)]
    assert ended.problem == "nothing came of it" and np.isnan(ended.push_seconds)
    assert opened.probe
    link.check_idle()

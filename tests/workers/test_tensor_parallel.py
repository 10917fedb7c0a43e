"""Promise: a worker of several ranks serves like one of one; what fails on one rank is known to all, and none hangs."""

import queue
import time
from pathlib import Path

import pytest

from engine.core.errors import GroupLost
from messages.common import Role
from messages.ids import Epoch, WorkerId
from messages.leader_to_rank import Dismissed, Step
from messages.sampling import SamplingParams
from messages.seals import seal
from runtime.actor import WorkerActor
from runtime.mailbox import Outbox
from tests.relay_cases import OUTPUT_TOKENS, relay_cases
from tests.workers.relay import KEY, relay_of

GREEDY = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("size", [2, 4])
def test_a_worker_of_several_ranks_answers_as_transformers(tiny_llama: Path, size: int) -> None:
    cases = relay_cases(tiny_llama)[::10]
    with relay_of(tiny_llama, Role.COLOCATED, tensor_parallel=size, prefill_chunk=64) as relay:
        requests = [relay.send(case.prompt, GREEDY, colocated="colocated-0") for case in cases]
        for stream, case in zip(relay.finish(*requests), cases, strict=True):
            assert stream.token_ids() == case.answer


def outcome(worker: WorkerActor) -> "queue.SimpleQueue[BaseException]":
    """Where the failure of the worker's loop arrives."""
    failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    worker.on_failure = failures.put
    return failures


def test_when_a_rank_fails_the_others_end_with_the_reason(tiny_llama: Path) -> None:
    with relay_of(tiny_llama, Role.COLOCATED, tensor_parallel=3) as relay:
        leader, (one, two) = relay.workers["colocated-0"], relay.ranks["colocated-0"]
        failures = [outcome(worker) for worker in (leader, one, two)]
        relay.send([5, 6, 7], SamplingParams(max_tokens=2000, temperature=0, ignore_eos=True), colocated="colocated-0")
        relay.wait(lambda: any(stream.tokens for stream in relay.streams.values()))
        assert one._mailbox is not None
        started = time.monotonic()
        one._mailbox.post(object())  # nobody takes it: the loop of rank 1 fails
        assert isinstance(failures[1].get(timeout=5), AssertionError)
        for failed in (failures[0], failures[2]):
            error = failed.get(timeout=5)
            assert isinstance(error, GroupLost)
            assert "has left the group" in str(error)
        assert time.monotonic() - started < 2
        for worker in (leader, one, two):
            worker.stop()
        relay.workers.clear()
        relay.ranks.clear()


def test_a_rank_heeds_its_own_leader_only_and_misses_no_step(tiny_llama: Path) -> None:
    case = relay_cases(tiny_llama)[0]
    with relay_of(tiny_llama, Role.COLOCATED, tensor_parallel=2) as relay:
        leader, (rank,) = relay.workers["colocated-0"], relay.ranks["colocated-0"]
        assert rank._mailbox is not None
        to, outbox = rank._mailbox.address, relay.router.outbox
        worker, epoch = WorkerId("colocated-0"), leader._epoch
        forge(outbox, to, worker, Epoch(epoch + 1), KEY)
        forge(outbox, to, WorkerId("colocated-1"), epoch, KEY)
        forge(outbox, to, worker, epoch, b"x" * 32)
        member = rank._member
        relay.wait(lambda: member is not None and member._forged == 6)  # type: ignore[union-attr]
        request = relay.send(case.prompt, GREEDY, colocated="colocated-0")
        assert relay.finish(request)[0].token_ids() == case.answer

        failed = outcome(rank), outcome(leader)
        outbox.send(to, seal(KEY, Step(worker=worker, epoch=epoch, number=10**6, body=b"")))
        assert "expected step" in str(failed[0].get(timeout=5))
        assert "has left the group" in str(failed[1].get(timeout=5))
        rank.stop()
        leader.stop()
        relay.workers.clear()
        relay.ranks.clear()


def forge(outbox: Outbox, to: str, worker: WorkerId, epoch: Epoch, key: bytes) -> None:
    for message in (Dismissed(worker=worker, epoch=epoch), Step(worker=worker, epoch=epoch, number=1, body=b"")):
        outbox.send(to, seal(key, message))  # type: ignore[arg-type]

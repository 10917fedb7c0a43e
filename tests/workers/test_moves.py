"""Promise: a sequence that is being decoded moves to another worker with its KV, and goes on with the same tokens."""

import time
from pathlib import Path

import pytest

from messages.common import Role
from messages.ids import Attempt, RequestId
from messages.router_to_worker import RoleWanted
from messages.sampling import SamplingParams
from messages.seals import seal
from tests.workers.relay import KEY, Relay, relay_of
from tests.workers.test_relay import PAIR, prompt

LONG = SamplingParams(max_tokens=120, temperature=0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=120, temperature=0.8, seed=11, ignore_eos=True, frequency_penalty=0.5)
LENGTHS = (5, 16, 47, 300)


@pytest.fixture(scope="module")
def whole(tiny_llama: Path) -> dict[tuple[int, float], list[int]]:
    """The answers of a worker that keeps them."""
    with relay_of(tiny_llama, Role.COLOCATED) as relay:
        sent = {
            (length, params.temperature): relay.send(prompt(length, length), params, colocated="colocated-0")
            for length in LENGTHS
            for params in (LONG, SAMPLED)
        }
        relay.finish(*sent.values())
        return {case: relay.streams[request].token_ids() for case, request in sent.items()}


def move(relay: Relay, request: RequestId, attempt: int, tokens: list[int], params: SamplingParams,
         source: str, target: str) -> None:  # fmt: skip
    """As a gateway does that has so many of the tokens."""
    have = relay.streams[request].token_ids()
    relay.order(request, Attempt(attempt), tokens, params, have, prefill=source, decode=target)


@pytest.mark.parametrize("caching", [True, False], ids=["prefix cache", "none"])
@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_what_is_decoded_moves_there_and_back_and_its_tokens_stay_the_same(
    tiny_llama: Path, whole: dict[tuple[int, float], list[int]], transport: str, caching: bool
) -> None:
    roles = (Role.PREFILL, Role.DECODE, Role.DECODE)
    with relay_of(tiny_llama, *roles, transport=transport, enable_prefix_caching=caching) as relay:
        cases = [(length, params) for length in LENGTHS for params in (LONG, SAMPLED)]
        requests = [relay.send(prompt(length, length), params, **PAIR) for length, params in cases]
        for attempt, (source, target) in enumerate([("decode-0", "decode-1"), ("decode-1", "decode-0")], 2):
            relay.wait(lambda n=20 * (attempt - 1): all(len(relay.streams[each].tokens) > n for each in requests))
            for request, (length, params) in zip(requests, cases, strict=True):
                move(relay, request, attempt, prompt(length, length), params, source, target)
        for stream, (length, params) in zip(relay.finish(*requests), cases, strict=True):
            assert stream.failed is None and stream.token_ids() == whole[length, params.temperature]
            assert {chunk.attempt for chunk in stream.chunks} == {1, 2, 3}
        relay.wait_until_idle()
        for decode in ("decode-0", "decode-1"):
            assert relay.workers[decode].inspect()["handoffs"] == 0
            # Only the last token of each is computed again: prompts of any length would have been measured.
            assert relay.reports[decode].prefill_rate == 0
        relay.wait(lambda: not any(relay.reports[decode].left for decode in ("decode-0", "decode-1")))  # all is acked


def test_a_stream_hardly_pauses_while_it_moves(tiny_llama: Path) -> None:
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE, Role.DECODE, transport="shm") as relay:
        request = relay.send(prompt(300, 1), SamplingParams(max_tokens=400, temperature=0, ignore_eos=True), **PAIR)
        stream = relay.streams[request]
        relay.wait(lambda: len(stream.tokens) > 50)
        move(relay, request, 2, prompt(300, 1), SamplingParams(max_tokens=400, temperature=0, ignore_eos=True),
             "decode-0", "decode-1")  # fmt: skip
        begun = time.monotonic()
        relay.wait(lambda: sum(chunk.attempt == 2 for chunk in stream.chunks) > 1)  # the second one is decode-1's
        assert time.monotonic() - begun < 2
        relay.finish(request)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_of_a_group_send_and_receive(tiny_llama: Path, ranks: int) -> None:
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE, Role.DECODE, transport="zmq", tensor_parallel=ranks) as relay:
        requests = [relay.send(prompt(length, length), LONG, **PAIR) for length in LENGTHS]
        relay.wait(lambda: all(len(relay.streams[each].tokens) > 20 for each in requests))
        for request, length in zip(requests, LENGTHS, strict=True):
            move(relay, request, 2, prompt(length, length), LONG, "decode-0", "decode-1")
        moved = [stream.token_ids() for stream in relay.finish(*requests)]
        again = [relay.send(prompt(length, length), LONG, **PAIR) for length in LENGTHS]
        assert [stream.token_ids() for stream in relay.finish(*again)] == moved


def test_colocated_workers_move_what_they_run_too(tiny_llama: Path, whole: dict[tuple[int, float], list[int]]) -> None:
    with relay_of(tiny_llama, Role.COLOCATED, Role.COLOCATED, transport="shm") as relay:
        request = relay.send(prompt(47, 47), LONG, colocated="colocated-0")
        relay.wait(lambda: len(relay.streams[request].tokens) > 20)
        move(relay, request, 2, prompt(47, 47), LONG, "colocated-0", "colocated-1")
        (stream,) = relay.finish(request)
        assert stream.token_ids() == whole[47, 0]


def test_a_worker_changes_its_role_without_losing_what_it_has(
    tiny_llama: Path, whole: dict[tuple[int, float], list[int]]
) -> None:
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE, Role.DECODE, transport="shm") as relay:
        relay.finish(relay.send(prompt(47, 47), LONG, **PAIR))
        worker, epoch = relay.addresses["decode-0"].worker, relay.addresses["decode-0"].epoch
        forged = RoleWanted(worker=worker, epoch=epoch, role=Role.PREFILL, draining=False)
        relay.router.send(relay.addresses["decode-0"].mailbox, forged)
        relay.wait(lambda: relay.workers["decode-0"].inspect()["forged"] == 1)
        assert relay.workers["decode-0"].facts().role is Role.DECODE
        relay.router.send(relay.addresses["decode-0"].mailbox, seal(KEY, forged))
        relay.wait(lambda: relay.roles["decode-0"] is Role.PREFILL)
        assert relay.workers["decode-0"].facts().role is Role.PREFILL
        request = relay.send(prompt(47, 47), LONG, prefill="decode-0", decode="decode-1")
        (stream,) = relay.finish(request)
        assert stream.token_ids() == whole[47, 0]
        relay.wait_until_idle()
        assert relay.reports["decode-0"].cache.prefix_cache_hits > 0, "it has kept what it knew"

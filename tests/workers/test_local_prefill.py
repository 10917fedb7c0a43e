"""Promise: whoever computes a prompt, the tokens are transformers'; and no end of decode has it computed again."""

from pathlib import Path

import pytest

from messages.common import FailReason, Role
from messages.gateway_to_router import Computed, PlacementWanted
from messages.ids import Attempt
from messages.router_to_gateway import Placed
from messages.sampling import SamplingParams
from messages.seals import seal
from messages.worker_to_router import Register
from router.core.machine import Router, RouterSettings
from runtime.core.actions import Send
from runtime.core.disaggregation import Disaggregation, Policy
from tests.relay_cases import OUTPUT_TOKENS, relay_cases
from tests.workers.relay import KEY, Relay, config, relay_of
from tests.workers.test_prefix import cached_tokens, kv_bytes

GREEDY = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
PAIR = {"prefill": "prefill-0", "decode": "decode-0"}
NEVER = Disaggregation(policy=Policy.NEVER)


@pytest.mark.parametrize("transport", ["shm", "zmq"])
@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
def test_a_tail_that_decode_computes_itself_gives_the_same_tokens(tiny_llama: Path, transport: str, seen: bool) -> None:
    """The prefill worker takes 150 steps for the prompt, and yields it within the first few of them."""
    case = next(case for case in relay_cases(tiny_llama) if len(case.prompt) == 2400)
    with relay_of(tiny_llama, Role.PREFILL, transport=transport, prefill_chunk=16) as relay:
        relay.start(config(relay, "decode-0", Role.DECODE, tiny_llama, transport=transport, disaggregation=NEVER))
        if seen:  # but for its last 50 tokens
            relay.finish(relay.send(case.prompt[:2350], GREEDY, colocated="decode-0"))
        request = relay.send(case.prompt, GREEDY, **PAIR)
        (stream,) = relay.finish(request)
        assert stream.token_ids() == case.answer
        assert sum(len(chunk.tokens) for chunk in stream.chunks) == 4 * OUTPUT_TOKENS  # none came twice
        assert kv_bytes(relay, request) == 0
        assert cached_tokens(relay, request) == (2336 if seen else 0)
        decode, prefill = relay.workers["decode-0"].inspect(), relay.workers["prefill-0"].inspect()
        assert prefill["tails_yielded"] == decode["never"] == 1
        relay.wait(lambda: relay.reports["decode-0"].decisions.never == 1)


def test_tails_of_many_prompts_at_once_all_end_with_the_same_tokens(tiny_llama: Path) -> None:
    """Short ones are computed before the offer comes, long ones are yielded: by chance, for all that anybody knows."""
    cases = [case for case in relay_cases(tiny_llama) if len(case.prompt) <= 1024]
    with relay_of(tiny_llama, Role.PREFILL, transport="shm", prefill_chunk=64) as relay:
        relay.start(config(relay, "decode-0", Role.DECODE, tiny_llama, transport="shm", disaggregation=NEVER))
        requests = [relay.send(case.prompt, GREEDY, **PAIR) for case in cases]
        assert [stream.token_ids() for stream in relay.finish(*requests)] == [case.answer for case in cases]
        seen = relay.workers["decode-0"].inspect()
        assert seen["never"] + seen["too_late"] == len(cases)
        assert seen["never"] == relay.workers["prefill-0"].inspect()["tails_yielded"]


def test_the_first_hand_over_measures_what_decides_on_the_next(tiny_llama: Path) -> None:
    auto = Disaggregation(policy=Policy.AUTO)
    case = next(case for case in relay_cases(tiny_llama) if len(case.prompt) == 600)
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE, disaggregation=auto) as relay:
        relay.wait(lambda: len(relay.reports) == 2)
        assert all(report.prefill_rate == report.transfer_latency == 0 for report in relay.reports.values())
        (stream,) = relay.finish(relay.send(case.prompt, GREEDY, **PAIR))
        assert stream.token_ids() == case.answer
        relay.wait(lambda: relay.reports["prefill-0"].transfer_latency > 0)
        assert relay.reports["prefill-0"].prefill_rate > 0


def place(relay: Relay, wanted: PlacementWanted) -> Placed:
    """What a router says that knows the workers of ``relay``."""
    router = Router(RouterSettings(cluster_key=KEY, settle=0.0))
    for name, address in relay.addresses.items():
        if name in relay.workers:
            role = Role(name.split("-")[0])
            router.handle(seal(KEY, Register(address=address, role=role, max_num_seqs=8, max_model_len=4096)), 0.0)
    (placed,) = [action.message for action in router.handle(wanted, 0.0) if isinstance(action, Send)]
    assert isinstance(placed, Placed)
    return placed


@pytest.mark.parametrize("length", [100, 600])
def test_when_decode_dies_the_next_attempt_computes_less_than_a_block_again(tiny_llama: Path, length: int) -> None:
    case = next(case for case in relay_cases(tiny_llama) if len(case.prompt) == length)
    roles = (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)
    with relay_of(tiny_llama, *roles, transport="zmq", prefill_chunk=64) as relay:
        relay.workers.pop("decode-0").stop()
        request = relay.send(case.prompt, GREEDY, prefill="prefill-1", decode="decode-0")
        stream = relay.streams[request]
        relay.wait(lambda: stream.tokens)  # the prompt is computed, and nobody takes the KV
        relay.lose("decode-0", dead=True)
        relay.wait(lambda: stream.failed)
        assert stream.failed is not None and stream.failed.reason is FailReason.PEER_LOST
        computed = Computed(relay.addresses["prefill-1"].worker, relay.addresses["prefill-1"].epoch, length)
        placed = place(relay, PlacementWanted(
            request=request, attempt=Attempt(2), gateway=relay.gateway.address, tenant="t", num_tokens=length + 1,
            max_new_tokens=OUTPUT_TOKENS - 1, avoid=(relay.addresses["decode-0"].worker,), computed=computed,
        ))  # fmt: skip
        assert placed.prefill is not None
        pair = {"prefill": placed.prefill.worker, "decode": placed.decode.worker}
        assert pair == {"prefill": "prefill-1", "decode": "decode-1"}
        relay.order(request, Attempt(2), case.prompt, GREEDY, stream.token_ids(), **pair)
        relay.finish(request)
        assert stream.token_ids() == case.answer
        again = sum(chunk.cached_tokens for chunk in stream.chunks if chunk.attempt == 2)
        assert length - again < 16

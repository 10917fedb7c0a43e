"""Promise: KV that a worker has cached is neither computed nor sent again, and the tokens are transformers'."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine.core.scheduler import Preemption
from messages.common import Role
from messages.sampling import SamplingParams
from tests.relay_cases import OUTPUT_TOKENS, relay_cases
from tests.workers.relay import Relay, relay_of

GREEDY = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
PAIR = {"prefill": "prefill-0", "decode": "decode-0"}
BLOCK = 6 * 2 * 4 * 32 * 4 * 16


def kv_bytes(relay: Relay, request: str) -> int:
    return sum(chunk.kv_bytes for chunk in relay.streams[request].chunks)  # type: ignore[index]


def cached_tokens(relay: Relay, request: str) -> int:
    return sum(chunk.cached_tokens for chunk in relay.streams[request].chunks)  # type: ignore[index]


@pytest.mark.parametrize("transport", ["inproc", "shm", "zmq"])
@pytest.mark.parametrize("length", [15, 16, 100, 256, 600])
def test_the_second_time_only_what_is_new_is_computed_and_sent(tiny_llama: Path, transport: str, length: int) -> None:
    case = next(case for case in relay_cases(tiny_llama) if len(case.prompt) == length)
    whole, rest = divmod(length, 16)
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE, transport=transport, prefill_chunk=64) as relay:
        sent = []
        for _ in range(3):
            request = relay.send(case.prompt, GREEDY, **PAIR)
            (stream,) = relay.finish(request)
            assert stream.token_ids() == case.answer
            sent.append((kv_bytes(relay, request), cached_tokens(relay, request)))
        # All full blocks are there; of a prompt of nothing but full blocks the last token is computed again.
        expected = 0 if whole == 0 else 16 * whole - (rest == 0)
        tail = (rest > 0) * BLOCK
        assert sent == [(whole * BLOCK + tail, 0), (tail, expected), (tail, expected)]
        for worker in relay.workers.values():
            assert worker.inspect()["prefix_cache_queries"] == 3 * length


@pytest.mark.parametrize("lost", ["prefill", "decode"])
def test_a_hit_on_one_side_alone_is_enough(tiny_llama: Path, lost: str) -> None:
    """Two workers of the one role, of which the second has not seen the prompt."""
    case = next(case for case in relay_cases(tiny_llama) if len(case.prompt) == 300)
    roles = (Role.PREFILL, Role.DECODE, Role.PREFILL if lost == "prefill" else Role.DECODE)
    with relay_of(tiny_llama, *roles, transport="shm", prefill_chunk=64) as relay:
        relay.finish(relay.send(case.prompt, GREEDY, **PAIR))
        request = relay.send(case.prompt, GREEDY, **(PAIR | {lost: f"{lost}-1"}))
        (stream,) = relay.finish(request)
        assert stream.token_ids() == case.answer
        assert kv_bytes(relay, request) == (1 if lost == "prefill" else 19) * BLOCK
        assert cached_tokens(relay, request) == (0 if lost == "prefill" else 288)


def test_what_decode_made_is_cached_for_the_next_turn(tiny_llama: Path) -> None:
    case = next(case for case in relay_cases(tiny_llama) if len(case.prompt) == 100)
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE, Role.COLOCATED, transport="shm") as relay:
        relay.finish(relay.send(case.prompt, GREEDY, **PAIR))
        turn = [*case.prompt, *case.answer, 11, 12, 13]
        alone = relay.send(turn, GREEDY, colocated="colocated-0")
        request = relay.send(turn, GREEDY, **PAIR)
        expected, stream = relay.finish(alone, request)
        assert stream.token_ids() == expected.token_ids()
        # 115 tokens of the first turn have KV: decode has 7 full blocks of them, and prefill those of the prompt.
        assert kv_bytes(relay, request) == BLOCK
        assert cached_tokens(relay, request) == 96


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_a_burst_of_equal_prompts_is_computed_and_sent_once(
    tiny_llama: Path, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decode_worker.core.reservation.SHARE_WITHIN", 60.0)  # however slow this machine is
    case = next(case for case in relay_cases(tiny_llama) if len(case.prompt) == 900)
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE, transport=transport, prefill_chunk=64) as relay:
        requests = [relay.send(case.prompt, GREEDY, **PAIR) for _ in range(8)]
        assert [stream.token_ids() for stream in relay.finish(*requests)] == [case.answer] * 8
        assert sorted(cached_tokens(relay, request) for request in requests) == [0] + [896] * 7
        assert sum(kv_bytes(relay, request) for request in requests) == (57 + 7) * BLOCK


def test_no_kv_is_shared_between_salts(tiny_llama: Path) -> None:
    case = next(case for case in relay_cases(tiny_llama) if len(case.prompt) == 300)
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE, transport="shm") as relay:
        for salt, cached in ((b"one", 0), (b"two", 0), (b"one", 288), (b"", 0)):
            request = relay.send(case.prompt, GREEDY, salt=salt, **PAIR)
            (stream,) = relay.finish(request)
            assert stream.token_ids() == case.answer
            assert cached_tokens(relay, request) == cached
            assert kv_bytes(relay, request) == (1 if cached else 19) * BLOCK


@pytest.mark.parametrize("changes", [{"enable_prefix_caching": False}, {}, {"preemption": Preemption.SWAP}])
def test_a_pool_that_is_too_small_for_all_answers_all(tiny_llama: Path, changes: dict[str, object]) -> None:
    """Answers longer than was expected of them: sequences are preempted, and end with the same tokens."""
    long = replace(GREEDY, max_tokens=150, temperature=1.0, seed=9)
    prompts = [[*range(100, 130 + seed)] for seed in range(5)]
    with relay_of(tiny_llama, Role.COLOCATED) as relay:
        requests = [relay.send(each, long, colocated="colocated-0") for each in prompts]
        expected = [stream.token_ids() for stream in relay.finish(*requests)]
    small = {"num_blocks": 24, "swap_blocks": 64, "expected_output": 1} | changes
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE, transport="shm", **small) as relay:
        requests = [relay.send(each, long, **PAIR) for each in prompts]
        assert [stream.token_ids() for stream in relay.finish(*requests)] == expected
        assert relay.workers["decode-0"].inspect()["preemptions"] > 0


def test_every_rank_moves_the_blocks_that_rank_0_has_planned_to(tiny_llama: Path) -> None:
    """Two ranks under pressure: preempted by swap, and a cached prompt whose last block is copied."""
    long = replace(GREEDY, max_tokens=150, temperature=1.0, seed=9)
    orders = [([*range(100, 132 + 16 * (seed % 2))], replace(long, seed=seed)) for seed in range(4)]
    with relay_of(tiny_llama, Role.COLOCATED) as relay:
        requests = [relay.send(each, params, colocated="colocated-0") for each, params in orders]
        expected = [stream.token_ids() for stream in relay.finish(*requests)]
    small = {"num_blocks": 16, "swap_blocks": 64, "expected_output": 1, "preemption": Preemption.SWAP}
    with relay_of(tiny_llama, Role.COLOCATED, tensor_parallel=2, **small) as relay:
        requests = [relay.send(each, params, colocated="colocated-0") for each, params in orders]
        assert [stream.token_ids() for stream in relay.finish(*requests)] == expected
        seen = relay.workers["colocated-0"].inspect()
        assert seen["preemptions"] > 0 and seen["prefix_cache_hits"] > 0

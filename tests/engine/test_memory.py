"""Promise: sharing, copying, evicting, preempting and swapping KV blocks changes no token.

Against the bundled model in fp32, where equal KV gives equal text.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.core.scheduler import Preemption
from engine.engine import Completion, Engine
from messages.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=1.0, top_p=0.9, seed=5)
BLOCK = 6 * 2 * 4 * 32 * 4 * 16
"""Bytes of a block of 16 tokens of the model, fp32."""


def prompt(length: int, seed: int = 3) -> list[int]:
    return [(seed * 7919 + place * 104729) % 2000 + 10 for place in range(length)]


def engine_of(model: Path, num_blocks: int = 1024, **more: Any) -> Engine:
    return Engine(model, dtype="float32", kv_bytes=num_blocks * BLOCK, **more)


def drained(engine: Engine) -> None:
    """Nothing is held any more."""
    engine.scheduler.check_integrity()
    assert engine.pool.counts().held == engine.pool.num_references == 0


def generate(engine: Engine, prompts: list[list[int]], params: Any, n: int = 1) -> list[Completion]:
    """``Engine.generate``, with the accounting checked at every step."""
    each = params if isinstance(params, list) else [params] * len(prompts)
    made = {
        seq_id: Completion()
        for one, param in zip(prompts, each, strict=True)
        for seq_id in engine.add_samples(one, param, n)
    }
    while any(completion.finish_reason is None for completion in made.values()):
        for progress in engine.step():
            completion = made[progress.seq.seq_id]
            if progress.token is not None:
                completion.token_ids.append(progress.token)
            completion.finish_reason = progress.finish_reason
            completion.prompt_logprobs = progress.prompt_logprobs or completion.prompt_logprobs
        engine.scheduler.check_integrity()
    drained(engine)
    return list(made.values())


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 48, 100])
@pytest.mark.parametrize("chunk", [24, 512])
def test_a_prompt_that_is_cached_gets_the_same_answer_and_computes_only_what_is_not(
    tiny_llama: Path, length: int, chunk: int
) -> None:
    engine = engine_of(tiny_llama, prefill_chunk=chunk)
    first = tokens(generate(engine, [prompt(length)], GREEDY))
    queries, hits = engine.pool.prefix_cache_queries, engine.pool.prefix_cache_hits
    assert (queries, hits) == (length, 0)
    assert tokens(generate(engine, [prompt(length)], GREEDY)) == first
    # All full blocks; of a prompt of nothing but full blocks, all but its last token.
    expected = length // 16 * 16 - (length % 16 == 0)
    assert engine.pool.prefix_cache_hits == expected
    longer = prompt(length) + first[0] + [7, 8, 9]
    alone = tokens(generate(engine_of(tiny_llama), [longer], GREEDY))
    assert tokens(generate(engine, [longer], GREEDY)) == alone  # what was decoded is cached too


def test_prompts_with_a_common_beginning_at_once_compute_it_once(tiny_llama: Path) -> None:
    system = prompt(160)
    prompts = [system + prompt(20 + each, seed=each) for each in range(6)]
    engine, alone = engine_of(tiny_llama, prefill_chunk=64), engine_of(tiny_llama, enable_prefix_caching=False)
    assert tokens(generate(engine, prompts, GREEDY)) == tokens(generate(alone, prompts, GREEDY))
    assert engine.pool.prefix_cache_hits == 5 * 160
    assert alone.pool.prefix_cache_hits == 0 and alone.pool.counts().cached == 0


def test_no_prefix_is_shared_between_salts(tiny_llama: Path) -> None:
    engine = engine_of(tiny_llama)
    for salt in (b"one", b"two", b"one"):
        engine.add(prompt(64), GREEDY, salt=salt)
        while engine.step():
            pass
    assert engine.pool.prefix_cache_hits == 63


@pytest.mark.parametrize("length", [1, 16, 20, 47, 64])
@pytest.mark.parametrize("caching", [True, False])
def test_eight_samples_share_the_prompt_and_answer_as_eight_requests(
    tiny_llama: Path, length: int, caching: bool
) -> None:
    alone = engine_of(tiny_llama, enable_prefix_caching=False)
    seeds = [replace(DRAWN, seed=DRAWN.seed + sample) for sample in range(8)]
    expected = tokens(generate(alone, [prompt(length)] * 8, seeds))
    engine = engine_of(tiny_llama, enable_prefix_caching=caching)
    ids = engine.add_samples(prompt(length), DRAWN, 8)
    made: dict[str, list[int]] = {seq_id: [] for seq_id in ids}
    held = []
    while progress := engine.step():
        held.append(engine.pool.counts().held)
        for each in progress:
            assert each.token is not None
            made[each.seq.seq_id].append(each.token)
        engine.scheduler.check_integrity()
    assert list(made.values()) == expected and len({tuple(answer) for answer in expected}) > 4
    # Shared: the full blocks of the prompt. Of its own each has a copy of the last one, and what it adds.
    whole = length // 16
    assert max(held) <= whole + 8 * (-(-(length + 24) // 16) - whole + (length % 16 == 0))
    drained(engine)


def pressed(model: Path, how: str) -> Engine:
    """A pool of 12 blocks: five sequences of 8 blocks each do not fit, and each one's room is underestimated."""
    ways = {
        "recompute": {},
        "recompute, nothing cached": {"enable_prefix_caching": False},
        "recompute, host tier as a cache": {"swap_space": 30 * BLOCK},
        "swap": {"preemption": Preemption.SWAP, "swap_space": 100 * BLOCK},
        "swap, nothing cached": {
            "preemption": Preemption.SWAP, "swap_space": 100 * BLOCK, "enable_prefix_caching": False
        },
        "swap, little room": {"preemption": Preemption.SWAP, "swap_space": 8 * BLOCK},
    }  # fmt: skip
    return engine_of(model, 12, expected_output=1, **ways[how])


WAYS = [
    "recompute", "recompute, nothing cached", "recompute, host tier as a cache", "swap", "swap, nothing cached",
    "swap, little room",
]  # fmt: skip


@pytest.mark.parametrize("how", WAYS)
def test_preempted_sequences_answer_as_without_pressure(tiny_llama: Path, how: str) -> None:
    long = [replace(DRAWN, max_tokens=100, seed=seed) for seed in range(5)]
    prompts = [prompt(20, seed) for seed in range(5)]
    expected = tokens(generate(engine_of(tiny_llama, enable_prefix_caching=False), prompts, long))
    engine = pressed(tiny_llama, how)
    assert tokens(generate(engine, prompts, long)) == expected
    stats, host = engine.scheduler.stats, engine.host
    assert stats.preemptions > 0
    assert (stats.swaps > 0) == how.startswith("swap")
    if how == "swap":
        assert stats.swaps == stats.preemptions
    if host is not None:
        host.pool.check_integrity()
        assert host.pool.num_references == 0 and host.blocks_out > 0 and host.blocks_in > 0


@pytest.mark.parametrize("how", WAYS)
def test_samples_under_pressure_answer_as_without(tiny_llama: Path, how: str) -> None:
    params = replace(DRAWN, max_tokens=50)
    expected = tokens(generate(engine_of(tiny_llama), [prompt(40), prompt(33)], params, 8))
    engine = pressed(tiny_llama, how)
    assert tokens(generate(engine, [prompt(40), prompt(33)], params, 8)) == expected
    assert engine.scheduler.stats.preemptions > 0


def test_what_the_pool_evicts_comes_back_from_the_host_tier(tiny_llama: Path) -> None:
    prompts = [prompt(200, seed) for seed in range(6)]
    expected = tokens(generate(engine_of(tiny_llama), prompts, GREEDY))
    engine = engine_of(tiny_llama, 20, swap_space=100 * BLOCK)
    for _ in range(2):
        assert [tokens(generate(engine, [one], GREEDY))[0] for one in prompts] == expected
    assert engine.pool.prefix_cache_hits == 6 * 192
    without = engine_of(tiny_llama, 20)
    for _ in range(2):
        assert [tokens(generate(without, [one], GREEDY))[0] for one in prompts] == expected
    assert without.pool.prefix_cache_hits == 0


def test_a_scored_prompt_is_computed_whole_even_where_it_is_cached(tiny_llama: Path) -> None:
    scoring = replace(GREEDY, prompt_logprobs=1)
    engine = engine_of(tiny_llama)
    (first,) = generate(engine, [prompt(64)], scoring)
    (again,) = generate(engine, [prompt(64)], scoring)
    assert first.prompt_logprobs is not None and again.prompt_logprobs is not None
    assert [entry.token_id for entry in again.prompt_logprobs] == prompt(64)[1:]
    assert first.token_ids == again.token_ids
    assert engine.pool.prefix_cache_hits == 0

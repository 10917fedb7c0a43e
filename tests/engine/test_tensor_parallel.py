"""Promise: a model on several ranks answers as on one, and as transformers does, token for token in fp32."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from engine.core.errors import ModelError, StepLost
from engine.core.step_input import StepInput
from engine.engine import Engine
from engine.models.config import ModelConfig
from engine.parallel import ParallelGroup
from engine.runner import kv_layout
from messages.sampling import SamplingParams
from tests.engine.ranks import ParallelEngine, Ranks
from tests.relay_cases import OUTPUT_TOKENS, relay_cases, transformers_answer

GREEDY = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_tiny_llama_answers_on_several_ranks_as_by_transformers(ranks: Ranks, tiny_llama: Path, size: int) -> None:
    cases = relay_cases(tiny_llama)[::6]
    with ParallelEngine(ranks, size, tiny_llama, dtype="float32", num_blocks=512, prefill_chunk=64) as engine:
        made = engine.generate([case.prompt for case in cases], GREEDY)
    assert [completion.token_ids for completion in made] == [case.answer for case in cases]


# Nothing divides evenly: vocabulary 301, inner width 97, heads 9 and 3 or 4 and 2.
UNEVEN: dict[str, Any] = {
    "vocab_size": 301, "hidden_size": 72, "intermediate_size": 97, "num_hidden_layers": 2, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 512, "eos_token_id": 2, "bos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
PAIRS = {**UNEVEN, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
FAMILIES = {
    "llama, uneven": LlamaForCausalLM(LlamaConfig(**UNEVEN)),
    "llama, tied": LlamaForCausalLM(LlamaConfig(**PAIRS, tie_word_embeddings=True)),
    "llama, one KV head": LlamaForCausalLM(LlamaConfig(**{**PAIRS, "num_key_value_heads": 1})),
    "llama, biases": LlamaForCausalLM(LlamaConfig(**PAIRS, attention_bias=True, mlp_bias=True)),
    "qwen 2": Qwen2ForCausalLM(Qwen2Config(**PAIRS)),
    "qwen 3": Qwen3ForCausalLM(Qwen3Config(**UNEVEN)),
    "mistral, sliding": MistralForCausalLM(MistralConfig(**UNEVEN, sliding_window=24)),
    "mixtral, fewer experts than ranks": MixtralForCausalLM(
        MixtralConfig(**{**PAIRS, "intermediate_size": 100}, num_local_experts=3)
    ),
    "qwen 3 moe": Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**UNEVEN, num_experts=7, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True)
    ),
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_on_several_ranks_as_by_transformers(
    ranks: Ranks, tmp_path: Path, family: str, size: int
) -> None:
    model = FAMILIES[family].eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path)
    prompts = [[(seed * 31 + place * 17) % 301 for place in range(n)] for seed, n in enumerate((1, 20, 90))]
    with ParallelEngine(ranks, size, tmp_path, dtype="float32", num_blocks=64, prefill_chunk=24) as engine:
        made = engine.generate(prompts, GREEDY)
    for prompt, completion in zip(prompts, made, strict=True):
        assert completion.token_ids == transformers_answer(model, prompt, OUTPUT_TOKENS)[0], f"{len(prompt)} tokens"


def test_prompt_logprobs_of_a_long_prompt_are_those_of_one_rank(ranks: Ranks, tiny_llama: Path) -> None:
    """Logits of more rows than are made at once."""
    prompt = [(place * 37) % 2000 + 3 for place in range(600)]
    params = SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=1)
    options: dict[str, Any] = {"prefill_chunk": 512, "max_num_batched_tokens": 1024}
    alone = Engine(tiny_llama, dtype="float32", **options).generate([prompt], params)[0]
    with ParallelEngine(ranks, 2, tiny_llama, dtype="float32", num_blocks=64, **options) as engine:
        made = engine.generate([prompt], params)[0]
    assert made.token_ids == alone.token_ids
    assert made.prompt_logprobs is not None and alone.prompt_logprobs is not None
    here, there = ([entry.logprob for entry in scored] for scored in (made.prompt_logprobs, alone.prompt_logprobs))
    np.testing.assert_allclose(here, there, atol=1e-4)


def test_bf16_follows_one_rank_within_its_rounding(ranks: Ranks, tiny_llama: Path) -> None:
    prompt = [(place * 41) % 2000 + 3 for place in range(200)]
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    alone = Engine(tiny_llama, dtype="bfloat16").generate([prompt], params)[0].prompt_logprobs
    for size in (2, 4):
        with ParallelEngine(ranks, size, tiny_llama, dtype="bfloat16", num_blocks=64) as engine:
            made = engine.generate([prompt], params)[0].prompt_logprobs
        assert made is not None and alone is not None
        gaps = [abs(here.logprob - there.logprob) for here, there in zip(made, alone, strict=True)]
        assert 0 < np.mean(gaps) < 0.05


def test_a_step_that_fails_on_one_rank_fails_on_all_and_the_next_one_is_right(ranks: Ranks, tiny_llama: Path) -> None:
    case = relay_cases(tiny_llama)[3]
    with ParallelEngine(ranks, 2, tiny_llama, dtype="float32", num_blocks=64) as engine:
        send = engine.runner._broadcast

        def spoil(step: StepInput) -> None:
            """Rank 1 is told of blocks that are in no pool."""
            send(replace(step, block_tables=step.block_tables + 10_000))

        engine.runner._broadcast = spoil
        engine.add(case.prompt, GREEDY)
        plan = engine.scheduler.schedule()
        assert plan is not None
        with pytest.raises(StepLost, match="rank 1 of 2 failed in this step"):
            engine.runner.run(plan)
        engine.runner._broadcast = send
        engine.scheduler.update(plan, engine.runner.run(plan))
        engine.abort("0")
        assert engine.generate([case.prompt], GREEDY)[0].token_ids == case.answer


def test_a_rank_holds_its_share_of_the_kv_only(tiny_llama: Path) -> None:
    config = ModelConfig.from_folder(tiny_llama)
    group = ParallelGroup()
    group.rank, group.size = 1, 2
    whole = kv_layout(config, "float32", 16)
    assert kv_layout(config, "float32", 16, group=group).block_bytes * 2 == whole.block_bytes
    group.size = config.num_heads + 1
    with pytest.raises(ModelError, match=r"tensor_parallel: \d+ attention heads cannot be shared among"):
        kv_layout(config, "float32", 16, group=group)

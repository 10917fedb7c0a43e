"""Promise: greedy output in fp32 is what transformers' ``generate`` gives, token for token."""

from pathlib import Path
from typing import Any

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

from engine.engine import Engine
from messages.sampling import SamplingParams
from tests.relay_cases import OUTPUT_TOKENS, relay_cases, transformers_answer

GREEDY = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [16, 64, 512])
def test_sixty_prompts_at_once_are_answered_as_by_transformers(tiny_llama: Path, chunk: int) -> None:
    cases = relay_cases(tiny_llama)
    engine = Engine(tiny_llama, dtype="float32", prefill_chunk=chunk, max_num_seqs=32)
    made = engine.generate([case.prompt for case in cases], GREEDY)
    assert len(cases) == 60
    assert [completion.token_ids for completion in made] == [case.answer for case in cases]
    engine.pool.check_integrity()
    assert engine.pool.counts().held == 0


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [16, 64, 512])
def test_each_prompt_alone_is_answered_as_by_transformers(tiny_llama: Path, chunk: int) -> None:
    engine = Engine(tiny_llama, dtype="float32", prefill_chunk=chunk)
    for case in relay_cases(tiny_llama):
        assert engine.generate([case.prompt], GREEDY)[0].token_ids == case.answer, f"{len(case.prompt)} tokens"


SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SHAPES = {
    "untied": LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)),
    "tied": LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=4, tie_word_embeddings=True)),
    "one KV head, wide heads": LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1, head_dim=32)),
    "llama 3 RoPE": LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, rope_parameters=LLAMA3)),
    "biases": LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
    "qwen 2": Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2)),
    "qwen 2, sliding from layer 1 on": Qwen2ForCausalLM(
        Qwen2Config(**SMALL, num_key_value_heads=2, use_sliding_window=True, sliding_window=20, max_window_layers=1)
    ),
    "qwen 3": Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16)),
    "qwen 3, sliding by layer types": Qwen3ForCausalLM(
        Qwen3Config(
            **SMALL,
            num_key_value_heads=2,
            head_dim=16,
            use_sliding_window=True,
            sliding_window=33,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "qwen 3 moe": Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SMALL, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24
        )
    ),
    "qwen 3 moe, sliding, every second layer dense, weights to sum 1": Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SMALL,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            decoder_sparse_step=2,
            norm_topk_prob=True,
            use_sliding_window=True,
            sliding_window=24,
        )
    ),
    "mixtral": MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=6)),
    "mistral": MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None)),
    "mistral, sliding": MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=24)),
}


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_the_family_is_answered_as_by_transformers(tmp_path: Path, shape: str, sharded: bool) -> None:
    model = SHAPES[shape].eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path, max_shard_size="40KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    engine = Engine(tmp_path, dtype="float32", prefill_chunk=24, kv_bytes=8 << 20)
    prompts = [
        [(seed * 31 + place * 17) % 300 for place in range(length)] for seed, length in enumerate((1, 20, 90, 200))
    ]
    made = engine.generate(prompts, GREEDY)
    for prompt, completion in zip(prompts, made, strict=True):
        assert completion.token_ids == transformers_answer(model, prompt, OUTPUT_TOKENS)[0], f"{len(prompt)} tokens"

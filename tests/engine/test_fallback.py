"""Promise: a model that only transformers knows gives transformers' tokens through our paged attention, or is refused
with a reason before it serves anything."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.core.errors import ModelError
from engine.engine import Engine
from engine.models.config import ModelConfig
from messages.sampling import SamplingParams
from tests.engine.ranks import ParallelEngine, Ranks
from tests.relay_cases import OUTPUT_TOKENS, cases_of, transformers_answer

GREEDY = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
LENGTHS = (1, 7, 20, 90, 200)
TOKENS: dict[str, Any] = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
SMALL: dict[str, Any] = TOKENS | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 512,
}  # fmt: skip
GROUPED: dict[str, Any] = SMALL | {"num_key_value_heads": 2}
CONFIGS: dict[str, Any] = {
    "gpt 2": lambda: transformers.GPT2Config(**TOKENS, n_embd=64, n_layer=3, n_head=4, n_positions=512),
    "gemma": lambda: transformers.GemmaConfig(**(SMALL | {"num_key_value_heads": 1}), head_dim=32),
    "gemma 2, windows and soft caps": lambda: transformers.Gemma2Config(
        **GROUPED, head_dim=16, query_pre_attn_scalar=24, sliding_window=20, attn_logit_softcapping=5.0,
        final_logit_softcapping=8.0,
    ),
    "gemma 3, text": lambda: transformers.Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=24),
    "phi": lambda: transformers.PhiConfig(**SMALL, partial_rotary_factor=0.5),
    "phi 3": lambda: transformers.Phi3Config(**GROUPED, sliding_window=40),
    "opt": lambda: transformers.OPTConfig(
        **TOKENS, hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=512,
        word_embed_proj_dim=32,
    ),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**SMALL),
    "olmo 2": lambda: transformers.Olmo2Config(**GROUPED),
    "cohere, scaled logits": lambda: transformers.CohereConfig(**GROUPED, logit_scale=0.25),
    "deepseek v3, values of another size than keys": lambda: transformers.DeepseekV3Config(
        **SMALL, num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
        topk_group=1, n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=20,
    ),
    "qwen 2 moe, a mask that no layer uses": lambda: transformers.Qwen2MoeConfig(
        **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
    ),
    "gemma 3, of which only the text is served": lambda: transformers.Gemma3Config(
        text_config=GROUPED | {"head_dim": 16, "sliding_window": 24},
        vision_config={
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        image_token_index=299, boi_token_index=297, eoi_token_index=298, mm_tokens_per_image=4,
    ),
    "llama with yarn": lambda: transformers.LlamaConfig(
        **GROUPED,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128,
        },
    ),
}  # fmt: skip


def save(config: Any, folder: Path, spread: float = 0.2) -> Any:
    """A random model of this shape, saved."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, spread)
            if "norm" in name or "ln_" in name:
                parameter.abs_().add_(0.5)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("shape", CONFIGS)
def test_any_shape_is_answered_as_by_transformers(tmp_path: Path, shape: str) -> None:
    model = save(CONFIGS[shape](), tmp_path)
    assert not ModelConfig.from_folder(tmp_path).native
    engine = Engine(tmp_path, dtype="float32", prefill_chunk=24, kv_bytes=8 << 20)
    cases = cases_of(model, LENGTHS)
    made = engine.generate([case.prompt for case in cases], GREEDY)
    assert [completion.token_ids for completion in made] == [case.answer for case in cases]
    engine.pool.check_integrity()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("shape", ["gpt 2", "gemma", "gemma 2, windows and soft caps", "phi", "opt"])
def test_on_two_ranks_the_answers_are_the_same(ranks: Ranks, tmp_path: Path, shape: str) -> None:
    model = save(CONFIGS[shape](), tmp_path)
    cases = cases_of(model, LENGTHS)
    with ParallelEngine(ranks, 2, tmp_path, dtype="float32", num_blocks=64, prefill_chunk=24) as engine:
        made = engine.generate([case.prompt for case in cases], GREEDY)
    assert [completion.token_ids for completion in made] == [case.answer for case in cases]


REFUSED: dict[str, tuple[Any, str]] = {
    "bloom": (lambda: transformers.BloomConfig(**TOKENS, hidden_size=64, n_layer=2, n_head=4), "max_position_embed"),
    "falcon": (lambda: transformers.FalconConfig(**SMALL), "does not go through transformers' attention interface"),
    "falcon with alibi": (lambda: transformers.FalconConfig(**SMALL, alibi=True), "ALiBi"),
    "mamba": (
        lambda: transformers.MambaConfig(**TOKENS, hidden_size=64, num_hidden_layers=2),
        "no KV cache of every token",
    ),
    "gpt-oss, sinks": (
        lambda: transformers.GptOssConfig(**GROUPED, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
        "asks for s_aux",
    ),
    "llama 4, chunks": (
        lambda: transformers.Llama4TextConfig(
            **GROUPED, head_dim=16, num_local_experts=2, intermediate_size_mlp=96, attention_chunk_size=32
        ),
        "chunked_attention",
    ),
    "lfm 2, convolutions": (lambda: transformers.Lfm2Config(**GROUPED, full_attn_idxs=[1]), "conv"),
    "bert": (lambda: transformers.BertConfig(**SMALL), "what its tokens see is neither|attention is not causal"),
    "camembert, positions from 2 on": (
        lambda: transformers.CamembertConfig(**SMALL, is_decoder=True), "positions do not count from 0"
    ),
    "moshi, a window in its cache alone": (
        lambda: transformers.MoshiConfig(**GROUPED, head_dim=16, ffn_dim=96, sliding_window=20, audio_vocab_size=32),
        "set max_model_len to 20 or less",
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", REFUSED)
def test_what_cannot_be_paged_is_refused_with_the_reason(tmp_path: Path, shape: str) -> None:
    config, reason = REFUSED[shape]
    save(config(), tmp_path)
    with pytest.raises(ModelError, match=reason):
        Engine(tmp_path, dtype="float32", kv_bytes=8 << 20)


def test_positions_that_do_not_count_from_0_are_found_in_16_bits_too(tmp_path: Path) -> None:
    save(REFUSED["camembert, positions from 2 on"][0](), tmp_path)
    with pytest.raises(ModelError, match="positions do not count from 0"):
        Engine(tmp_path, dtype="bfloat16", kv_bytes=8 << 20)


def test_a_model_that_rotates_by_positions_of_its_own_count_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(CONFIGS["gpt-neox"](), tmp_path)
    forward = transformers.GPTNeoXModel.forward

    def counting(self: Any, *given: Any, position_ids: torch.Tensor | None = None, **options: Any) -> Any:
        return forward(self, *given, **options)

    monkeypatch.setattr(transformers.GPTNeoXModel, "forward", counting)
    with pytest.raises(ModelError, match="does not follow the positions given"):
        Engine(tmp_path, dtype="float32", kv_bytes=8 << 20)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_that_chooses_other_experts_refuses_no_model(tmp_path: Path, dtype: str) -> None:
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    save(transformers.PhimoeConfig(**GROUPED | {"num_hidden_layers": 4}, **experts), tmp_path)
    engine = Engine(tmp_path, dtype=dtype, kv_bytes=8 << 20)
    assert len(engine.generate([[5, 6, 7]], GREEDY)[0].token_ids) == OUTPUT_TOKENS


def write_config(folder: Path, **config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "an encoder and a decoder"),
        ({"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"]}, "of this kind GPT2LMHeadModel is"),
        ({"model_type": "no-such", "architectures": ["NoSuchForCausalLM"]}, "does not know this kind"),
        (
            {
                "model_type": "own",
                "architectures": ["OwnForCausalLM"],
                "auto_map": {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
            },
            "never run",
        ),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_head": "many"}, "config.json: "),
        (
            {"model_type": "xlnet", "architectures": ["XLNetLMHeadModel"]},
            "max_position_embeddings as one positive number",
        ),
        (
            {
                "model_type": "gpt2",
                "architectures": ["GPT2LMHeadModel"],
                "quantization_config": {"quant_method": "gptq", "bits": 4},
            },
            "GPTQ checkpoints are not read yet; name the unquantised model",
        ),
    ],
)
def test_what_the_config_alone_rules_out_is_refused_by_the_config_alone(
    tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    write_config(tmp_path, **config)
    (tmp_path / "configuration_own.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(ModelError, match=reason):
        ModelConfig.from_folder(tmp_path)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    save(CONFIGS["gpt 2"](), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing keys: \['transformer.h.1.mlp.c_fc.weight'\]"):
        Engine(tmp_path, dtype="float32", kv_bytes=8 << 20)


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    save(CONFIGS["gpt 2"](), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        Engine(tmp_path, dtype="float32", kv_bytes=8 << 20)


def test_bf16_follows_fp32_within_its_rounding(tmp_path: Path) -> None:
    save(CONFIGS["gemma 2, windows and soft caps"](), tmp_path, spread=0.05)
    prompt = [(place * 41) % 297 + 3 for place in range(150)]
    scored = SamplingParams(max_tokens=0, prompt_logprobs=0)
    values = []
    for dtype in ("float32", "bfloat16"):
        made = Engine(tmp_path, dtype=dtype, kv_bytes=8 << 20).generate([prompt], scored)[0].prompt_logprobs
        assert made is not None
        values.append(torch.tensor([entry.logprob for entry in made]))
    assert (values[0] - values[1]).abs().mean() < 0.05


def test_rope_that_changes_with_the_batch_is_refused_beyond_its_first_context(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 128,
    }  # fmt: skip
    model = save(
        transformers.Phi3Config(**GROUPED, rope_parameters=rope, original_max_position_embeddings=128), tmp_path
    )
    with pytest.raises(ModelError, match="set max_model_len to 128 or less"):
        Engine(tmp_path, dtype="float32", kv_bytes=8 << 20)
    engine = Engine(tmp_path, dtype="float32", kv_bytes=8 << 20, max_model_len=128)
    prompt = [(place * 41) % 297 + 3 for place in range(90)]
    assert engine.generate([prompt], GREEDY)[0].token_ids == transformers_answer(model, prompt, OUTPUT_TOKENS)[0]

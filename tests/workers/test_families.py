"""Promise: a prompt that one worker has prefilled and another decodes is answered as by transformers, whatever the
model: with sliding windows, experts, or transformers' own code."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from messages.common import Role
from messages.sampling import SamplingParams
from tests.relay_cases import OUTPUT_TOKENS, Case, cases_of
from tests.workers.relay import config, relay_of

GREEDY = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "mistral, sliding": lambda: transformers.MistralConfig(**SHAPE, sliding_window=24),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=5),
    "qwen 3 moe": lambda: transformers.Qwen3MoeConfig(
        **SHAPE, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "gpt 2": lambda: transformers.GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=512),
    "gemma 2": lambda: transformers.Gemma2Config(**SHAPE, sliding_window=24, attn_logit_softcapping=5.0),
    "phi": lambda: transformers.PhiConfig(**{key: value for key, value in SHAPE.items() if key != "head_dim"}),
}


@pytest.fixture(scope="module", params=CONFIGS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Case]]:
    """A random model, saved, and transformers' answers."""
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(1)
    shape = CONFIGS[request.param]()
    model = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder, cases_of(model, (1, 20, 90))


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (2, 1), (1, 2), (2, 4), (4, 2)])
def test_every_family_is_handed_over_between_pools_of_any_degree(
    family: tuple[Path, list[Case]], prefill: int, decode: int
) -> None:
    folder, cases = family
    options: dict[str, Any] = {"max_model_len": 512, "prefill_chunk": 24, "num_blocks": 128, "transport": "shm"}
    with relay_of(folder) as relay:
        relay.start(config(relay, "prefill-0", Role.PREFILL, folder, tensor_parallel=prefill, **options))
        relay.start(config(relay, "decode-0", Role.DECODE, folder, tensor_parallel=decode, **options))
        for case in cases:
            (stream,) = relay.finish(relay.send(case.prompt, GREEDY, prefill="prefill-0", decode="decode-0"))
            assert stream.token_ids() == case.answer, f"{len(case.prompt)} tokens"

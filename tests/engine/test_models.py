"""Promise: what cannot be served is refused at the start, with a message that says why."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.core.errors import ModelError
from engine.core.kv_layout import KVLayout
from engine.engine import Engine
from engine.models.config import ModelConfig
from engine.models.llama_config import LlamaConfig
from engine.runner import ModelRunner
from engine.weights import resolve_model
from messages.sampling import SamplingParams


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load(folder: Path) -> ModelRunner:
    return ModelRunner(folder, dtype="float32", num_blocks=4, block_size=16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "of this kind LlamaForCausalLM is one"),
        ({"hidden_size": None}, "config.json: TypeError"),
        ({"vocab_size": 4096}, r"model.embed_tokens.weight is \(2048, 256\), but config.json asks for \(4096, 256\)"),
        ({"num_hidden_layers": 7}, "no tensor model.layers.6"),
        ({"num_hidden_layers": 5}, "tensors have no place in LlamaForCausalLM"),
        ({"tie_word_embeddings": False}, "no lm_head.weight"),
        ({"quantization_config": {"quant_method": "awq"}}, "AWQ checkpoints are not read yet; name the unquantised"),
        ({"num_key_value_heads": 3}, "do not divide"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_a_folder_without_safetensors_is_refused_and_nothing_else_is_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="other formats are not read"):
        load(folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(ModelError, match="cannot be read"):
        load(folder)


def test_an_index_that_leaves_its_folder_is_refused(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside its folder"):
        load(folder)


def test_no_such_model_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no folder with a model"):
        resolve_model(str(tmp_path / "nothing"))


def test_logits_that_are_no_numbers_end_the_sequence_and_not_the_engine(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][7] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, tie_word_embeddings=False)
    weights["lm_head.weight"] = torch.ones_like(weights["model.embed_tokens.weight"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    engine = Engine(folder, dtype="float32", kv_bytes=4 << 20)
    greedy = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    poisoned, sound = engine.generate([[5, 7], [5, 6]], greedy)
    assert poisoned.token_ids == []
    assert len(sound.token_ids) == 3
    assert engine.pool.counts().held == 0


def test_prompt_logprobs_are_those_of_the_whole_sequence_at_once(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    prompt = [(place * 37) % 2000 + 3 for place in range(150)]
    scored = SamplingParams(max_tokens=0, prompt_logprobs=2)
    made = Engine(tiny_llama, dtype="float32", prefill_chunk=40).generate([prompt], scored)[0].prompt_logprobs
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0], -1)
    assert made is not None and len(made) == len(prompt) - 1
    for place, entry in enumerate(made):
        assert entry.token_id == prompt[place + 1]
        assert entry.logprob == pytest.approx(float(expected[place, prompt[place + 1]]), abs=1e-3)
        assert entry.top_ids == tuple(expected[place].topk(2).indices.tolist())


def test_bf16_follows_fp32_within_its_rounding(tiny_llama: Path) -> None:
    prompt = [(place * 41) % 2000 + 3 for place in range(300)]
    scored = SamplingParams(max_tokens=0, prompt_logprobs=0)
    values = []
    for dtype in ("float32", "bfloat16"):
        made = Engine(tiny_llama, dtype=dtype).generate([prompt], scored)[0].prompt_logprobs
        assert made is not None
        values.append(np.array([entry.logprob for entry in made]))
    assert np.abs(values[0] - values[1]).mean() < 0.05


def test_the_layouts_bytes() -> None:
    layout = KVLayout(32, 8, 128, 16, "bfloat16")
    assert (layout.block_bytes, layout.layer_bytes) == (2 << 20, 64 << 10)
    with pytest.raises(ValueError, match="dtype"):
        KVLayout(1, 1, 1, 1, "int3")


def test_config_needs_no_torch(tiny_llama: Path) -> None:
    config = ModelConfig.from_folder(tiny_llama)
    assert config.eos_token_ids == (2, 0)
    assert config.resolve_dtype("auto") == "bfloat16"
    with pytest.raises(ModelError, match="dtype must be auto"):
        config.resolve_dtype("int4")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1e6}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_parameters": PLAIN},
        {"rope_parameters": PLAIN, "rope_scaling": LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_scaling": {"rope_type": "default"}},
        {},
    ],
    ids=["4", "5", "scaling added to 5", "scaling taken from 5", "none"],
)
def test_rope_is_read_from_either_form_of_config_as_by_transformers(folder: Path, rope: dict[str, Any]) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("rope")}
    path.write_text(json.dumps(config | rope))
    read = ModelConfig.from_folder(folder)
    assert isinstance(read, LlamaConfig)
    expected = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq
    assert read.inverse_frequencies() == pytest.approx(expected.tolist(), rel=1e-5)


def test_yarn_that_a_user_adds_to_a_config_is_not_passed_over(folder: Path) -> None:
    edit(folder, rope_parameters=PLAIN, rope_scaling=YARN)
    assert not ModelConfig.from_folder(folder).native  # transformers' own code does it

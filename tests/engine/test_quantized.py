"""Promise: weights in int8 or fp8 take half of bf16's memory, and answer within the error of their format."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.errors import ModelError
from engine.engine import Engine
from engine.models.config import ModelConfig
from engine.models.fallback_probe import alone, dense_attention
from engine.models.registry import load_model
from engine.parallel import ParallelGroup
from engine.quantized import LARGEST, QuantizedLinear, linear_maker, quantize, widen
from messages.sampling import SamplingParams

FORMATS = [torch.int8, torch.float8_e4m3fn]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_fp8_number_is_widened_exactly(dtype: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = numbers[numbers.float().isfinite()]
    out = torch.empty(len(numbers), dtype=dtype)
    widen(numbers, out)
    assert torch.equal(out.float(), numbers.float())


@settings(max_examples=60)
@given(
    rows=st.sampled_from([1, 3, 8, 9, 70]),
    outputs=st.sampled_from([1, 16, 33, 400]),
    inputs=st.sampled_from([16, 48, 300]),
    stored=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_product_is_that_of_the_stored_weights(
    rows: int, outputs: int, inputs: int, stored: torch.dtype, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(outputs, inputs).to(dtype)
    weight[0] = 0
    added = torch.randn(outputs).to(dtype) if bias else None
    x = torch.randn(rows, inputs).to(dtype)
    values, scales = quantize(weight, stored)
    expected = x.double() @ (values.double() * scales.double()[:, None]).T
    if added is not None:
        expected += added.double()
    made = QuantizedLinear(weight, added, stored=stored)(x)
    assert made.dtype is dtype
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype] * inputs**0.5
    torch.testing.assert_close(made.double(), expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stored", "bound"), [(torch.int8, 0.5), (torch.float8_e4m3fn, 16.5)])
def test_a_weight_is_off_by_half_a_step_at_most(stored: torch.dtype, bound: float, dtype: torch.dtype) -> None:
    """Steps of int8 are equal; the coarsest of fp8, at its largest values, is 32 of 448."""
    torch.manual_seed(0)
    weight = (torch.randn(64, 200) * torch.logspace(-3, 3, 64)[:, None]).to(dtype)
    values, scales = quantize(weight, stored)
    off = (values.double() * scales.double()[:, None] - weight.double()).abs().amax(1)
    # A scale that was rounded down cuts the largest value off by as much.
    slack = LARGEST[stored] * {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert bool((off <= scales.double() * (bound + slack)).all())


@pytest.mark.parametrize(("stored", "bound"), [(torch.int8, 0.01), (torch.float8_e4m3fn, 0.04)])
def test_a_product_is_off_by_little(stored: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(512, 768), torch.randn(32, 768)
    exact = x.double() @ weight.double().T
    made = QuantizedLinear(weight, None, stored=stored)(x)
    assert (made.double() - exact).norm() / exact.norm() < bound


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ModelError, match="quantization must be int8 or fp8, or not given; got 'awq'"):
        linear_maker("awq")


@pytest.mark.parametrize(("quantization", "bound"), [("int8", 0.03), ("fp8", 0.12)])
def test_a_models_log_probabilities_move_by_little(tiny_llama: Path, quantization: str, bound: float) -> None:
    prompt = [(place * 41) % 2000 + 3 for place in range(200)]
    scored = SamplingParams(max_tokens=0, prompt_logprobs=0)
    values = []
    for method in (None, quantization):
        made = Engine(tiny_llama, dtype="float32", quantization=method).generate([prompt], scored)[0].prompt_logprobs
        assert made is not None
        values.append(torch.tensor([entry.logprob for entry in made]))
    moved = (values[0] - values[1]).abs().mean()
    print(f"{quantization}: mean |log p - log p'| = {moved:.4f}")
    assert 0 < moved < bound


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
@pytest.mark.parametrize("config", [transformers.GPT2Config, transformers.OPTConfig], ids=["gpt 2", "opt"])
def test_linear_layers_of_transformers_are_quantised_too(tmp_path: Path, config: Any, quantization: str) -> None:
    small = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**small, bos_token_id=0, eos_token_id=2))
    model.save_pretrained(tmp_path)
    parsed = ModelConfig.from_folder(tmp_path)
    batch = alone(300)
    with torch.inference_mode():
        exact, made = (
            fallback.logits(fallback.forward(batch.tokens, batch.positions, dense_attention(batch)))
            for fallback in (
                load_model(tmp_path, parsed, ParallelGroup(), torch.float32, 64, method)
                for method in (None, quantization)
            )
        )
    off = float((exact - made).norm() / exact.norm())
    assert 0 < off < {"int8": 0.02, "fp8": 0.08}[quantization]

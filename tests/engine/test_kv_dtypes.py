"""Promise: a KV cache of 8 bits answers as one of 16 within stated bounds, in half of its bytes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.core.step_input import StepInput
from engine.models.config import ModelConfig
from engine.parallel import ParallelGroup
from engine.rank import RankModel
from engine.runner import kv_layout

MODEL = Path(__file__).parents[2] / "models" / "tiny-llama"
PROMPT, ANSWER, ROWS, BLOCK = 96, 32, 4, 16
BOUNDS = {"int8": (0.008, 0.97), "fp8": (0.015, 0.97)}
"""Mean absolute error of a logit against fp32's KV, in standard deviations of the logits, and the least share of
positions whose likeliest token is the same."""


def logits_of(dtype: str, kv_dtype: str) -> torch.Tensor:
    """``[ROWS * (PROMPT + ANSWER), vocab]``: prompts in two chunks, then token by token, the tokens being given."""
    config = ModelConfig.from_folder(MODEL)
    layout = kv_layout(config, dtype, BLOCK, kv_dtype=kv_dtype)
    blocks = -(-(PROMPT + ANSWER) // BLOCK)
    memory = torch.zeros(ROWS * blocks * layout.block_bytes, dtype=torch.uint8)
    model = RankModel(
        MODEL, config, ParallelGroup(), layout, dtype=dtype, kv_memory=memory, max_positions=PROMPT + ANSWER
    )
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (ROWS, PROMPT + ANSWER)).astype(np.int32)
    tables = np.arange(ROWS * blocks, dtype=np.int32).reshape(ROWS, blocks)
    made = []
    done = 0
    for count in [40, PROMPT - 40] + [1] * ANSWER:
        every = np.arange(ROWS * count, dtype=np.int32)
        step = StepInput(
            tokens[:, done : done + count].ravel(), np.full(ROWS, count, np.int32), np.full(ROWS, done, np.int32),
            tables, every, len(every),
        )  # fmt: skip
        made.append(model.logits(model.forward(step)[0]).view(ROWS, count, -1))
        done += count
    return torch.cat(made, 1).flatten(0, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", BOUNDS)
def test_logits_stay_within_bounds_of_those_of_an_unquantised_cache(kv_dtype: str, dtype: str) -> None:
    plain, quantised = logits_of(dtype, "auto"), logits_of(dtype, kv_dtype)
    error = float((plain - quantised).abs().mean() / plain.std())
    agreement = float((plain.argmax(-1) == quantised.argmax(-1)).float().mean())
    print(f"{kv_dtype} KV under {dtype}: mean absolute logit error {error:.4f} std, greedy agreement {agreement:.3f}")
    bound, least = BOUNDS[kv_dtype]
    assert error < bound
    assert agreement > least
    assert torch.equal(quantised, logits_of(dtype, kv_dtype))  # it is the same each time


@pytest.mark.parametrize("kv_dtype", BOUNDS)
def test_a_block_takes_half_of_the_bytes_and_its_scales(kv_dtype: str) -> None:
    config = ModelConfig.from_folder(MODEL)
    plain, quantised = kv_layout(config, "bfloat16", BLOCK), kv_layout(config, "bfloat16", BLOCK, kv_dtype=kv_dtype)
    assert quantised.block_bytes <= plain.block_bytes * 0.52

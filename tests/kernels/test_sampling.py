"""The sampling kernel against the CPU's sampler, row by row."""

import numpy as np
import pytest
import torch

from engine.core.sequence import Sequence
from engine.kernels import reference
from engine.kernels.sampling import sample
from engine.rng import uniforms
from engine.sampler import sample as cpu_sample
from messages.sampling import SamplingParams
from tests.kernels.cases import DEVICE

VOCAB = 700


def draw(logits: torch.Tensor, settings: list[tuple[float, float, int, float, float]]) -> list[int]:
    """``settings``: a row's (number, temperature, top-k, top-p, min-p)."""
    columns = list(zip(*settings, strict=True))
    dtypes = [torch.float64, torch.float32, torch.int32, torch.float64, torch.float32]
    tensors = [torch.tensor(column, dtype=dtype, device=DEVICE) for column, dtype in zip(columns, dtypes, strict=True)]
    return sample(logits.to(DEVICE), *tensors).tolist()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (0.0, 0, 1.0, 0.0),
        (1.0, 0, 1.0, 0.0),
        (0.7, 0, 1.0, 0.2),
        (1.0, 1, 1.0, 0.0),
        (1.3, 20, 1.0, 0.0),
        (1.0, 0, 0.9, 0.0),
        (0.8, 0, 0.01, 0.0),
        (1.5, 50, 0.8, 0.02),
        (1.0, 5000, 0.999, 0.0),
    ],
)
def test_every_row_draws_the_reference_s_token(temperature, top_k, top_p, min_p):
    rng = np.random.default_rng(7)
    logits = torch.from_numpy(rng.normal(size=(6, VOCAB)).astype(np.float32)) * 4
    numbers = [0.0, *rng.random(4).tolist(), 1 - 2**-53]
    found = draw(logits, [(number, temperature, top_k, top_p, min_p) for number in numbers])
    rows = zip(logits, numbers, strict=True)
    assert found == [reference.sample_row(row, number, temperature, top_k, top_p, min_p) for row, number in rows]


def test_it_draws_what_the_cpu_draws():
    rng = np.random.default_rng(9)
    logits = torch.from_numpy(rng.normal(size=(8, 2000)).astype(np.float32)) * 3
    params = [
        SamplingParams(max_tokens=9, temperature=0.0),
        SamplingParams(max_tokens=9, temperature=0.9, seed=3),
        SamplingParams(max_tokens=9, temperature=1.1, seed=4, min_p=0.05),
        SamplingParams(max_tokens=9, temperature=1.0, seed=5, top_p=0.8),
        SamplingParams(max_tokens=9, temperature=1.0, seed=6, top_k=7),
        SamplingParams(max_tokens=9, temperature=1.4, seed=7, top_k=1500, top_p=0.97),
        SamplingParams(
            max_tokens=9, temperature=2.0, seed=8, top_p=0.999
        ),  # of more tokens than the CPU looks at first
        SamplingParams(max_tokens=9, temperature=0.6, seed=9, top_k=40, top_p=0.9, min_p=0.02),
    ]
    sequences = [Sequence(str(row), np.arange(row + 1, dtype=np.int32), param) for row, param in enumerate(params)]
    numbers = uniforms(np.array([param.seed for param in params]), np.arange(1, 9))
    settings = [
        (number, param.temperature, param.top_k, param.top_p, param.min_p)
        for number, param in zip(numbers.tolist(), params, strict=True)
    ]
    assert draw(logits, settings) == cpu_sample(logits.clone(), sequences).tolist()


def test_a_row_s_token_depends_on_no_other_row():
    rng = np.random.default_rng(8)
    logits = torch.from_numpy(rng.normal(size=(3, VOCAB)).astype(np.float32)) * 3
    settings = [(0.3, 1.0, 40, 0.9, 0.0), (0.6, 0.5, 0, 1.0, 0.1), (0.9, 1.0, 0, 0.5, 0.0)]
    together = draw(logits, settings)
    assert together == [draw(logits[row : row + 1], settings[row : row + 1])[0] for row in range(3)]
    assert together == draw(logits.flip(0), settings[::-1])[::-1]


def test_tokens_of_equal_logits_come_in_order_of_the_vocabulary():
    logits = torch.full((4, VOCAB), -20.0)
    logits[:, [3, 100, 650]] = 2.0
    settings = [(0.0, 1.0, 3, 1.0, 0.0), (0.4, 1.0, 3, 1.0, 0.0), (0.99, 1.0, 3, 1.0, 0.0), (0.99, 1.0, 2, 1.0, 0.0)]
    assert draw(logits, settings) == [3, 100, 650, 100]
    assert draw(logits, [(0.99, 1.0, 0, 0.5, 0.0)] * 4) == [100] * 4, "two of three reach half the mass"
    assert draw(logits, [(0.99, 0.0, 0, 1.0, 0.0)] * 4) == [3] * 4


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_that_is_not_numbers_gets_no_token_and_harms_no_other(poison):
    logits = torch.zeros((3, VOCAB))
    logits[1, 5] = poison
    logits[:, 9] = 30.0
    assert draw(logits, [(0.5, 1.0, 0, 0.9, 0.0)] * 3) == [9, -1, 9]
    logits[1] = -float("inf")
    assert draw(logits, [(0.5, 0.0, 0, 1.0, 0.0)] * 3) == [9, -1, 9]


def test_forbidden_tokens_are_never_drawn():
    logits = torch.full((2, VOCAB), -float("inf"))
    logits[:, [10, 11]] = 0.0
    assert draw(logits, [(0.9999, 1.0, 0, 1.0, 0.0), (0.9999, 1.0, 600, 0.999, 0.0)]) == [11, 11]

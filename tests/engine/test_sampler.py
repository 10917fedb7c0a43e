"""Promise: sampling follows its parameters, and a token depends on (seed, position) and its own logits only."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.sequence import Sequence
from engine.rng import philox, uniforms
from engine.sampler import NOT_A_NUMBER, logprobs_of, sample
from messages.sampling import SamplingParams

VOCAB = 40


def sequence(
    seed: int = 0, prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), **params: object
) -> Sequence:
    sampling = SamplingParams(max_tokens=99, seed=seed, **params)  # type: ignore[arg-type]
    return Sequence("s", np.array(prompt, np.int32), sampling, generated=np.array(output, np.int32))


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, (rows, VOCAB))).float()


def reference(logits: torch.Tensor, seq: Sequence) -> int:
    """One row, one step after the other, in double precision."""
    params = seq.params
    values = logits.double().numpy().copy()
    for token in {*seq.token_ids.tolist()}:
        penalty = params.repetition_penalty
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token in seq.output_token_ids.tolist():
        values[token] -= params.frequency_penalty
    for token in {*seq.output_token_ids.tolist()}:
        values[token] -= params.presence_penalty
    for token, bias in params.logit_bias.items():
        values[token] += bias
    if not params.draws:
        return int(values.argmax())
    values = values / params.temperature
    probabilities = np.exp(values - values.max())
    probabilities /= probabilities.sum()
    probabilities[probabilities < params.min_p * probabilities.max()] = 0
    order = np.argsort(-values, kind="stable")
    kept = probabilities[order]
    if params.top_k:
        kept[params.top_k :] = 0
    total, before = kept.sum(), 0.0
    for place in range(len(values)) if params.top_p < 1 else ():
        value = kept[place]
        if before >= params.top_p * total:
            kept[place] = 0
        before += value
    number = uniforms(np.array([params.seed]), np.array([seq.num_tokens]))[0] * kept.sum()
    kept = kept[np.argsort(order)]
    return int(np.searchsorted(kept.cumsum(), number, side="right"))


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**40),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 17, 500]),
    top_p=st.sampled_from([1.0, 0.9, 0.31, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.9, -0.9]),
    frequency_penalty=st.sampled_from([0.0, 0.6]),
    logit_bias=st.sampled_from([{}, {3: 2.5, 39: -90.0}]),
)
def test_the_batched_sampler_equals_the_slow_one(seed: int, **params: object) -> None:
    seq = sequence(seed, (1, 2, 3), (3, 5, 5), **params)
    logits = logits_of(seed % 1000)
    assert sample(logits.clone(), [seq])[0] == reference(logits[0], seq)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**40),
    spread=st.sampled_from([0.01, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 1023, 1024, 1025, 2999]),
    top_p=st.sampled_from([1.0, 0.999, 0.5, 0.1]),
    min_p=st.sampled_from([0.0, 0.02, 0.9]),
)
def test_looking_at_the_likeliest_first_changes_nothing(seed: int, spread: float, **params: object) -> None:
    """A vocabulary larger than the candidates, flat or steep."""
    logits = torch.from_numpy(np.random.default_rng(seed % 1000).normal(0, spread, (1, 3000)))
    seq = sequence(seed, temperature=1.0, **params)
    assert sample(logits.float(), [seq])[0] == reference(logits.float()[0], seq)


@pytest.mark.parametrize(
    "extreme", [{"temperature": 1e-38}, {"temperature": 1e-6}, {"top_p": 1e-46}, {"top_p": 1e-46, "top_k": 5}]
)
def test_the_most_extreme_values_give_the_likeliest_token(extreme: dict[str, object]) -> None:
    logits = logits_of(11)
    for seed in range(20):
        assert sample(logits.clone(), [sequence(seed, **extreme)])[0] == int(logits.argmax())


def test_logits_that_overflow_spoil_their_own_row_only() -> None:
    logits = logits_of(3, 2)
    logits[1, 5] = float("inf")
    assert sample(logits, [sequence(1), sequence(2)])[1] == NOT_A_NUMBER


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    sequences = [
        sequence(1, temperature=1.0),
        sequence(2, temperature=0.7, top_k=5),
        sequence(3, temperature=0),
        sequence(4, temperature=1.3, top_p=0.8, min_p=0.02),
        sequence(5, temperature=1.0, repetition_penalty=1.4),
    ]
    logits = logits_of(9, len(sequences))
    together = sample(logits.clone(), sequences)
    alone = [sample(logits[row : row + 1].clone(), [seq])[0] for row, seq in enumerate(sequences)]
    assert together.tolist() == alone


@pytest.mark.parametrize("params", [{}, {"top_k": 9}, {"top_p": 0.95}, {"top_k": 9, "top_p": 0.95, "min_p": 0.01}])
def test_rounding_changes_no_token_though_many_are_equally_likely(params: dict[str, object]) -> None:
    """Eight tokens within 1e-6 of each other, in another order of likelihood each time, and a tail."""
    rng = np.random.default_rng(5)
    logits = torch.full((200, VOCAB), -2.0) + torch.from_numpy(rng.normal(0, 0.3, (200, VOCAB))).float()
    logits[:, rng.permutation(VOCAB)[:8]] = 3.0
    sequences = [sequence(seed, temperature=1.0, **params) for seed in range(200)]
    noise = torch.from_numpy(rng.uniform(-1e-6, 1e-6, (2, *logits.shape))).float()
    assert (sample(logits + noise[0], sequences) == sample(logits + noise[1], sequences)).all()


def test_position_and_not_history_keys_the_generator() -> None:
    logits = logits_of(4)
    one = sample(logits.clone(), [sequence(6, (1, 2, 3, 4), ())])
    two = sample(logits.clone(), [sequence(6, (9, 8), (7, 6))])
    assert one == two


def test_frequencies_follow_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0] + [-50.0] * (VOCAB - 4)])
    drawn = sample(logits.repeat(20_000, 1), [sequence(seed, temperature=1.0) for seed in range(20_000)])
    expected = torch.softmax(logits[0], -1)[:4].numpy()
    assert np.abs(np.bincount(drawn, minlength=VOCAB)[:4] / 20_000 - expected).max() < 0.012


def test_philox_gives_the_published_numbers() -> None:
    """Known answers of Random123 (kat_vectors, philox 4x32 10)."""
    ones = 0xFFFFFFFF
    known = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, [ones] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, answer in known:
        assert philox(np.array([counter], np.uint64), np.array([key], np.uint64)).tolist() == [answer]


def test_logits_that_are_no_numbers_spoil_their_own_row_only() -> None:
    logits = logits_of(3, 3)
    logits[1, 5] = float("nan")
    sequences = [sequence(1, temperature=0), sequence(2, temperature=1.0), sequence(3, temperature=1.0)]
    tokens = sample(logits, sequences)
    assert tokens[1] == NOT_A_NUMBER
    assert tokens[0] >= 0 and tokens[2] >= 0


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = logits_of(8, 2)
    entries = logprobs_of(logits, [3, 7], [2, 0])
    expected = torch.log_softmax(logits, -1)
    for row, (entry, token) in enumerate(zip(entries, (3, 7), strict=True)):
        assert entry.logprob == pytest.approx(float(expected[row, token]))
        assert entry.rank == int((expected[row] > expected[row, token]).sum()) + 1
    assert entries[0].top_ids == tuple(expected[0].topk(2).indices.tolist())
    assert entries[1].top_ids == ()

"""From logits to tokens, for all rows of a step at once.

Order as in vLLM: penalties, logit bias, temperature, min-p, top-k, top-p. One number a token is drawn, from a generator
keyed by (seed, position), and looked up in the cumulated probabilities: a row's token depends on its own logits only.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from engine.core.outputs import TokenLogprobs
from engine.core.sequence import Sequence
from engine.rng import uniforms
from messages.sampling import SamplingParams

NOT_A_NUMBER = -1
"""The token of a row whose logits are not numbers."""


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> NDArray[np.int32]:
    """``logits [rows, vocab]``, fp32, overwritten -> each row's next token, ``NOT_A_NUMBER`` where there is none."""
    if not all(seq.plain_greedy for seq in sequences):
        for row, seq in enumerate(sequences):
            if seq.params.alters_logits:
                _penalise(logits[row], seq)
    best, tokens = logits.max(-1)
    lost = best.isnan()
    # Rows that are truncated draw from the sorted vocabulary, others from the plain one; whoever shares the step.
    for truncates in (False, True):
        drawn = [row for row, seq in enumerate(sequences) if seq.params.draws and seq.params.truncates is truncates]
        if drawn:
            tokens[torch.tensor(drawn)] = _draw(logits[torch.tensor(drawn)], [sequences[row] for row in drawn])
    return torch.where(lost, NOT_A_NUMBER, tokens).to(torch.int32).numpy()


def _penalise(logits: torch.Tensor, seq: Sequence) -> None:
    """Penalties and biases of one row, in place."""
    params, vocab = seq.params, logits.shape[0]
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(seq.token_ids)).long()
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        output, counts = np.unique(seq.output_token_ids, return_counts=True)
        amounts = params.frequency_penalty * counts + params.presence_penalty
        logits[torch.from_numpy(output).long()] -= torch.from_numpy(amounts).to(logits.dtype)
    for token, bias in params.logit_bias.items():
        if token < vocab:
            logits[token] += bias


def _draw(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """Draw for rows that are all truncated (top-k, top-p), or all not."""
    params = [seq.params for seq in sequences]
    logits = logits / _column([param.temperature for param in params])
    order = None
    if params[0].truncates:
        logits, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = torch.softmax(logits, -1)
    if any(param.min_p for param in params):
        floor = _column([param.min_p for param in params]) * probabilities.amax(-1, keepdim=True)
        probabilities = torch.where(probabilities < floor, 0.0, probabilities)
    if order is not None:
        probabilities = _truncate(probabilities, params)
    # In double precision: a sum over a large vocabulary in fp32 loses its last tokens.
    cumulated = probabilities.double().cumsum(-1)
    numbers = uniforms(
        np.array([param.seed for param in params], np.int64), np.array([seq.num_tokens for seq in sequences], np.int64)
    )
    target = torch.from_numpy(numbers)[:, None] * cumulated[:, -1:]
    places = torch.searchsorted(cumulated, target, right=True).clamp_(max=logits.shape[-1] - 1)
    return (places if order is None else order.gather(-1, places)).squeeze(-1)


def _truncate(probabilities: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Top-k, then top-p of what is left; ``probabilities`` come sorted, likeliest first."""
    vocab = probabilities.shape[-1]
    top_k = _column([param.top_k or vocab for param in params])
    kept = torch.where(torch.arange(vocab) < top_k, probabilities, 0.0)
    # A token is kept when those before it have not reached top_p; so the likeliest always is.
    before = kept.cumsum(-1) - kept
    top_p = _column([param.top_p for param in params]) * kept.sum(-1, keepdim=True)
    return torch.where((before < top_p) | (top_p >= kept.sum(-1, keepdim=True)), kept, 0.0)


def logprobs_of(logits: torch.Tensor, tokens: list[int], counts: list[int]) -> list[TokenLogprobs]:
    """For each row of raw ``logits [rows, vocab]``: its token's log-probability, and the ``counts[row]`` likeliest."""
    if not tokens:
        return []
    logprobs = torch.log_softmax(logits.float(), -1)
    chosen = logprobs.gather(-1, torch.tensor(tokens)[:, None])
    ranks = (logprobs > chosen).sum(-1) + 1
    top, ids = logprobs.topk(max(*counts, 1), dim=-1)
    return [
        TokenLogprobs(token, value, rank, tuple(row_ids[:count]), tuple(row_top[:count]))
        for token, value, rank, row_ids, row_top, count in zip(
            tokens, chosen[:, 0].tolist(), ranks.tolist(), ids.tolist(), top.tolist(), counts, strict=True
        )
    ]


def _column(values: list[float] | list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]

"""From logits to tokens, for all rows of a step at once.

Order as in vLLM: penalties, logit bias, temperature, min-p, top-k, top-p. One number a token is drawn, from a generator
keyed by (seed, position), and looked up in the probabilities cumulated in the vocabulary's order: a row's token depends
on its own logits only, and hardly ever on their rounding.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from engine import ops
from engine.core.outputs import TokenLogprobs
from engine.core.sequence import Sequence
from engine.rng import uniforms

NOT_A_NUMBER = -1
"""The token of a row whose logits are not all finite."""
CANDIDATES = 1024
"""Likeliest tokens that top-k and top-p look at first; the whole vocabulary is sorted only where they are too few."""


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> NDArray[np.int32]:
    """``logits [rows, vocab]``, fp32, overwritten -> each row's next token, ``NOT_A_NUMBER`` where there is none."""
    if not all(seq.plain_greedy for seq in sequences):
        for row, seq in enumerate(sequences):
            if seq.params.alters_logits:
                penalise(logits[row], seq)
    best, tokens = logits.max(-1)
    lost = ~best.isfinite()
    for truncates, draw in ((False, _draw), (True, _draw_truncated)):
        drawn = [row for row, seq in enumerate(sequences) if seq.params.draws and seq.params.truncates is truncates]
        if drawn:
            chosen = [sequences[row] for row in drawn]
            warm = logits[torch.tensor(drawn)] / _column([seq.params.temperature for seq in chosen])
            tokens[torch.tensor(drawn)] = draw(warm, chosen)
    return torch.where(lost, NOT_A_NUMBER, tokens).to(torch.int32).numpy()


def sampler_for(logits: torch.Tensor) -> Callable[[torch.Tensor, list[Sequence]], NDArray[np.int32]]:
    """``sample`` where the logits are on a CPU, else the kernel that draws the same."""
    if ops.fused(logits):
        from engine.kernels.sampler import sample as on_device

        return on_device
    return sample


def penalise(logits: torch.Tensor, seq: Sequence) -> None:
    """Penalties and biases of one row, in place."""
    params, vocab = seq.params, logits.shape[0]
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(seq.token_ids)).long()
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        output, counts = np.unique(seq.output_token_ids, return_counts=True)
        amounts = params.frequency_penalty * counts + params.presence_penalty
        logits[torch.from_numpy(output).long()] -= torch.from_numpy(amounts).to(logits)
    biased = [token for token in params.logit_bias if token < vocab]
    if biased:
        logits[torch.tensor(biased)] += torch.tensor([params.logit_bias[token] for token in biased]).to(logits)


def _draw(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """``logits [rows, vocab]``, divided by their temperatures -> tokens of rows that top-k and top-p leave whole."""
    probabilities = torch.softmax(logits, -1)
    min_p = [seq.params.min_p for seq in sequences]
    if any(min_p):
        floor = _column(min_p) * probabilities.amax(-1, keepdim=True)
        probabilities = torch.where(probabilities < floor, 0.0, probabilities)
    return _pick(probabilities.double(), sequences).squeeze(-1)


def _draw_truncated(logits: torch.Tensor, sequences: list[Sequence], width: int = CANDIDATES) -> torch.Tensor:
    """The same for rows with top-k, or top-p of what that leaves, among the ``width`` likeliest tokens.

    Where what is dropped begins behind those, the row is drawn again from all. Which way a row takes depends on itself
    only, and so does its token.
    """
    vocab, params = logits.shape[-1], [seq.params for seq in sequences]
    width = min(width, vocab)
    likeliest, order = logits.topk(width, dim=-1)
    probabilities = (likeliest - logits.logsumexp(-1, keepdim=True)).double().exp()
    top_k, top_p, min_p = (
        _column([getattr(param, name) for param in params]).double() for name in ("top_k", "top_p", "min_p")
    )
    places = torch.arange(width)
    stays = (probabilities >= min_p * probabilities[:, :1]) & ((places < top_k) | (top_k == 0))
    kept = torch.where(stays, probabilities, 0.0)
    mass = kept.sum(-1, keepdim=True)
    whole = ~stays[:, -1:] | (top_k == width) | (width == vocab)  # nothing behind the candidates stays
    total = torch.where(whole, mass, 1.0)
    # A token is kept when those before it have not reached top_p; so the likeliest always is.
    before = kept.cumsum(-1) - kept
    kept = torch.where((before < top_p * total) | (top_p == 1) | (places == 0), kept, 0.0)
    # Drawn in the vocabulary's order: by likelihood, two tokens that are all but equal would change places by rounding.
    order, places = order.sort(-1)
    tokens = order.gather(-1, _pick(kept.gather(-1, places), sequences)).squeeze(-1)
    enough = whole | ((min_p == 0) & (top_k == 0) & (top_p <= mass))
    lacking = (~enough.squeeze(-1)).nonzero().squeeze(-1)
    if len(lacking):
        tokens[lacking] = _draw_truncated(logits[lacking], [sequences[row] for row in lacking.tolist()], vocab)
    return tokens


def _pick(probabilities: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """``probabilities [rows, places]``, double, of any sum -> a place for each row, ``[rows, 1]``."""
    # In double precision: a sum over a large vocabulary in fp32 loses its last tokens.
    cumulated = probabilities.cumsum(-1)
    seeds = np.array([seq.params.seed for seq in sequences], np.int64)
    numbers = uniforms(seeds, np.array([seq.num_tokens for seq in sequences], np.int64))
    target = torch.from_numpy(numbers)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True).clamp_(max=probabilities.shape[-1] - 1)


def logprobs_of(logits: torch.Tensor, tokens: list[int], counts: list[int]) -> list[TokenLogprobs]:
    """For each row of raw ``logits [rows, vocab]``: its token's log-probability, and the ``counts[row]`` likeliest."""
    if not tokens:
        return []
    logprobs = torch.log_softmax(logits.float(), -1)
    chosen = logprobs.gather(-1, torch.tensor(tokens, device=logprobs.device)[:, None])
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

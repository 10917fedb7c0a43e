"""``engine.sampler.sample`` for logits on a GPU: the same tokens, and only they come back to the host."""

import numpy as np
import torch
from numpy.typing import NDArray

from engine.core.sequence import Sequence
from engine.kernels import sampling
from engine.rng import uniforms
from engine.sampler import penalise


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> NDArray[np.int32]:
    """``logits [rows, vocab]``, fp32, overwritten -> each row's next token, -1 where its logits are not all finite."""
    for row, seq in enumerate(sequences):
        if seq.params.alters_logits:
            penalise(logits[row], seq)
    params = [seq.params for seq in sequences]
    settings = np.array(
        [
            uniforms(
                np.array([param.seed for param in params], np.int64),
                np.array([seq.num_tokens for seq in sequences], np.int64),
            ),
            [param.temperature if param.draws else 0.0 for param in params],
            [param.top_k for param in params],
            [param.top_p for param in params],
            [param.min_p for param in params],
        ],
        np.float64,
    )
    numbers, temperature, top_k, top_p, min_p = torch.from_numpy(settings).to(logits.device).unbind(0)
    tokens = sampling.sample(logits, numbers, temperature.float(), top_k.int(), top_p, min_p.float())
    return tokens.cpu().numpy()

"""What a step of the model returns."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural, of the model's own distribution) at one position."""

    token_id: int
    logprob: float
    rank: int
    """1 is the likeliest token."""
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Row by row for the plan's rows that sample."""

    tokens: NDArray[np.int32]
    """``[rows that sample]``; -1 where the logits were not numbers."""
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """By row of the plan, for those that asked."""
    not_numbers: frozenset[int] = frozenset()
    """Rows of the plan whose KV cannot be relied on: a hidden state in them was not finite."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """By row of the plan: for the prompt tokens whose predecessors were computed in this step."""

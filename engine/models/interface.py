"""What the engine asks of a model, and what a model asks of the engine."""

from typing import Protocol

import torch


class Attend(Protocol):
    """Attention of one step over the paged cache, made anew for each step."""

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """``query [tokens, heads, head_dim]``, ``key`` and ``value [tokens, kv_heads, head_dim]``, all rotated, strided
        as they come -> ``[tokens, heads * head_dim]``.

        Writes the step's keys and values into the cache, then attends to all that the cache holds of each sequence.
        ``window``: a token sees itself and the ``window - 1`` tokens before it. ``scale`` of the scores:
        ``head_dim ** -0.5`` if not given. ``softcap``: scores become ``softcap * tanh(scores / softcap)``.
        """


class Model(Protocol):
    """One rank's part of a model."""

    fixed_launches: bool
    """Whether its launches on a GPU depend on the number of tokens alone, so that a CUDA graph can hold them."""

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """``tokens``, ``positions [tokens]``, int64 or int32 -> hidden states ``[tokens, hidden]``, the same on every
        rank."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, hidden]`` -> ``[rows, vocab]``; every rank must call it, only rank 0's result is whole."""

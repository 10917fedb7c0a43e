"""One rank's model and KV cache: runs a step's plan, returns a step's output."""

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.attention import PagedAttention
from engine.core.errors import ModelError
from engine.core.kv_layout import KVLayout
from engine.core.outputs import StepOutput, TokenLogprobs
from engine.core.scheduler import StepPlan
from engine.models.config import ModelConfig
from engine.models.llama import Llama
from engine.parallel import ParallelGroup
from engine.sampler import logprobs_of, sample

# torch asks for huge pages for large tensors where this is set before its first one: steadier, and up to 20 % faster.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

SCORED_ROWS = 256
"""Prompt positions whose logits are made at once when a prompt is scored: bounds the memory for a long one."""


def kv_layout(config: ModelConfig, dtype: str, block_size: int, group: ParallelGroup | None = None) -> KVLayout:
    """The layout of one rank's KV blocks for a model."""
    group = group or ParallelGroup()
    kv_heads = group.share(config.num_kv_heads, "KV heads")
    return KVLayout(config.num_layers, kv_heads, config.head_dim, block_size, config.resolve_dtype(dtype))


class ModelRunner:
    """Loads ``folder`` and owns the views of its KV cache.

    ``kv_memory``: ``num_blocks * layout.block_bytes`` bytes (uint8) of the caller's, for example shared memory; without
    it the cache is allocated here. Raises ``ModelError``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        device: str = "cpu",
        num_blocks: int,
        block_size: int,
        kv_memory: torch.Tensor | None = None,
        max_model_len: int | None = None,
    ) -> None:
        if device != "cpu":
            raise ModelError(f"device must be cpu in this version, got {device!r}")
        self.config = ModelConfig.from_folder(folder)
        self.layout = kv_layout(self.config, dtype, block_size)
        torch_dtype: torch.dtype = getattr(torch, self.layout.dtype)
        if kv_memory is None:
            # From numpy: its zeros are pages that cost nothing until they are touched.
            kv_memory = torch.from_numpy(np.zeros(num_blocks * self.layout.block_bytes, np.uint8))
        self.kv_cache = kv_memory.view(torch_dtype).view(self.layout.shape(num_blocks))
        max_positions = min(max_model_len or self.config.max_position_embeddings, self.config.max_position_embeddings)
        with torch.inference_mode():
            self._model = Llama(folder, self.config, ParallelGroup(), torch_dtype, max_positions)
            self._attention = PagedAttention(self.layout, self.kv_cache, self.config.num_heads)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepOutput:
        """Compute every row of ``plan`` in one call of the model, write its KV, and sample where a row catches up."""
        starts = np.zeros(len(plan.sequences) + 1, np.int64)
        np.cumsum(plan.num_tokens, out=starts[1:])
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1] - plan.num_computed, plan.num_tokens)
        tokens = np.empty(starts[-1], np.int64)
        for row, seq in enumerate(plan.sequences):
            computed = seq.num_computed_tokens
            tokens[starts[row] : starts[row + 1]] = seq.token_ids[computed : computed + plan.num_tokens[row]]
        self._clear_tails(plan)
        attend = self._attention.prepare(plan, positions, starts)
        hidden = self._model.forward(torch.from_numpy(tokens), torch.from_numpy(positions), attend)
        prompt_logprobs = self._score_prompts(plan, hidden, starts)
        rows = np.flatnonzero(plan.samples)
        if not len(rows):
            return StepOutput(np.empty(0, np.int32), {}, prompt_logprobs)
        logits = self._model.logits(hidden[torch.from_numpy(starts[rows + 1] - 1)]).float()
        return self._sample(plan, rows, logits, prompt_logprobs)

    def _clear_tails(self, plan: StepPlan) -> None:
        """Zero each block that this step begins and does not fill: attention masks what is behind a sequence's end,
        but 0 times a former owner's NaN is NaN."""
        size = self.layout.block_size
        ends = plan.num_computed + plan.num_tokens
        last = (ends - 1) // size
        for row in np.flatnonzero((last * size >= plan.num_computed) & (ends % size != 0)):
            self.kv_cache[int(plan.sequences[row].block_table[last[row]])] = 0

    def _sample(
        self,
        plan: StepPlan,
        rows: NDArray[np.int64],
        logits: torch.Tensor,
        prompt_logprobs: dict[int, list[TokenLogprobs]],
    ) -> StepOutput:
        sequences = [plan.sequences[row] for row in rows]
        asked = [place for place, seq in enumerate(sequences) if seq.params.logprobs is not None]
        raw = logits[asked].clone() if asked else logits
        tokens = sample(logits, sequences)
        logprobs: dict[int, TokenLogprobs] = {}
        asked_valid = [place for place in asked if tokens[place] >= 0]
        if asked_valid:
            chosen = [int(tokens[place]) for place in asked_valid]
            counts = [sequences[place].params.logprobs or 0 for place in asked_valid]
            raw_rows = raw[[asked.index(place) for place in asked_valid]]
            made = logprobs_of(raw_rows, chosen, counts)
            logprobs = {int(rows[place]): entry for place, entry in zip(asked_valid, made, strict=True)}
        return StepOutput(tokens, logprobs, prompt_logprobs)

    def _score_prompts(
        self, plan: StepPlan, hidden: torch.Tensor, starts: NDArray[np.int64]
    ) -> dict[int, list[TokenLogprobs]]:
        """Log-probabilities of prompt tokens, for rows that asked for them."""
        scored: dict[int, list[TokenLogprobs]] = {}
        for row, seq in enumerate(plan.sequences):
            count = seq.params.prompt_logprobs
            if count is None:
                continue
            first = seq.num_computed_tokens
            last = min(first + int(plan.num_tokens[row]), seq.num_prompt_tokens - 1)  # predicts the token after it
            entries: list[TokenLogprobs] = []
            for start in range(first, last, SCORED_ROWS):
                end = min(start + SCORED_ROWS, last)
                offset = int(starts[row]) - first
                logits = self._model.logits(hidden[offset + start : offset + end])
                targets = seq.token_ids[start + 1 : end + 1].tolist()
                entries += logprobs_of(logits, targets, [count] * len(targets))
            scored[row] = entries
        return scored

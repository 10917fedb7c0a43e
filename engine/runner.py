"""Rank 0's shell around a model: turns a step's plan into arrays, runs them, and samples."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.core.errors import ModelError
from engine.core.kv_layout import KVLayout
from engine.core.outputs import StepOutput, TokenLogprobs
from engine.core.scheduler import StepPlan
from engine.core.step_input import StepInput
from engine.models.config import ModelConfig
from engine.parallel import ParallelGroup
from engine.rank import RankModel
from engine.sampler import logprobs_of, sampler_for


def kv_layout(
    config: ModelConfig, dtype: str, block_size: int, *, kv_dtype: str = "auto", group: ParallelGroup | None = None
) -> KVLayout:
    """The layout of one rank's KV blocks for a model; ``kv_dtype`` auto is the dtype that the model computes in."""
    try:
        heads = (group or ParallelGroup()).heads(config.num_heads, config.num_kv_heads)
    except ValueError as error:
        raise ModelError(f"tensor_parallel: {error}") from error
    stored = config.resolve_dtype(dtype) if kv_dtype == "auto" else kv_dtype
    return KVLayout(config.num_layers, len(heads.kv), config.head_dim, block_size, stored)


class ModelRunner:
    """Loads ``folder`` and runs steps.

    ``kv_memory``: ``num_blocks * layout.block_bytes`` bytes (uint8) of the caller's, for example shared memory; without
    it the cache is allocated here. ``swap_blocks``: of the host tier. ``broadcast`` is given each step before
    it is run, for the group's other ranks. Raises ``ModelError``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        device: str = "cpu",
        num_blocks: int,
        block_size: int,
        kv_dtype: str = "auto",
        quantization: str | None = None,
        kv_memory: torch.Tensor | None = None,
        max_model_len: int | None = None,
        swap_blocks: int = 0,
        group: ParallelGroup | None = None,
        broadcast: Callable[[StepInput], None] = lambda step: None,
    ) -> None:
        if device.partition(":")[0] not in ("cpu", "cuda"):
            raise ModelError(f"device must be cpu or cuda, got {device!r}")
        if device != "cpu" and not torch.cuda.is_available():
            raise ModelError(f"device is {device}, but torch sees no CUDA device here; write cpu")
        self.config = ModelConfig.from_folder(folder)
        group = group or ParallelGroup()
        self.layout = kv_layout(self.config, dtype, block_size, kv_dtype=kv_dtype, group=group)
        if kv_memory is not None and kv_memory.device.type != torch.device(device).type:
            raise ModelError(f"the KV cache's memory is on {kv_memory.device}, but the model is to run on {device}")
        if kv_memory is None and device != "cpu":
            kv_memory = torch.zeros(num_blocks * self.layout.block_bytes, dtype=torch.uint8, device=device)
        elif kv_memory is None:
            # From numpy: its zeros are pages that cost nothing until they are touched.
            kv_memory = torch.from_numpy(np.zeros(num_blocks * self.layout.block_bytes, np.uint8))
        self._broadcast = broadcast
        self._model = RankModel(
            folder,
            self.config,
            group,
            self.layout,
            dtype=self.config.resolve_dtype(dtype),
            kv_memory=kv_memory,
            max_positions=max_model_len or self.config.max_position_embeddings,
            quantization=quantization,
            swap_blocks=swap_blocks,
            device=device,
        )
        self.kv_cache = self._model.kv_cache
        self.layers = self._model.layers

    def run(self, plan: StepPlan) -> StepOutput:
        """Compute every row of ``plan`` in one call of the model, write its KV, and sample where a row catches up."""
        step = step_input(plan, self.layout.block_size)
        self._broadcast(step)
        with self._model.group.step():
            hidden, not_numbers = self._model.forward(step)
            chunks = [self._model.logits(hidden[rows]) for rows in step.logit_chunks()[: 1 if step.num_sampled else 0]]
            scored = self._score_prompts(plan, step, hidden)
        rows = np.flatnonzero(plan.samples)
        if not chunks:
            return StepOutput(np.empty(0, np.int32), not_numbers=not_numbers, prompt_logprobs=scored)
        with torch.inference_mode():
            tokens, logprobs = self._sample(plan, rows, chunks[0])
        return StepOutput(tokens, logprobs, not_numbers, scored)

    def _sample(
        self,
        plan: StepPlan,
        rows: NDArray[np.int64],
        logits: torch.Tensor,
    ) -> tuple[NDArray[np.int32], dict[int, TokenLogprobs]]:
        sequences = [plan.sequences[row] for row in rows]
        asked = [place for place, seq in enumerate(sequences) if seq.params.logprobs is not None]
        raw = logits[asked].clone() if asked else logits
        tokens = sampler_for(logits)(logits, sequences)
        logprobs: dict[int, TokenLogprobs] = {}
        asked_valid = [place for place in asked if tokens[place] >= 0]
        if asked_valid:
            chosen = [int(tokens[place]) for place in asked_valid]
            counts = [sequences[place].params.logprobs or 0 for place in asked_valid]
            raw_rows = raw[[asked.index(place) for place in asked_valid]]
            made = logprobs_of(raw_rows, chosen, counts)
            logprobs = {int(rows[place]): entry for place, entry in zip(asked_valid, made, strict=True)}
        return tokens, logprobs

    def _score_prompts(self, plan: StepPlan, step: StepInput, hidden: torch.Tensor) -> dict[int, list[TokenLogprobs]]:
        """Log-probabilities of prompt tokens, for rows that asked for them."""
        scored: dict[int, list[TokenLogprobs]] = {}
        if step.num_sampled == len(step.logit_rows):
            return scored
        rows: list[int] = []
        targets: list[int] = []
        counts: list[int] = []
        for row, first, last in _scored_ranges(plan):
            rows += [row] * (last - first)
            seq = plan.sequences[row]
            targets += seq.token_ids[first + 1 : last + 1].tolist()
            counts += [seq.params.prompt_logprobs or 0] * (last - first)
        entries: list[TokenLogprobs] = []
        for chunk in step.logit_chunks()[1 if step.num_sampled else 0 :]:
            logits = self._model.logits(hidden[chunk])
            part = slice(chunk.start - step.num_sampled, chunk.stop - step.num_sampled)
            entries += logprobs_of(logits, targets[part], counts[part])
        for row, entry in zip(rows, entries, strict=True):
            scored.setdefault(row, []).append(entry)
        return scored


def step_input(plan: StepPlan, block_size: int) -> StepInput:
    """The arrays of a plan."""
    ends = plan.num_computed + plan.num_tokens
    starts = np.zeros(len(ends) + 1, np.int64)
    np.cumsum(plan.num_tokens, out=starts[1:])
    num_blocks = -(-ends // block_size)
    tokens = np.empty(starts[-1], np.int32)
    tables = np.empty((len(ends), int(num_blocks.max())), np.int32)
    for row, seq in enumerate(plan.sequences):
        tokens[starts[row] : starts[row + 1]] = seq.token_ids[plan.num_computed[row] : ends[row]]
        blocks = seq.block_table[: num_blocks[row]]
        tables[row, : len(blocks)] = blocks
        tables[row, len(blocks) :] = blocks[0]
    sampled = starts[1:][plan.samples] - 1
    scored = [
        np.arange(first, last) - plan.num_computed[row] + starts[row] for row, first, last in _scored_ranges(plan)
    ]
    return StepInput(
        tokens=tokens,
        num_tokens=plan.num_tokens,
        num_computed=plan.num_computed,
        block_tables=tables,
        logit_rows=np.concatenate([sampled, *scored]).astype(np.int32),
        num_sampled=len(sampled),
        moves=plan.moves,
    )


def _scored_ranges(plan: StepPlan) -> list[tuple[int, int, int]]:
    """Rows whose prompts are scored, and the positions (first, last) whose logits predict a prompt token."""
    ranges = []
    for row, seq in enumerate(plan.sequences):
        if seq.params.prompt_logprobs is not None:
            first = int(plan.num_computed[row])
            last = min(first + int(plan.num_tokens[row]), seq.num_prompt_tokens - 1)  # predicts the token after it
            if first < last:
                ranges.append((row, first, last))
    return ranges

"""The engine by itself, in process: for scripts, tests and benchmarks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np

from engine.core.blocks import BlockPool
from engine.core.outputs import TokenLogprobs
from engine.core.scheduler import Progress, Scheduler, SchedulerLimits
from engine.core.sequence import Sequence
from engine.core.step_input import StepInput
from engine.models.config import ModelConfig
from engine.parallel import ParallelGroup
from engine.runner import ModelRunner, kv_layout
from engine.weights import resolve_model
from messages.sampling import FinishReason, SamplingParams


@dataclass(slots=True)
class Completion:
    """What one prompt came to."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None


class Engine:
    """One model, one scheduler, one pool. ``ModelError`` for a model that cannot be served."""

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        kv_bytes: int = 256 << 20,
        block_size: int = 16,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        prefill_chunk: int = 512,
        max_model_len: int | None = None,
        group: ParallelGroup | None = None,
        broadcast: Callable[[StepInput], None] = lambda step: None,
    ) -> None:
        """``kv_bytes``: of this rank's KV pool. ``group`` and ``broadcast``: see ``ModelRunner``; for rank 0."""
        folder = resolve_model(str(model))
        config = ModelConfig.from_folder(folder)
        num_blocks = max(1, kv_bytes // kv_layout(config, dtype, block_size, group=group).block_bytes)
        context = min(max_model_len or config.max_position_embeddings, config.max_position_embeddings)
        self.max_model_len = context
        limits = SchedulerLimits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=context,
            prefill_chunk=prefill_chunk,
        )
        self.runner = ModelRunner(
            folder,
            dtype=dtype,
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=context,
            group=group,
            broadcast=broadcast,
        )
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(self.pool, limits, frozenset(config.eos_token_ids))
        self._ids = count()

    def add(self, prompt: Iterable[int], params: SamplingParams, *, generated: Iterable[int] = ()) -> str:
        """Queue a prompt; returns its id. ``CapacityError`` where it can never fit."""
        seq_id = str(next(self._ids))
        tokens = np.fromiter(prompt, np.int32)
        self.scheduler.add(Sequence(seq_id, tokens, params, generated=np.fromiter(generated, np.int32)))
        return seq_id

    def step(self) -> list[Progress]:
        """Schedule, run, update; an empty list where there is nothing to do."""
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        return self.scheduler.update(plan, self.runner.run(plan))

    def abort(self, seq_id: str) -> None:
        """Drop a sequence and free its blocks; nothing happens where it has ended."""
        seq = self.scheduler.remove(seq_id)
        if seq is not None:
            self.pool.free(seq.take_blocks())

    def generate(self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[Completion]:
        """All prompts together, to their ends, in the order given."""
        each = params if isinstance(params, list) else [params] * len(prompts)
        completions = {self.add(prompt, param): Completion() for prompt, param in zip(prompts, each, strict=True)}
        while any(completion.finish_reason is None for completion in completions.values()):
            for progress in self.step():
                record(completions[progress.seq.seq_id], progress)
        return list(completions.values())


def record(completion: Completion, progress: Progress) -> None:
    """Add what a step did to a completion."""
    if progress.token is not None:
        completion.token_ids.append(progress.token)
    if progress.logprobs is not None:
        completion.logprobs.append(progress.logprobs)
    if progress.prompt_logprobs is not None:
        completion.prompt_logprobs = progress.prompt_logprobs
    completion.finish_reason = progress.finish_reason

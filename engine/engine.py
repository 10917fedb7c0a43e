"""The engine by itself, in process: for scripts, tests and benchmarks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import numpy as np

from engine.core.blocks import BlockPool
from engine.core.host_tier import HostTier
from engine.core.outputs import TokenLogprobs
from engine.core.scheduler import Preemption, Progress, Scheduler, SchedulerLimits
from engine.core.sequence import Sequence
from engine.core.step_input import StepInput
from engine.models.config import ModelConfig
from engine.parallel import ParallelGroup
from engine.runner import ModelRunner, kv_layout
from engine.weights import resolve_model
from messages.sampling import FinishReason, SamplingParams, seed_of_sample


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
        device: str = "cpu",
        kv_dtype: str = "auto",
        quantization: str | None = None,
        kv_bytes: int = 256 << 20,
        block_size: int = 16,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        prefill_chunk: int = 512,
        max_model_len: int | None = None,
        enable_prefix_caching: bool = True,
        preemption: str = Preemption.RECOMPUTE,
        swap_space: int = 0,
        expected_output: int = 1024,
        group: ParallelGroup | None = None,
        broadcast: Callable[[StepInput], None] = lambda step: None,
    ) -> None:
        """``kv_bytes`` of blocks, and ``swap_space`` bytes of them in host memory; both of each rank.

        ``ValueError`` for an option that cannot be.
        """
        if preemption not in set(Preemption):
            raise ValueError(f"preemption must be {' or '.join(Preemption)}, got {preemption!r}")
        folder = resolve_model(str(model))
        config = ModelConfig.from_folder(folder)
        context = config.max_position_embeddings if max_model_len is None else max_model_len
        if not 1 <= context <= config.max_position_embeddings:
            text = f"max_model_len must be in [1, {config.max_position_embeddings}], the model's context; got {context}"
            raise ValueError(text)
        block_bytes = kv_layout(config, dtype, block_size, kv_dtype=kv_dtype, group=group).block_bytes
        num_blocks, swap_blocks = kv_bytes // block_bytes, swap_space // block_bytes
        if num_blocks < 1:
            raise ValueError(f"kv_bytes is {kv_bytes}, and a block of KV takes {block_bytes}; raise it")
        if swap_space != 0 and swap_blocks < 1:
            raise ValueError(f"swap_space is {swap_space}, and a block of KV takes {block_bytes}; raise it, or write 0")
        if preemption == Preemption.SWAP and not swap_blocks:
            raise ValueError("preemption by swap needs room to swap to: give swap_space, in bytes")
        self.max_model_len = context
        limits = SchedulerLimits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=context,
            prefill_chunk=prefill_chunk,
            expected_output=expected_output,
        )
        self.runner = ModelRunner(
            folder,
            dtype=dtype,
            device=device,
            kv_dtype=kv_dtype,
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=context,
            quantization=quantization,
            swap_blocks=swap_blocks,
            group=group,
            broadcast=broadcast,
        )
        self.pool = BlockPool(num_blocks, block_size, caching=enable_prefix_caching)
        self.host = HostTier(swap_blocks, block_size, caching=enable_prefix_caching) if swap_blocks else None
        self.scheduler = Scheduler(
            self.pool, limits, frozenset(config.eos_token_ids), self.host, preemption=Preemption(preemption)
        )
        self._ids = count()

    def add(
        self, prompt: Iterable[int], params: SamplingParams, *, generated: Iterable[int] = (), salt: bytes = b"",
        fork_of: str | None = None,
    ) -> str:  # fmt: skip
        """Queue a prompt; returns its id. ``CapacityError`` where it can never fit.

        Prompts share KV only with others of their ``salt``. ``fork_of``: the id of a sequence with the same prompt and
        no output yet, from whose KV this one begins.
        """
        seq_id = str(next(self._ids))
        tokens = np.fromiter(prompt, np.int32)
        seq = Sequence(seq_id, tokens, params, generated=np.fromiter(generated, np.int32), salt=salt)
        self.scheduler.add(seq, fork_of=fork_of)
        return seq_id

    def add_samples(self, prompt: Iterable[int], params: SamplingParams, n: int, *, salt: bytes = b"") -> list[str]:
        """Queue ``n`` samples of a prompt, each with a seed of its own; they share the prompt's blocks."""
        prompt = list(prompt)
        first = self.add(prompt, params, salt=salt)
        each = (
            replace(params, seed=seed_of_sample(params.seed, sample), prompt_logprobs=None) for sample in range(1, n)
        )
        return [first, *(self.add(prompt, one, salt=salt, fork_of=first) for one in each)]

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

    def generate(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams], n: int = 1
    ) -> list[Completion]:
        """``n`` samples of each prompt, all together, to their ends: those of the first prompt, then of the next."""
        each = params if isinstance(params, list) else [params] * len(prompts)
        completions = {
            seq_id: Completion()
            for prompt, param in zip(prompts, each, strict=True)
            for seq_id in self.add_samples(prompt, param, n)
        }
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

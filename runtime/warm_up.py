"""A worker's pace at computing prompts, measured before it serves: a decode worker may not be given one otherwise, and
who decides where a prompt is computed has to know."""

import time
from typing import Protocol

import numpy as np

from engine.core.blocks import BlockPool
from engine.core.outputs import StepOutput
from engine.core.scheduler import Scheduler, SchedulerLimits, StepPlan
from engine.core.sequence import Sequence
from messages.sampling import SamplingParams
from runtime.core.pace import MEASURED

PROMPT = 2 * MEASURED
"""Tokens: enough for a measurement, and little work."""


class Runner(Protocol):
    def run(self, plan: StepPlan) -> StepOutput: ...


def measure_prefill(runner: Runner, *, num_blocks: int, block_size: int, max_model_len: int) -> tuple[int, float]:
    """Run a short prompt twice; returns its tokens, and the seconds of the second time: the first one compiles and
    allocates. Writes to blocks of the KV cache, which must be nobody's."""
    num_tokens = min(PROMPT, num_blocks * block_size - 1, max_model_len - 1)
    seconds = 0.0
    for _ in range(2 if num_tokens > 0 else 0):
        limits = SchedulerLimits(
            max_num_seqs=1, max_num_batched_tokens=num_tokens, max_model_len=max_model_len, prefill_chunk=num_tokens
        )
        scheduler = Scheduler(BlockPool(num_blocks, block_size, caching=False), limits, frozenset())
        scheduler.add(Sequence("warm-up", np.zeros(num_tokens, np.int32), SamplingParams(max_tokens=1, temperature=0)))
        plan = scheduler.schedule()
        assert plan is not None
        begun = time.monotonic()
        runner.run(plan)
        seconds = time.monotonic() - begun
    return num_tokens, seconds

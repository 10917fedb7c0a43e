"""The token scheduler: which sequence computes how many tokens in the next step.

There are no phases. A step gives each sequence some tokens until ``num_computed_tokens`` has caught up with
``num_tokens``, and one that catches up samples its next token. Chunked prefill, landed KV, recomputation and decoding
are all that. Sequences that run come first, in order of arrival, so decoding is never held up by prompts; what is left
of the token budget goes to those that wait. When blocks run out the youngest sequence gives up its own and is computed
again later, once all of it fits; the oldest always goes on, so nothing deadlocks, and nothing is computed in vain.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.core.blocks import BlockPool
from engine.core.errors import CapacityError
from engine.core.outputs import StepOutput, TokenLogprobs
from engine.core.sequence import Sequence, SequenceStatus
from messages.sampling import FinishReason

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    max_num_seqs: int
    """Sequences that run at once."""
    max_num_batched_tokens: int
    """Tokens in one step."""
    max_model_len: int
    """Tokens in one sequence, prompt and output."""
    prefill_chunk: int
    """Tokens of one sequence in one step."""

    def __post_init__(self) -> None:
        if min(self.max_num_seqs, self.max_num_batched_tokens, self.max_model_len, self.prefill_chunk) < 1:
            raise ValueError(f"scheduler limits must be positive: {self}")


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One call of the model: row ``i`` computes ``num_tokens[i]`` tokens of ``sequences[i]``."""

    sequences: list[Sequence]
    num_tokens: Ints
    """``[rows]``, each >= 1."""
    num_computed: Ints
    """``[rows]``: tokens of the row's sequence that were computed before this step."""
    samples: NDArray[np.bool_]
    """``[rows]``: whether the row catches up, and so samples a token."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step did for one sequence."""

    seq: Sequence
    num_computed_tokens: int
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """With the step that completes the prompt, where asked for."""
    finish_reason: FinishReason | None = None
    handed_over: bool = False


class Scheduler:
    """Sequences of one engine, over one block pool. ``schedule``, run the plan, ``update``; one step at a time."""

    def __init__(self, pool: BlockPool, limits: SchedulerLimits, eos_token_ids: frozenset[int]) -> None:
        self._pool = pool
        self._limits = limits
        self._eos = eos_token_ids
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # oldest first
        self._sequences: dict[str, Sequence] = {}

    @property
    def max_num_batched_tokens(self) -> int:
        return self._limits.max_num_batched_tokens

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def waiting_tokens(self) -> int:
        """Tokens to compute before every sequence decodes."""
        return sum(seq.num_uncomputed_tokens for seq in (*self._waiting, *self._running))

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence. One that can never fit raises ``CapacityError``."""
        assert seq.seq_id not in self._sequences, f"{seq} is here already"
        longest = min(self._limits.max_model_len, seq.num_prompt_tokens + seq.params.max_tokens)
        if seq.num_tokens > self._limits.max_model_len or longest > self._pool.num_blocks * self._pool.block_size:
            raise CapacityError(
                f"{max(longest, seq.num_tokens)} tokens are more than the {self._limits.max_model_len} of the context "
                f"or the {self._pool.num_blocks * self._pool.block_size} of the KV pool"
            )
        seq.move(SequenceStatus.WAITING)
        self._sequences[seq.seq_id] = seq
        self._waiting.append(seq)

    def schedule(self, budget: int | None = None) -> StepPlan | None:
        """The next step, of at most ``budget`` tokens, or None where there is nothing to compute."""
        budget = min(budget or self._limits.max_num_batched_tokens, self._limits.max_num_batched_tokens)
        planned: list[tuple[Sequence, int]] = []
        place, running_before = 0, len(self._running)
        while place < len(self._running) and budget > 0:
            seq = self._running[place]
            count = min(seq.num_uncomputed_tokens, self._limits.prefill_chunk, budget)
            if not self._make_room(seq, seq.num_computed_tokens + count):
                break  # it was preempted itself, and so was everything younger
            planned.append((seq, count))
            budget -= count
            place += 1
        if len(self._running) < running_before:  # one was preempted: what waits would only take its blocks again
            budget = 0
        while self._waiting and budget > 0 and len(self._running) < self._limits.max_num_seqs:
            seq = self._waiting[0]
            if not self._fits(seq):
                if self._running or not self._preempt_waiting(but=seq):
                    break
                continue
            count = min(seq.num_uncomputed_tokens, self._limits.prefill_chunk, budget)
            grown = self._grow(seq, seq.num_computed_tokens + count)
            assert grown, f"{seq} fitted"
            self._waiting.popleft()
            seq.move(SequenceStatus.RUNNING)
            self._running.append(seq)
            planned.append((seq, count))
            budget -= count
        return _plan(planned) if planned else None

    def update(self, plan: StepPlan, output: StepOutput) -> list[Progress]:
        """The plan has run: count it, take its tokens, end what is over. Rows removed meanwhile are passed over."""
        progress: list[Progress] = []
        sampled = iter(output.tokens.tolist())
        counts = plan.num_tokens.tolist()
        for row, (seq, samples) in enumerate(zip(plan.sequences, plan.samples.tolist(), strict=True)):
            token = next(sampled) if samples else None
            if seq.status is not SequenceStatus.RUNNING:
                continue
            seq.num_computed_tokens += counts[row]
            if seq.params.prompt_logprobs is not None:
                seq.prompt_logprobs += output.prompt_logprobs.get(row, [])
            if token is None:
                progress.append(Progress(seq, seq.num_computed_tokens))
            else:
                progress.append(self._sampled(seq, token, output.logprobs.get(row)))
        return progress

    def remove(self, seq_id: str) -> Sequence | None:
        """Stop scheduling a sequence. It keeps its blocks, which are the caller's to free."""
        seq = self._sequences.pop(seq_id, None)
        if seq is None:
            return None
        if seq.status is SequenceStatus.RUNNING:
            self._running.remove(seq)
        else:
            self._waiting.remove(seq)
        seq.move(SequenceStatus.REMOVED)
        return seq

    def check_integrity(self) -> None:
        """Queues, lookup and blocks agree."""
        queued = [*self._waiting, *self._running]
        assert {seq.seq_id for seq in queued} == set(self._sequences) and len(queued) == len(self._sequences)
        assert all(seq.status is SequenceStatus.RUNNING for seq in self._running)
        assert len(self._running) <= self._limits.max_num_seqs
        tables = [seq.block_table for seq in queued]
        blocks = np.concatenate(tables) if tables else np.empty(0, np.int32)
        assert len(np.unique(blocks)) == len(blocks), "a block has two owners"
        for seq in self._running:
            assert seq.num_blocks * self._pool.block_size >= seq.num_computed_tokens, f"{seq} lacks blocks"

    def _grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Give ``seq`` blocks for its first ``num_tokens`` tokens; False when the pool has too few."""
        missing = -(-num_tokens // self._pool.block_size) - seq.num_blocks
        if missing <= 0:
            return True
        blocks = self._pool.allocate(missing)
        if blocks is None:
            return False
        seq.append_blocks(blocks)
        return True

    def _fits(self, seq: Sequence) -> bool:
        """Whether all of ``seq`` fits, and a block more for each that runs, so that nobody is preempted at once."""
        missing = -(-seq.num_tokens // self._pool.block_size) - seq.num_blocks
        return missing + len(self._running) <= self._pool.num_free

    def _make_room(self, seq: Sequence, num_tokens: int) -> bool:
        """``_grow``, at the cost of younger sequences; False when ``seq`` was the youngest, and is preempted itself."""
        while not self._grow(seq, num_tokens):
            if self._preempt_waiting(but=seq):
                continue
            youngest = self._running.pop()
            youngest.move(SequenceStatus.PREEMPTED)
            self._release(youngest)
            self._waiting.appendleft(youngest)
            if youngest is seq:
                return False
        return True

    def _preempt_waiting(self, but: Sequence) -> bool:
        """Take the blocks of the last in the queue that has landed KV; False where there is none."""
        for seq in reversed(self._waiting):
            if seq is not but and seq.num_blocks and not seq.hand_over:
                self._release(seq)
                return True
        return False

    def _release(self, seq: Sequence) -> None:
        self._pool.free(seq.take_blocks())
        seq.num_computed_tokens = 0
        seq.prompt_logprobs.clear()

    def _sampled(self, seq: Sequence, token: int, logprobs: TokenLogprobs | None) -> Progress:
        prompt_logprobs = None
        if seq.params.prompt_logprobs is not None and seq.num_output_tokens == 0:
            prompt_logprobs = seq.prompt_logprobs
        if seq.num_output_tokens >= seq.params.max_tokens:  # only the prompt was to be scored
            self._leave(seq, FinishReason.LENGTH)
            return Progress(seq, seq.num_computed_tokens, None, None, prompt_logprobs, seq.finish_reason)
        if token < 0:
            self._leave(seq, FinishReason.ABORT)
            return Progress(seq, seq.num_computed_tokens, finish_reason=seq.finish_reason)
        seq.append_token(token)
        reason = self._finish_reason(seq, token)
        if reason is not None or seq.hand_over:
            self._leave(seq, reason)
        handed_over = seq.hand_over and reason is None
        return Progress(seq, seq.num_computed_tokens, token, logprobs, prompt_logprobs, reason, handed_over)

    def _finish_reason(self, seq: Sequence, token: int) -> FinishReason | None:
        if token in seq.params.stop_token_ids or (token in self._eos and not seq.params.ignore_eos):
            return FinishReason.STOP
        if seq.num_output_tokens >= seq.params.max_tokens or seq.num_tokens >= self._limits.max_model_len:
            return FinishReason.LENGTH
        return None

    def _leave(self, seq: Sequence, reason: FinishReason | None) -> None:
        seq.finish_reason = reason
        seq.move(SequenceStatus.HANDED_OVER if reason is None else SequenceStatus.FINISHED)
        self._running.remove(seq)
        del self._sequences[seq.seq_id]
        if not seq.hand_over:
            self._pool.free(seq.take_blocks())


def _plan(planned: list[tuple[Sequence, int]]) -> StepPlan:
    num_tokens = np.array([count for _, count in planned], np.int32)
    num_computed = np.array([seq.num_computed_tokens for seq, _ in planned], np.int32)
    totals = np.array([seq.num_tokens for seq, _ in planned], np.int32)
    return StepPlan(
        sequences=[seq for seq, _ in planned],
        num_tokens=num_tokens,
        num_computed=num_computed,
        samples=num_computed + num_tokens == totals,
    )

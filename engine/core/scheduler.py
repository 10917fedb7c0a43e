"""The token scheduler: which sequence computes how many tokens in the next step.

There are no phases. A step gives each sequence some tokens until ``num_computed_tokens`` has caught up with
``num_tokens``, and one that catches up samples its next token. Chunked prefill, prefix hits, landed KV, recomputation
and decoding are all that. Sequences that run come first, in order of arrival, each with one token at least, so decoding
is never held up by prompts; what is left of the token budget goes to those that wait.

One that waits starts when all of it fits and what is expected of the running ones too (``growth.py``). When blocks run
out all the same, the youngest gives up its own, to be computed again (``recompute``) or copied back (``swap``) later;
the oldest always goes on, so nothing deadlocks, and nothing is computed in vain. What is to be handed over is never
preempted: it has all its blocks from the start, and needs no more.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.core.blocks import BlockPool
from engine.core.errors import CapacityError
from engine.core.growth import peak_growth
from engine.core.host_tier import HostTier
from engine.core.in_flight import InFlight
from engine.core.kv_manager import Hit, KVManager
from engine.core.moves import BlockMoves
from engine.core.outputs import StepOutput, TokenLogprobs
from engine.core.sequence import Sequence, SequenceStatus
from messages.sampling import FinishReason, SamplingParams

Ints = NDArray[np.int32]
_arrival = attrgetter("arrival")


class Preemption(StrEnum):
    """What becomes of the KV of a sequence that has to make room."""

    RECOMPUTE = "recompute"
    """It is let go of, and computed again, as far as it cannot be found in the prefix cache."""
    SWAP = "swap"
    """It goes to the host tier and comes back; where that has no room, it is computed again."""


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
    expected_output: int = 1024
    """Tokens of an answer that room is kept for before another sequence starts; the router counts as many. Most limits
    are never reached, and those of clients that set none are as long as the context."""

    def __post_init__(self) -> None:
        limits = (self.max_num_seqs, self.max_num_batched_tokens, self.max_model_len, self.prefill_chunk)
        if min(*limits, self.expected_output) < 1:
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
    moves: BlockMoves = field(default_factory=BlockMoves)
    """Blocks to copy before anything is computed."""


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


class Promise(NamedTuple):
    """A sequence whose KV is still to land."""

    params: SamplingParams
    num_output_tokens: int
    num_blocks: int
    """That it holds."""


class _Growing(NamedTuple):
    """A sequence in the projection of ``growth``."""

    remaining: int
    """Tokens that it is expected to add."""
    missing: int
    owned: int


@dataclass(slots=True)
class SchedulerStats:
    """Counted since the start."""

    preemptions: int = 0
    swaps: int = 0
    """Preemptions that kept the KV in the host tier."""


class Scheduler:
    """Sequences of one engine, over one block pool. ``schedule``, run the plan, ``update`` (or ``failed``, where it
    could not run); one step at a time."""

    def __init__(
        self, pool: BlockPool, limits: SchedulerLimits, eos_token_ids: frozenset[int], host: HostTier | None = None,
        *, preemption: Preemption = Preemption.RECOMPUTE,
    ) -> None:  # fmt: skip
        """``host``: where evicted content goes, and what is swapped."""
        if preemption is Preemption.SWAP and host is None:
            raise ValueError("preemption by swap needs a host tier")
        self._pool = pool
        self._kv = KVManager(pool, host)
        self._limits = limits
        self._eos = eos_token_ids
        self._swap = preemption is Preemption.SWAP
        self._waiting: list[Sequence] = []  # oldest first
        self._running: list[Sequence] = []  # oldest first
        self._in_flight = InFlight()
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0
        self._lacking = -1
        """Blocks to be had when the first in line was found not to fit; -1 where it has not been tried."""
        self.stats = SchedulerStats()

    @property
    def max_num_batched_tokens(self) -> int:
        return self._limits.max_num_batched_tokens

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + self._in_flight.num_waiting

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def waiting_tokens(self) -> int:
        """Tokens to compute before every sequence decodes."""
        return sum(seq.num_uncomputed_tokens for seq in self._sequences.values())

    def add(self, seq: Sequence, *, fork_of: str | None = None, arrival: int | None = None) -> None:
        """Queue a new sequence. One that can never fit raises ``CapacityError``.

        With ``fork_of``, a sequence here with the same prompt and no output yet: it begins with that one's KV, as soon
        as that is computed. ``arrival``: of one that was removed, whose place in line this one takes.
        """
        assert seq.seq_id not in self._sequences, f"{seq} is here already"
        longest = min(self._limits.max_model_len, seq.num_prompt_tokens + seq.params.max_tokens)
        if seq.num_tokens > self._limits.max_model_len or longest > self._pool.num_blocks * self._pool.block_size:
            raise CapacityError(
                f"{max(longest, seq.num_tokens)} tokens are more than the {self._limits.max_model_len} of the context "
                f"or the {self._pool.num_blocks * self._pool.block_size} of the KV pool"
            )
        seq.move(SequenceStatus.WAITING)
        self._sequences[seq.seq_id] = seq
        self._arrivals += arrival is None
        seq.arrival = self._arrivals if arrival is None else arrival
        if seq.num_computed_tokens:  # it has landed
            self._settle(self._kv.computed(seq))
        parent = None if fork_of is None else self._sequences[fork_of]
        if parent is not None and parent.num_output_tokens == 0:
            assert np.array_equal(parent.token_ids, seq.token_ids) and parent.salt == seq.salt, f"{seq} is no fork"
            self._in_flight.park(seq, parent)
        else:
            self._queue(seq)

    def schedule(self, budget: int | None = None) -> StepPlan | None:
        """The next step, or None where there is nothing to compute.

        At most ``budget`` tokens, but at least one for each running sequence.
        """
        most = self._limits.max_num_batched_tokens
        budget = most if budget is None else min(max(budget, len(self._running)), most)
        planned: list[tuple[Sequence, int]] = []
        preemptions = self.stats.preemptions
        budget = self._continue(planned, budget)
        if self.stats.preemptions == preemptions:  # what waits would only take its blocks from one that was preempted
            self._start(planned, budget)
        if not planned:
            self._kv.not_moved()
            return None
        return _plan(planned, self._kv.take_moves())

    def update(self, plan: StepPlan, output: StepOutput) -> list[Progress]:
        """The plan has run: count it, take its tokens, end what is over. Rows removed meanwhile are passed over."""
        self._kv.moved(plan.moves)
        progress: list[Progress] = []
        sampled = iter(output.tokens.tolist())
        counts, lost, size = plan.num_tokens.tolist(), output.not_numbers, self._pool.block_size
        for row, (seq, samples) in enumerate(zip(plan.sequences, plan.samples.tolist(), strict=True)):
            token = next(sampled) if samples else None
            if seq.status is not SequenceStatus.RUNNING:
                continue
            if row in lost or (token is not None and token < 0):
                self._kv.discard(seq)
                self._leave(seq, FinishReason.ABORT)
                progress.append(Progress(seq, seq.num_computed_tokens, finish_reason=seq.finish_reason))
                continue
            seq.num_computed_tokens += counts[row]
            if seq.num_computed_tokens >= (seq.num_final_blocks + 1) * size:
                self._settle(self._kv.computed(seq))
            if seq.params.prompt_logprobs is not None:
                seq.prompt_logprobs += output.prompt_logprobs.get(row, [])
            if token is None:
                progress.append(Progress(seq, seq.num_computed_tokens))
            else:
                progress.append(self._sampled(seq, token, output.logprobs.get(row)))
        return progress

    def failed(self, plan: StepPlan) -> None:
        """The plan could not run, and nothing of it is to be relied on: every sequence of it must be removed now."""
        self._kv.not_moved()

    def remove(self, seq_id: str) -> Sequence | None:
        """Stop scheduling a sequence. It keeps its blocks, which are the caller's to free."""
        seq = self._sequences.pop(seq_id, None)
        if seq is None:
            return None
        if seq.status is SequenceStatus.RUNNING:
            self._not_running(seq)
        elif seq.awaits is not None:
            self._in_flight.forget(seq)
        else:
            _take_out(self._waiting, seq)
            self._lacking = -1
        self._kv.forget_saved(seq)
        self._queue_all(self._in_flight.wake(seq))
        seq.move(SequenceStatus.REMOVED)
        return seq

    def check_integrity(self) -> None:
        """Queues, lookup and blocks agree."""
        queued = [*self._waiting, *self._running]
        parked = [seq for seq in self._sequences.values() if seq.awaits is not None]
        assert len(parked) == self._in_flight.num_waiting
        assert {seq.seq_id for seq in [*queued, *parked]} == set(self._sequences)
        assert len(queued) + len(parked) == len(self._sequences), "a sequence is in two queues"
        for queue in (self._waiting, self._running):
            assert all(a.arrival < b.arrival for a, b in pairwise(queue)), "out of order"
        assert all(seq.status is SequenceStatus.RUNNING for seq in self._running)
        assert len(self._running) <= self._limits.max_num_seqs
        for seq in self._sequences.values():
            table = seq.block_table
            assert len(np.unique(table)) == len(table), f"{seq} has a block twice"
            assert seq.num_blocks * self._pool.block_size >= seq.num_computed_tokens, f"{seq} lacks blocks"
        self._in_flight.check_integrity()
        self._kv.check_integrity(self._sequences.values())

    def _continue(self, planned: list[tuple[Sequence, int]], budget: int) -> int:
        """Plan the running sequences; returns what is left of the budget."""
        place, size, chunk = 0, self._pool.block_size, self._limits.prefill_chunk
        while place < len(self._running) and budget > 0:
            seq = self._running[place]
            behind = len(self._running) - place - 1  # each of which is to have a token
            count = min(seq.num_tokens - seq.num_computed_tokens, chunk, max(1, budget - behind))
            end = seq.num_computed_tokens + count
            if (seq.shared_tail or end > seq.num_blocks * size) and not self._make_room(seq, end):
                continue  # it was preempted itself, and so was everything younger but what is handed over
            planned.append((seq, count))
            budget -= count
            place += 1
        return budget

    def _start(self, planned: list[tuple[Sequence, int]], budget: int) -> None:
        """Plan those that wait, in order, as far as budget and blocks go."""
        batch: list[_Growing] | None = None
        while self._waiting and budget > 0 and len(self._running) < self._limits.max_num_seqs:
            if self._running and self._pool.num_free <= self._lacking:
                return
            seq = self._waiting[0]
            hit = None if seq.num_blocks else self._kv.find(seq)
            if hit is not None and (awaited := self._awaited(seq, hit)) is not None:
                self._take_first()
                self._in_flight.park(seq, awaited)
                continue
            batch = batch if batch is not None or not self._running else [*map(self._growing, self._running)]
            if not self._fits(self._growing(seq)._replace(missing=self._kv.needed(seq, hit)), batch or []):
                if self._running:
                    self._lacking = self._pool.num_free
                    return
                if not self._preempt_waiting(but=seq):
                    return
                continue
            self._take_first()
            count = self._begin(seq, hit, budget)
            planned.append((seq, count))
            budget -= count
            if batch is not None:
                batch.append(self._growing(seq))

    def _begin(self, seq: Sequence, hit: Hit | None, budget: int) -> int:
        """Let ``seq`` run; returns how many tokens it computes now."""
        if hit is not None:
            if seq.status is SequenceStatus.WAITING:
                seq.num_cached_tokens = hit.num_tokens
                self._pool.looked_up(seq.num_tokens, hit.num_tokens)
            self._kv.take(seq, hit)
        count = min(seq.num_uncomputed_tokens, self._limits.prefill_chunk, budget)
        # What is handed over is being read while it grows: it must never be preempted, so it has all blocks from here.
        grown = self._kv.grow(seq, seq.num_tokens if seq.hand_over else seq.num_computed_tokens + count)
        assert grown, f"{seq} fitted"
        seq.move(SequenceStatus.RUNNING)
        insort(self._running, seq, key=_arrival)
        self._in_flight.begin(seq, self._kv.names(seq)[seq.num_final_blocks :])
        return count

    def _awaited(self, seq: Sequence, hit: Hit) -> bytes | None:
        """The block that ``seq`` should wait for, since somebody computes it just now."""
        if seq.scores_prompt or seq.saved is not None or not self._pool.caching:
            return None
        return self._in_flight.last_in_flight(self._kv.names(seq), len(hit.blocks) + len(hit.slots))

    def has_room(self, needed: int, coming: Promise, promised: Iterable[Promise]) -> bool:
        """Whether ``needed`` blocks can be promised to KV that will land, beside what runs and other promises."""
        others = [
            _Growing(self._remaining(each.params, each.num_output_tokens), 0, each.num_blocks) for each in promised
        ]
        candidate = _Growing(self._remaining(coming.params, coming.num_output_tokens), needed, 0)
        return self._fits(candidate, [*map(self._growing, self._running), *others])

    def _fits(self, candidate: _Growing, batch: list[_Growing]) -> bool:
        """Whether the blocks that ``candidate`` misses are there, and those that it and ``batch`` will need to grow."""
        free = self._pool.num_free
        if not candidate.missing and not candidate.remaining:
            return True  # it has all, and will never need more
        if candidate.missing > free or not batch:
            return candidate.missing <= free
        columns = np.array([*batch, candidate], np.int64).T
        return peak_growth(columns[0], columns[1], columns[2], self._pool.block_size) <= free

    def _growing(self, seq: Sequence) -> _Growing:
        missing = -(-seq.num_tokens // self._pool.block_size) - seq.num_blocks
        remaining = 0 if seq.hand_over else self._remaining(seq.params, seq.num_output_tokens)
        return _Growing(remaining, max(0, missing), seq.num_blocks)

    def _remaining(self, params: SamplingParams, num_output_tokens: int) -> int:
        """Tokens to come, as far as one can expect: always a block's, that none is preempted as soon as it starts."""
        return max(self._pool.block_size, min(params.max_tokens, self._limits.expected_output) - num_output_tokens)

    def _make_room(self, seq: Sequence, num_tokens: int) -> bool:
        """Let ``seq`` grow, at the cost of younger ones; False when it was the youngest, and is preempted itself. Those
        that are handed over have all their blocks, and others read them: they neither grow nor make room."""
        while not self._kv.grow(seq, num_tokens):
            if self._preempt_waiting(but=seq):
                continue
            youngest = next(each for each in reversed(self._running) if not each.hand_over)
            self._not_running(youngest)
            youngest.move(SequenceStatus.PREEMPTED)
            self._give_up(youngest)
            self._queue(youngest)
            if youngest is seq:
                return False
        return True

    def _preempt_waiting(self, but: Sequence) -> bool:
        """Take the blocks of the last in line that has some, landed, forked or moved; False where there is none. Nobody
        reads those of a sequence that is to be handed over before it runs."""
        for seq in reversed(self._waiting):
            if seq is not but and seq.num_blocks:
                self._give_up(seq)
                return True
        return False

    def _give_up(self, seq: Sequence) -> None:
        self.stats.preemptions += 1
        if self._swap and self._kv.swap_out(seq):
            self.stats.swaps += 1
        else:
            self._kv.release(seq)

    def _sampled(self, seq: Sequence, token: int, logprobs: TokenLogprobs | None) -> Progress:
        prompt_logprobs = None
        if seq.num_tokens == seq.num_prompt_tokens:
            self._fork(seq)
            prompt_logprobs = seq.prompt_logprobs if seq.scores_prompt else None
        if seq.num_output_tokens >= seq.params.max_tokens:  # only the prompt was to be scored
            self._leave(seq, FinishReason.LENGTH)
            return Progress(seq, seq.num_computed_tokens, None, None, prompt_logprobs, seq.finish_reason)
        seq.append_token(token)
        reason = self._finish_reason(seq, token)
        if reason is not None or seq.hand_over:
            self._leave(seq, reason)
        handed_over = seq.hand_over and reason is None
        return Progress(seq, seq.num_computed_tokens, token, logprobs, prompt_logprobs, reason, handed_over)

    def _fork(self, parent: Sequence) -> None:
        """The prompt of ``parent`` is computed: those that begin with it go on from there."""
        children = self._in_flight.wake(parent)
        for child in children:
            self._kv.fork(parent, child)
        self._queue_all(children)

    def _finish_reason(self, seq: Sequence, token: int) -> FinishReason | None:
        if token in seq.params.stop_token_ids or (token in self._eos and not seq.params.ignore_eos):
            return FinishReason.STOP
        if seq.num_output_tokens >= seq.params.max_tokens or seq.num_tokens >= self._limits.max_model_len:
            return FinishReason.LENGTH
        return None

    def _leave(self, seq: Sequence, reason: FinishReason | None) -> None:
        self._not_running(seq)
        seq.finish_reason = reason
        seq.move(SequenceStatus.HANDED_OVER if reason is None else SequenceStatus.FINISHED)
        del self._sequences[seq.seq_id]
        self._queue_all(self._in_flight.wake(seq))
        if not seq.hand_over:
            self._pool.free(seq.take_blocks())

    def _not_running(self, seq: Sequence) -> None:
        _take_out(self._running, seq)
        self._lacking = -1
        if seq.hashes is not None:
            self._queue_all([*self._in_flight.drop(seq, seq.hashes.names[seq.num_final_blocks :])])

    def _settle(self, names: list[bytes]) -> None:
        """These blocks can be found: whoever waited for one may start."""
        self._queue_all([*self._in_flight.settle(names)])

    def _queue_all(self, sequences: Iterable[Sequence]) -> None:
        for seq in sequences:
            self._queue(seq)

    def _queue(self, seq: Sequence) -> None:
        insort(self._waiting, seq, key=_arrival)
        if self._waiting[0] is seq:
            self._lacking = -1

    def _take_first(self) -> None:
        del self._waiting[0]
        self._lacking = -1


def _take_out(queue: list[Sequence], seq: Sequence) -> None:
    place = bisect_left(queue, seq.arrival, key=_arrival)
    assert queue[place] is seq, f"{seq} is not where it should be"
    del queue[place]


def _plan(planned: list[tuple[Sequence, int]], moves: BlockMoves) -> StepPlan:
    num_tokens = np.array([count for _, count in planned], np.int32)
    num_computed = np.array([seq.num_computed_tokens for seq, _ in planned], np.int32)
    totals = np.array([seq.num_tokens for seq, _ in planned], np.int32)
    return StepPlan(
        sequences=[seq for seq, _ in planned],
        num_tokens=num_tokens,
        num_computed=num_computed,
        samples=num_computed + num_tokens == totals,
        moves=moves,
    )

"""Promise: whatever happens to a sequence's blocks, no step reads KV that is not its own, unfilled or of another salt.

A model of the memory stands in for the engine: each place of each block, in the pool and on the host, holds the name
of the tokens (and the salt) whose KV was last written there. It runs the scheduler's plans as a rank does, and checks
every place that a row reads and every block that it writes to. A step may fail halfway, or make KV that is not numbers;
blocks are promised to transfers, landed in, handed over; sequences are forked and removed at any time.
"""

from collections import Counter
from dataclasses import dataclass, field
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from engine.core.blocks import BlockPool, Blocks
from engine.core.host_tier import HostTier
from engine.core.outputs import StepOutput
from engine.core.scheduler import Preemption, Scheduler, SchedulerLimits, StepPlan
from engine.core.sequence import Sequence
from messages.sampling import FinishReason, SamplingParams

STEPS = 2_000
WORDS = 5
"""Tokens are below this, so prompts often begin alike."""
GARBAGE = -1


class Names:
    """A number for each (salt, tokens so far): what the KV of the last of these tokens is a function of."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, int], int] = {}

    def of(self, salt: bytes, tokens: list[int]) -> list[int]:
        names: list[int] = []
        last: object = salt
        for token in tokens:
            last = self._known.setdefault((last, token), len(self._known))
            names.append(last)
        return names


def drawn(name: int, seed: int) -> int:
    """The token that a sequence of this seed draws from the KV of this name."""
    return (name * 7919 + seed * 104729) % WORDS


@dataclass
class World:
    random: Random
    num_blocks: int
    block_size: int
    host_blocks: int
    caching: bool
    preemption: Preemption
    expected_output: int
    names: Names = field(default_factory=Names)
    live: dict[str, Sequence] = field(default_factory=dict)
    handed_over: list[Sequence] = field(default_factory=list)
    landing: list[tuple[Sequence, Blocks]] = field(default_factory=list)
    """Sequences whose KV is on its way, and the blocks promised to them."""
    seen: Counter[str] = field(default_factory=Counter)
    count: int = 0

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, self.block_size, caching=self.caching)
        self.host = HostTier(self.host_blocks, self.block_size, caching=self.caching) if self.host_blocks else None
        limits = SchedulerLimits(
            max_num_seqs=self.random.randint(3, 6), max_num_batched_tokens=self.random.randint(6, 24),
            max_model_len=1000, prefill_chunk=self.random.randint(3, 12), expected_output=self.expected_output,
        )  # fmt: skip
        self.scheduler = Scheduler(self.pool, limits, frozenset(), self.host, preemption=self.preemption)
        self.memory = np.full((self.num_blocks, self.block_size), GARBAGE)
        self.on_host = np.full((max(1, self.host_blocks), self.block_size), GARBAGE)

    # What may happen

    def sequence(self, *, hand_over: bool = False) -> Sequence:
        random = self.random
        self.count += 1
        length = random.randint(1, 5 * self.block_size)
        start = random.randrange(3)
        # Three texts, from which prompts depart at any place.
        prompt = [(start + place * (start + 1)) % WORDS for place in range(length)]
        own = random.randint(0, length)
        prompt[own:] = [random.randrange(WORDS) for _ in range(length - own)]
        room = self.num_blocks * self.block_size - length
        params = SamplingParams(max_tokens=random.randint(1, min(room, 4 * self.block_size)), seed=self.count)
        salt = random.choice([b"", b"", b"", b"other"])
        return Sequence(str(self.count), np.array(prompt, np.int32), params, hand_over=hand_over, salt=salt)

    def add(self) -> None:
        seq = self.sequence(hand_over=self.random.random() < 0.2)
        self.live[seq.seq_id] = seq
        self.scheduler.add(seq)

    def add_samples(self) -> None:
        first = self.sequence()
        self.live[first.seq_id] = first
        self.scheduler.add(first)
        for _ in range(self.random.randint(1, 4)):
            self.count += 1
            params = SamplingParams(max_tokens=first.params.max_tokens, seed=self.count)
            child = Sequence(str(self.count), first.token_ids.copy(), params, salt=first.salt)
            self.live[child.seq_id] = child
            self.scheduler.add(child, fork_of=first.seq_id)

    def promise(self) -> None:
        """As a decode worker does for a transfer: share what is cached, promise the rest. What lands there may be
        written at once."""
        seq = self.sequence()
        cached = self.pool.match(self.scheduler._kv.names(seq))
        needed = -(-seq.num_tokens // self.block_size) - len(cached)
        if needed + self.pool.num_unheld(cached) > self.pool.num_free:
            return
        self.pool.share(cached)
        blocks = self.pool.allocate(needed)
        assert blocks is not None
        self.memory[blocks] = GARBAGE
        self.seen["cached blocks not sent"] += len(cached)
        self.landing.append((seq, np.concatenate([cached, blocks])))

    def land(self) -> None:
        """A transfer ends, well or badly."""
        if not self.landing:
            return
        seq, blocks = self.landing.pop(self.random.randrange(len(self.landing)))
        if self.random.random() < 0.3:
            self.pool.free(blocks)
            return
        tokens = seq.token_ids.tolist()
        names = self.names.of(seq.salt, tokens)
        for place, name in enumerate(names):
            block = blocks[place // self.block_size]
            if not self.pool.final(int(block)):
                self.memory[block, place % self.block_size] = name
        first = drawn(names[-1], seq.params.seed)
        landed = Sequence(
            seq.seq_id, seq.token_ids, seq.params, generated=np.array([first], np.int32), blocks=blocks,
            num_computed_tokens=len(tokens), salt=seq.salt,
        )  # fmt: skip
        if landed.num_output_tokens >= seq.params.max_tokens:
            self.pool.free(blocks)
            return
        self.live[seq.seq_id] = landed
        self.scheduler.add(landed)
        self.seen["landed"] += 1

    def remove(self) -> None:
        if self.live:
            self.drop(self.random.choice([*self.live.values()]))

    def drop(self, seq: Sequence) -> None:
        assert self.scheduler.remove(seq.seq_id) is seq
        self.pool.free(seq.take_blocks())
        del self.live[seq.seq_id]

    def acknowledge(self) -> None:
        """A peer has what was handed over."""
        if self.handed_over:
            self.pool.free(self.handed_over.pop(self.random.randrange(len(self.handed_over))).take_blocks())

    # A step

    def step(self) -> bool:
        """Whether there was anything to compute."""
        plan = self.scheduler.schedule()
        self.check()
        if plan is None:
            return False
        self.seen["moves"] += bool(plan.moves)
        self.seen["copies"] += len(plan.moves.copies)
        self.seen["rows"] += len(plan.sequences)
        if not plan.moves and self.random.random() < 0.3:
            self.promise()
        if self.random.random() < 0.02:
            self.fail(plan)
        else:
            self.update(plan, self.run(plan))
        self.check()
        return True

    def run(self, plan: StepPlan) -> StepOutput:
        """What a rank does of the plan, on names instead of numbers."""
        self.move(plan)
        tokens, poisoned = [], set()
        for row, seq in enumerate(plan.sequences):
            computed, count = int(plan.num_computed[row]), int(plan.num_tokens[row])
            assert computed == seq.num_computed_tokens and computed + count <= seq.num_tokens
            names = self.names.of(seq.salt, seq.token_ids.tolist())
            self.write(seq, computed, names[computed : computed + count])
            read = [self.at(seq, place) for place in range(computed + count)]
            assert read == names[: computed + count], f"{seq} reads what is not its own"
            if self.random.random() < 0.005:
                self.write(seq, computed, [GARBAGE] * count)
                poisoned.add(row)
            if plan.samples[row]:
                tokens.append(-1 if row in poisoned else drawn(read[-1], seq.params.seed))
        self.seen["poisoned"] += len(poisoned)
        return StepOutput(np.array(tokens, np.int32), not_numbers=frozenset(poisoned))

    def move(self, plan: StepPlan) -> None:
        moves = plan.moves
        for pairs in (moves.swap_out, moves.swap_in, moves.copies):
            assert len(np.unique(pairs[:, 1])) == len(pairs), "two copies into one block"
        assert not set(moves.copies[:, 0]) & set(moves.copies[:, 1])
        self.on_host[moves.swap_out[:, 1]] = self.memory[moves.swap_out[:, 0]]
        self.memory[moves.swap_in[:, 1]] = self.on_host[moves.swap_in[:, 0]]
        self.memory[moves.copies[:, 1]] = self.memory[moves.copies[:, 0]]

    def at(self, seq: Sequence, place: int) -> int:
        return int(self.memory[seq.block_table[place // self.block_size], place % self.block_size])

    def write(self, seq: Sequence, first: int, names: list[int]) -> None:
        for place, name in enumerate(names, first):
            block = int(seq.block_table[place // self.block_size])
            assert not self.pool.final(block), f"{seq} writes to block {block}, which others read"
            self.memory[block, place % self.block_size] = name

    def fail(self, plan: StepPlan) -> None:
        """The step fails, and leaves garbage wherever it was to write."""
        self.seen["failed steps"] += 1
        self.on_host[plan.moves.swap_out[:, 1]] = GARBAGE
        self.memory[plan.moves.swap_in[:, 1]] = GARBAGE
        self.memory[plan.moves.copies[:, 1]] = GARBAGE
        for row, seq in enumerate(plan.sequences):
            self.write(seq, int(plan.num_computed[row]), [GARBAGE] * int(plan.num_tokens[row]))
        self.scheduler.failed(plan)
        for seq in plan.sequences:
            self.drop(seq)

    def update(self, plan: StepPlan, output: StepOutput) -> None:
        for progress in self.scheduler.update(plan, output):
            seq = progress.seq
            if not (progress.handed_over or progress.finish_reason):
                continue
            del self.live[seq.seq_id]
            if progress.finish_reason is FinishReason.LENGTH:
                assert seq.output_token_ids.tolist() == self.answer(seq)
                self.seen["finished"] += 1
            if seq.hand_over:
                self.handed_over.append(seq)

    def answer(self, seq: Sequence) -> list[int]:
        """What ``seq`` says when it has the machine to itself."""
        tokens = seq.token_ids[: seq.num_prompt_tokens].tolist()
        for _ in range(seq.params.max_tokens):
            tokens.append(drawn(self.names.of(seq.salt, tokens)[-1], seq.params.seed))
        return tokens[seq.num_prompt_tokens :]

    def check(self) -> None:
        self.scheduler.check_integrity()
        counts = self.pool.counts()
        assert counts.free + counts.held + counts.cached == counts.total

    def check_owners(self) -> None:
        """Between two steps every reference has an owner that we know."""
        owned = sum(seq.num_blocks for seq in (*self.live.values(), *self.handed_over))
        assert owned + sum(len(blocks) for _, blocks in self.landing) == self.pool.num_references

    def drain(self) -> None:
        """Whoever is here comes to its end, once no more come."""
        for _ in range(5_000):
            while self.landing:
                self.land()
            while self.handed_over:
                self.acknowledge()
            if not self.step():
                break
        assert not self.live, "somebody waits for ever"
        self.check_owners()
        assert self.pool.num_references == 0
        assert self.host is None or self.host.pool.num_references == 0


RECOMPUTE, SWAP = Preemption.RECOMPUTE, Preemption.SWAP
CONFIGS = {
    "recompute": ({"host_blocks": 0, "caching": True, "preemption": RECOMPUTE}, {"hits", "preemptions"}),
    "recompute, host tier": (
        {"host_blocks": 30, "caching": True, "preemption": RECOMPUTE}, {"hits", "preemptions", "out", "in"}
    ),
    "swap": ({"host_blocks": 60, "caching": True, "preemption": SWAP}, {"hits", "swaps", "out", "in"}),
    "swap, little room": (
        {"host_blocks": 9, "caching": True, "preemption": SWAP}, {"hits", "preemptions", "swaps", "out", "in"}
    ),
    "swap, nothing cached": (
        {"host_blocks": 40, "caching": False, "preemption": SWAP}, {"preemptions", "swaps", "out", "in"}
    ),
    "nothing cached": ({"host_blocks": 0, "caching": False, "preemption": RECOMPUTE}, {"preemptions"}),
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
@settings(  # not shrunk: a shorter seed is no simpler
    max_examples=2, derandomize=True, suppress_health_check=[*HealthCheck], database=None,
    phases=[Phase.generate],
)  # fmt: skip
@given(random=st.randoms(use_true_random=True), block_size=st.sampled_from([2, 4]), expected=st.sampled_from([1, 8]))
def test_in_thousands_of_random_steps_no_sequence_reads_what_is_not_its_own(
    config: str, random: Random, block_size: int, expected: int
) -> None:
    changes, wanted = CONFIGS[config]
    world = World(random, num_blocks=24, block_size=block_size, expected_output=expected, **changes)  # type: ignore[arg-type]
    for _ in range(STEPS):
        happens = [world.add, world.add_samples, world.remove, world.land, world.acknowledge]
        for event in random.choices(happens, weights=[10, 3, 1, 8, 8], k=random.choice([0, 0, 1, 1, 2])):
            if len(world.live) < 24 or event not in (world.add, world.add_samples):
                event()
                world.check()
        world.step()
        world.check_owners()
    world.drain()
    stats, host = world.scheduler.stats, world.host
    world.seen.update(
        hits=world.pool.prefix_cache_hits, preemptions=stats.preemptions, swaps=stats.swaps,
        out=host.blocks_out if host else 0, **{"in": host.blocks_in if host else 0},
    )  # fmt: skip
    always = {"rows", "copies", "landed", "finished", "failed steps", "poisoned"}
    assert not [event for event in wanted | always if not world.seen[event]], f"did not happen: {world.seen}"

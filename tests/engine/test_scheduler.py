"""Promise: no step exceeds its budget, the pool's accounting always holds, and every sequence reaches its end."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.blocks import BlockPool
from engine.core.errors import CapacityError
from engine.core.outputs import StepOutput
from engine.core.scheduler import Progress, Scheduler, SchedulerLimits, StepPlan
from engine.core.sequence import Sequence, SequenceStatus
from messages.sampling import FinishReason, SamplingParams

EOS = 7


def limits(**changes: int) -> SchedulerLimits:
    settled = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 256, "prefill_chunk": 32}
    return SchedulerLimits(**{**settled, **changes})


def scheduler_of(num_blocks: int = 64, block_size: int = 4, **changes: int) -> tuple[Scheduler, BlockPool]:
    pool = BlockPool(num_blocks, block_size)
    return Scheduler(pool, limits(**changes), frozenset({EOS})), pool


def sequence(name: str, length: int, *, max_tokens: int = 4, **more: object) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=(9,))
    return Sequence(name, np.arange(length, dtype=np.int32) + 100, params, **more)  # type: ignore[arg-type]


def run(scheduler: Scheduler, plan: StepPlan, token: int = 50) -> list[Progress]:
    return scheduler.update(plan, StepOutput(np.full(int(plan.samples.sum()), token, np.int32)))


def counts(plan: StepPlan | None) -> dict[str, int]:
    assert plan is not None
    return dict(zip((seq.seq_id for seq in plan.sequences), plan.num_tokens.tolist(), strict=True))


def test_a_prompt_is_computed_in_chunks_and_samples_when_it_has_caught_up() -> None:
    scheduler, pool = scheduler_of()
    scheduler.add(sequence("a", 70))
    sampled = []
    for expected in (32, 32, 6, 1):
        plan = scheduler.schedule()
        assert counts(plan) == {"a": expected}
        assert plan is not None
        sampled.append([progress.token for progress in run(scheduler, plan)])
    assert sampled == [[None], [None], [50], [50]]
    assert pool.counts().held == 18


def test_decoding_comes_before_prompts_within_the_budget() -> None:
    scheduler, _ = scheduler_of(max_num_batched_tokens=10)
    scheduler.add(sequence("a", 3))
    run(scheduler, scheduler.schedule())  # type: ignore[arg-type]
    scheduler.add(sequence("b", 30))
    assert counts(scheduler.schedule()) == {"a": 1, "b": 9}


def test_a_budget_that_shrinks_leaves_a_token_for_everyone_who_runs() -> None:
    scheduler, _ = scheduler_of()
    scheduler.add(sequence("long", 60, salt=b"long"))
    for name in "bcd":
        scheduler.add(sequence(name, 3, max_tokens=20, salt=name.encode()))
    run(scheduler, scheduler.schedule())  # type: ignore[arg-type]
    assert counts(scheduler.schedule(10)) == {"long": 7, "b": 1, "c": 1, "d": 1}
    assert counts(scheduler.schedule(2)) == {"long": 1, "b": 1, "c": 1, "d": 1}


def test_no_more_sequences_run_than_a_step_has_tokens() -> None:
    scheduler, _ = scheduler_of(max_num_seqs=8, max_num_batched_tokens=4)
    sequences = [sequence(str(each), 1, max_tokens=20, salt=bytes([each])) for each in range(8)]
    for seq in sequences:
        scheduler.add(seq)
    for _ in range(3):
        run(scheduler, scheduler.schedule())  # type: ignore[arg-type]
    assert [seq.num_output_tokens for seq in sequences] == [3] * 4 + [0] * 4
    assert (scheduler.num_running, scheduler.num_waiting) == (4, 4)


@pytest.mark.parametrize(
    ("token", "ignore_eos", "reason"),
    [(EOS, False, FinishReason.STOP), (EOS, True, None), (9, True, FinishReason.STOP), (50, False, None)],
)
def test_a_sequence_ends_at_eos_or_a_stop_token(token: int, ignore_eos: bool, reason: FinishReason | None) -> None:
    scheduler, pool = scheduler_of()
    params = SamplingParams(max_tokens=4, stop_token_ids=(9,), ignore_eos=ignore_eos)
    scheduler.add(Sequence("a", np.array([1], np.int32), params))
    (progress,) = run(scheduler, scheduler.schedule(), token)  # type: ignore[arg-type]
    assert progress.finish_reason is reason
    assert (pool.counts().held == 0) == (reason is not None)


def test_a_sequence_ends_at_max_tokens_and_at_the_context() -> None:
    for max_tokens, context in ((3, 256), (100, 8)):
        scheduler, pool = scheduler_of(max_model_len=context)
        seq = sequence("a", 5, max_tokens=max_tokens)
        scheduler.add(seq)
        while (plan := scheduler.schedule()) is not None:
            run(scheduler, plan)
        assert (seq.num_output_tokens, seq.finish_reason) == (3, FinishReason.LENGTH)
        assert pool.counts().held == 0


def test_tokens_of_earlier_attempts_count_as_output() -> None:
    scheduler, _ = scheduler_of()
    seq = sequence("a", 5, max_tokens=4, generated=np.array([1, 2, 3], np.int32))
    scheduler.add(seq)
    plan = scheduler.schedule()
    assert counts(plan) == {"a": 8}
    assert plan is not None
    (progress,) = run(scheduler, plan)
    assert progress.finish_reason is FinishReason.LENGTH
    assert seq.output_token_ids.tolist() == [1, 2, 3, 50]


def test_landed_kv_is_not_computed_again() -> None:
    scheduler, pool = scheduler_of()
    blocks = pool.allocate(2)
    assert blocks is not None
    landed = sequence("a", 8, generated=np.array([5], np.int32), blocks=blocks, num_computed_tokens=8)
    scheduler.add(landed)
    assert counts(scheduler.schedule()) == {"a": 1}


def test_a_handed_over_sequence_keeps_its_blocks() -> None:
    for token, status in ((50, SequenceStatus.HANDED_OVER), (EOS, SequenceStatus.FINISHED)):
        scheduler, pool = scheduler_of()
        seq = sequence("a", 9, hand_over=True)
        scheduler.add(seq)
        (progress,) = run(scheduler, scheduler.schedule(), token)  # type: ignore[arg-type]
        assert seq.status is status
        assert progress.handed_over == (status is SequenceStatus.HANDED_OVER)
        assert pool.counts().held == len(seq.block_table) == 3
        pool.free(seq.block_table)


def test_the_youngest_is_preempted_and_all_reach_their_end() -> None:
    scheduler, pool = scheduler_of(num_blocks=10, block_size=4, max_model_len=40, expected_output=1)
    sequences = [sequence(name, 9, max_tokens=20) for name in "abc"]
    for seq in sequences:
        scheduler.add(seq)
    preempted = False
    while (plan := scheduler.schedule()) is not None:
        scheduler.check_integrity()
        preempted |= any(seq.status is SequenceStatus.PREEMPTED for seq in sequences)
        assert sequences[0].status is not SequenceStatus.PREEMPTED
        run(scheduler, plan)
        pool.check_integrity()
    assert preempted
    assert all(seq.num_output_tokens == 20 for seq in sequences)


def test_what_is_handed_over_makes_room_for_nobody_and_is_computed_beside_those_that_do() -> None:
    scheduler, pool = scheduler_of(num_blocks=14, prefill_chunk=4, expected_output=1)
    runs = [sequence(name, 12, max_tokens=20, salt=name.encode()) for name in "ab"]
    for seq in runs:
        scheduler.add(seq)
    while any(seq.num_output_tokens < 3 for seq in runs):
        run(scheduler, scheduler.schedule())  # type: ignore[arg-type]
    leg = sequence("leg", 24, salt=b"leg", hand_over=True)
    scheduler.add(leg)
    kept = scheduler.schedule()
    while leg.num_output_tokens == 0:
        assert "leg" in counts(kept) and leg.num_blocks == 6
        run(scheduler, kept)  # type: ignore[arg-type]
        kept = scheduler.schedule()
        scheduler.check_integrity()
    assert scheduler.stats.preemptions and any(seq.status is SequenceStatus.PREEMPTED for seq in runs)
    pool.free(leg.block_table)
    while kept is not None:
        run(scheduler, kept)
        kept = scheduler.schedule()
    assert all(seq.num_output_tokens == 20 for seq in runs) and pool.counts().held == 0


def test_what_can_never_fit_is_refused_at_once() -> None:
    scheduler, _ = scheduler_of(num_blocks=4, block_size=4)
    with pytest.raises(CapacityError, match="16"):
        scheduler.add(sequence("a", 10, max_tokens=10))


def test_a_sequence_removed_while_its_step_runs_is_passed_over() -> None:
    scheduler, pool = scheduler_of()
    scheduler.add(sequence("a", 3))
    scheduler.add(sequence("b", 3))
    plan = scheduler.schedule()
    removed = scheduler.remove("a")
    assert plan is not None and removed is not None
    assert [progress.seq.seq_id for progress in run(scheduler, plan)] == ["b"]
    pool.free(removed.block_table)
    scheduler.check_integrity()
    assert scheduler.remove("a") is None


def test_an_illegal_move_tells_the_sequences_story() -> None:
    seq = sequence("a", 3)
    with pytest.raises(AssertionError, match=r"Sequence a NEW.*cannot become FINISHED"):
        seq.move(SequenceStatus.FINISHED)


@settings(max_examples=150)
@given(
    num_blocks=st.integers(10, 30),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(1, 40),
    chunk=st.integers(1, 16),
    arrivals=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=12),
)
def test_under_any_load_the_accounting_holds_and_everyone_is_served(
    num_blocks: int, max_num_seqs: int, budget: int, chunk: int, arrivals: list[tuple[int, int, int]]
) -> None:
    scheduler, pool = scheduler_of(
        num_blocks, 4, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, prefill_chunk=chunk, max_model_len=40
    )
    due = [
        (at, sequence(str(n), length, max_tokens=output, salt=str(n).encode()))
        for n, (at, length, output) in enumerate(arrivals)
    ]
    computed = 0
    for step in range(5_000):
        for _, seq in [entry for entry in due if entry[0] == step]:
            scheduler.add(seq)
        plan = scheduler.schedule()
        scheduler.check_integrity()
        if plan is None:
            if step > 30:
                break
            continue
        assert plan.num_tokens.sum() <= budget and 1 <= plan.num_tokens.min() <= plan.num_tokens.max() <= chunk
        computed += int(plan.num_tokens.sum())
        run(scheduler, plan)
        pool.check_integrity()
        assert sum(len(seq.block_table) for _, seq in due) == pool.counts().held
    assert all(seq.status is SequenceStatus.FINISHED for _, seq in due)
    assert pool.counts().held == 0
    # A preempted sequence comes back once somebody else has ended, so it is computed again no more often than that.
    assert computed <= len(due) * sum(seq.num_tokens for _, seq in due)


def test_a_preempted_sequence_comes_back_when_all_of_it_fits() -> None:
    """Two that fit together at first and not at last: the work is once each, and the younger's start once more."""
    scheduler, _ = scheduler_of(num_blocks=64, block_size=4, max_model_len=256, expected_output=1)
    sequences = [sequence(name, 100, max_tokens=100, salt=name.encode()) for name in "ab"]
    for seq in sequences:
        scheduler.add(seq)
    computed = 0
    while (plan := scheduler.schedule()) is not None:
        computed += int(plan.num_tokens.sum())
        run(scheduler, plan)
    assert all(seq.num_output_tokens == 100 for seq in sequences)
    assert computed < 400 + 200


def test_one_that_waits_with_landed_kv_keeps_nobody_from_running() -> None:
    """All blocks are with sequences that landed and wait; the running one, which is older, takes what it needs."""
    scheduler, pool = scheduler_of(num_blocks=8, block_size=4, max_num_seqs=1, max_model_len=32)
    running = sequence("a", 8, max_tokens=24)
    scheduler.add(running)
    run(scheduler, scheduler.schedule())  # type: ignore[arg-type]
    waiting = []
    for name in "bc":
        blocks = pool.allocate(3)
        assert blocks is not None
        waiting.append(
            sequence(name, 12, max_tokens=4, generated=np.array([5], np.int32), blocks=blocks, num_computed_tokens=12)
        )
        scheduler.add(waiting[-1])
    while (plan := scheduler.schedule()) is not None:
        scheduler.check_integrity()
        run(scheduler, plan)
    assert [seq.num_output_tokens for seq in (running, *waiting)] == [24, 4, 4]
    assert pool.counts().held == 0


@settings(max_examples=200)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60))
def test_a_pool_gives_each_block_to_one_owner(steps: list[tuple[bool, int]]) -> None:
    pool = BlockPool(20, 4)
    owned: list[np.ndarray[tuple[int], np.dtype[np.int32]]] = []
    for take, size in steps:
        if take:
            free = pool.num_free
            blocks = pool.allocate(size)
            assert (blocks is None) == (size > free)
            if blocks is not None:
                owned.append(blocks)
        elif owned:
            pool.free(owned.pop(size % len(owned)))
        pool.check_integrity()
        together = np.concatenate(owned) if owned else np.empty(0, np.int32)
        assert len(np.unique(together)) == len(together) == pool.counts().held


def test_a_block_freed_twice_is_noticed() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.free(blocks)
    with pytest.raises(AssertionError, match="FREE"):
        pool.free(blocks)

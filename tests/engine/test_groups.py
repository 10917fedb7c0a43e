"""Promise: ranks meet and agree bit by bit; one that dies or falls silent is told of soon, and by name."""

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core.errors import GroupLost, ModelError, StepLost
from engine.core.shards import part
from engine.parallel import ParallelGroup
from engine.process_group import ProcessGroup
from engine.shared_memory import Shared
from engine.shared_memory_group import SLOT_BYTES, SharedMemoryGroup
from tests.engine.ranks import Ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LONG = SLOT_BYTES // 2 * 3 + 7
"""Elements of a tensor that takes several rounds, the last one with an odd rest."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    ranks.close()


@pytest.fixture
def victims() -> Iterator[Ranks]:
    """Ranks that a test may kill."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def numbers(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def join(rank: int, size: int, shared: Shared | str, timeout: float = 30) -> ParallelGroup:
    return SharedMemoryGroup(rank, size, shared, timeout=timeout)


def reduce_each(test: Connection, rank: int, size: int, address: str, shapes: Any) -> list[torch.Tensor]:
    group = join(rank, size, address)
    return reduced(group, shapes)


def reduced(group: ParallelGroup, shapes: Any) -> list[torch.Tensor]:
    found = []
    for shape, dtype in shapes:
        with group.step():
            found.append(group.all_reduce(numbers(group.rank, shape, dtype)).clone())
    group.close()
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_an_all_reduce_is_the_sum_and_the_same_bits_on_every_rank(ranks: Ranks, size: int) -> None:
    shapes = [(shape, dtype) for dtype in DTYPES for shape in ((1,), (3, 5), (16, 576), (LONG,), (0, 4))]
    shared = SharedMemoryGroup.create(size)
    ranks.begin(size, reduce_each, size, shared.address, shapes)
    ours = reduced(join(0, size, shared), shapes)
    for theirs in ranks.results(size):
        assert all(torch.equal(here, there) for here, there in zip(ours, theirs, strict=True))
    for (shape, dtype), found in zip(shapes, ours, strict=True):
        exact = sum(numbers(rank, shape, dtype).double() for rank in range(size))
        # 16-bit sums are rounded once.
        assert torch.equal(found, exact.to(dtype)) or dtype is torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-5 if dtype is torch.float32 else 1e-2)


def gather_each(test: Connection, rank: int, size: int, address: str, shapes: Any) -> None:
    group = join(rank, size, address)
    for rows, columns in shapes:
        group.gather(shard(rank, size, rows, columns), columns)
    group.close()


def shard(rank: int, size: int, rows: int, columns: int) -> torch.Tensor:
    mine = part(columns, rank, size)
    return numbers(7, (rows, columns), torch.float32)[:, mine.start : mine.stop]


@pytest.mark.parametrize("size", [2, 4])
def test_gathered_columns_stand_in_the_order_of_the_ranks(ranks: Ranks, size: int) -> None:
    # The last: one row of a rank fills more than a slot.
    shapes = [(1, 7), (5, 4), (0, 9), (40, 30_001), (2, SLOT_BYTES)]
    shared = SharedMemoryGroup.create(size)
    ranks.begin(size, gather_each, size, shared.address, shapes)
    group = join(0, size, shared)
    for rows, columns in shapes:
        whole = group.gather(shard(0, size, rows, columns), columns)
        assert torch.equal(whole, numbers(7, (rows, columns), torch.float32))
    group.close()
    assert ranks.results(size) == [None] * (size - 1)


def fail_now_and_then(test: Connection, rank: int, size: int, address: str, steps: int) -> list[str]:
    """Each rank fails in some steps, before, between and after the rounds of a step."""
    return outcomes(join(rank, size, address), steps)


def outcomes(group: ParallelGroup, steps: int) -> list[str]:
    found = []
    for step in range(steps):
        try:
            with group.step():
                for at in range(3):
                    if (step * 7 + at * 3 + group.rank * 5) % 17 == 0:
                        raise ValueError("mine")
                    summed = group.all_reduce(torch.full((2000,), float(step * 10 + at)))
                    assert (summed == (step * 10 + at) * group.size).all()
        except (ValueError, StepLost) as error:
            found.append(type(error).__name__)
        else:
            found.append("done")
    group.close()
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_steps_that_fail_on_one_rank_leave_nothing_for_the_next(ranks: Ranks, size: int) -> None:
    steps = 300
    shared = SharedMemoryGroup.create(size)
    ranks.begin(size, fail_now_and_then, size, shared.address, steps)
    each = [outcomes(join(0, size, shared), steps), *ranks.results(size)]
    for step, found in enumerate(zip(*each, strict=True)):
        fails = [rank for rank in range(size) if any((step * 7 + at * 3 + rank * 5) % 17 == 0 for at in range(3))]
        if not fails:
            assert set(found) == {"done"}, step
        else:
            assert "done" not in found and "ValueError" in found, step
    assert {"done", "ValueError", "StepLost"} <= {kind for found in each for kind in found}


def meet_over_gloo(test: Connection, rank: int, size: int, rendezvous: Path, shapes: Any) -> list[torch.Tensor]:
    group = ProcessGroup(rank, size, "gloo", rendezvous, timeout=60)
    return over_gloo(group, shapes)


def over_gloo(group: ParallelGroup, shapes: Any) -> list[torch.Tensor]:
    found = []
    try:
        for shape, dtype in shapes:
            with group.step():
                found.append(group.all_reduce(numbers(group.rank, shape, dtype)))
            found.append(group.gather(shard(group.rank, group.size, 5, 31), 31))
        if group.rank == 0:
            with pytest.raises(GroupLost, match="the others could not be told: mine"), group.step():
                raise ValueError("mine")
    finally:
        group.close()
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_gloo_gives_the_same_where_memory_is_not_shared(ranks: Ranks, tmp_path: Path, size: int) -> None:
    shapes = [(shape, dtype) for dtype in (torch.float32, torch.bfloat16) for shape in ((7,), (16, 576))]
    ranks.begin(size, meet_over_gloo, size, tmp_path / "rendezvous", shapes)
    ours = over_gloo(ProcessGroup(0, size, "gloo", tmp_path / "rendezvous", timeout=60), shapes)
    for theirs in ranks.results(size):
        for (shape, dtype), here, there in zip(shapes, ours[::2], theirs[::2], strict=True):
            assert torch.equal(here, there)
            exact = sum(numbers(rank, shape, dtype).double() for rank in range(size))
            torch.testing.assert_close(here.double(), exact, rtol=2e-2, atol=2e-2)
    assert all(torch.equal(whole, numbers(7, (5, 31), torch.float32)) for whole in ours[1::2])


def test_a_backend_that_is_not_there_is_said_before_anything_waits(tmp_path: Path) -> None:
    if torch.distributed.is_nccl_available():
        pytest.skip("NCCL is there")
    with pytest.raises(ModelError, match="tensor_parallel > 1 needs nccl, which this build of torch has not"):
        ProcessGroup(0, 2, "nccl", tmp_path / "rendezvous")


def wait_for_ever(test: Connection, rank: int, size: int, address: str) -> str:
    """Meet, and then take part in nothing."""
    group = join(rank, size, address)
    try:
        test.send("here")
        test.recv()
    finally:
        group.close()
    return "let go"


def test_a_rank_that_is_killed_is_told_of_at_once(victims: Ranks) -> None:
    shared = SharedMemoryGroup.create(3)
    victims.begin(3, wait_for_ever, 3, shared.address)
    group = join(0, 3, shared)
    assert victims.results(3) == ["here", "here"]
    victim = victims.processes[1]
    assert victim.pid
    os.kill(victim.pid, signal.SIGKILL)
    started = time.monotonic()
    # Rank 1 is silent only; it is rank 2 that is dead, and that is seen although rank 1 is waited for first.
    with pytest.raises(GroupLost, match="rank 2 of 3 has died"), group.step():
        pass
    assert time.monotonic() - started < 2
    group.close()
    victims.connections[0].send(None)
    assert victims.results(2) == ["let go"]


def test_a_rank_that_stands_still_is_given_up_after_the_timeout(victims: Ranks) -> None:
    shared = SharedMemoryGroup.create(2)
    victims.begin(2, wait_for_ever, 2, shared.address)
    group = join(0, 2, shared, timeout=0.5)
    assert victims.results(2) == ["here"]
    started = time.monotonic()
    with pytest.raises(GroupLost, match=r"rank 1 of 2 has been silent for 0\.5 s"), group.step():
        pass
    assert 0.4 < time.monotonic() - started < 5
    group.close()
    victims.connections[0].send(None)
    assert victims.results(2) == ["let go"]


def test_a_rank_that_never_comes_and_one_that_is_gone_already_are_told_of() -> None:
    shared = SharedMemoryGroup.create(2)
    with pytest.raises(GroupLost, match="rank 1 of 2 has been silent"):
        SharedMemoryGroup(0, 2, shared, join_within=0.2)
    with pytest.raises(GroupLost, match="rank 1 cannot join its group"):
        join(1, 2, shared.address)  # rank 0 has left
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(GroupLost, match="rank 1 cannot join its group"):
        join(1, 2, "/proc/1/fd/1#" + 32 * "0" + ":4096")
    assert os.listdir("/proc/self/fd") == descriptors

"""Promise: one seed is one run, on any machine and in any process; what breaks a promise is made small."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from gateway.core.session import Session
from simulator.campaign import judged, shrunk
from simulator.plan import draw
from simulator.verdict import Invariant
from simulator.world import World

DIGESTS = """
from tests.simulator.test_one_seed import digests
print(*digests())
"""


def digests() -> list[str]:
    """What stands for all that happened in some runs."""
    runs = [World(draw(seed, faults=True), story=True).run() for seed in range(5)]
    return [hashlib.sha256(msgspec.msgpack.encode(run.history)).hexdigest() for run in runs]


def test_a_seed_is_the_same_run_in_every_process() -> None:
    other = subprocess.run(
        [sys.executable, "-c", DIGESTS], cwd=Path(__file__).parents[2], text=True, capture_output=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    ).stdout.split()  # fmt: skip
    assert other == digests() and len(set(other)) == 5


def test_no_run_looks_at_a_clock_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that did broke, but only in the first hours after the machine had started."""

    def looked() -> float:
        raise AssertionError("a clock of the machine was read")

    clocks = ("monotonic", "time", "perf_counter", "process_time", "thread_time")
    for clock in (*clocks, *(f"{name}_ns" for name in clocks), "clock_gettime", "clock_gettime_ns"):
        monkeypatch.setattr(time, clock, looked)
    runs = [judged(draw(seed, faults=True)) for seed in (1172, *range(8))]
    monkeypatch.undo()
    assert all(verdict.clean for _, verdict in runs) and len(runs[0][0].plan.wishes) == 3


def test_what_is_left_out_of_a_plan_leaves_the_rest_as_it_was() -> None:
    plan = draw(17, faults=True)
    assert plan.misfortunes, "this seed has none"
    less = plan.without(misfortunes=[plan.misfortunes[0].number])
    assert less.misfortunes == plan.misfortunes[1:] and less.wishes == plan.wishes
    assert draw(17, faults=True) == plan


def forget_the_first_token_at_resume(patch: pytest.MonkeyPatch) -> None:
    start = Session._start_message

    def forgetful(session: Session, placed: Any) -> Any:
        whole, session.generated = session.generated, session.generated[4:]
        try:
            return start(session, placed)
        finally:
            session.generated = whole

    patch.setattr(Session, "_start_message", forgetful)


def test_a_plan_that_breaks_a_promise_is_shrunk_to_what_breaks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(seed: int) -> bool:
        return not judged(draw(seed, faults=True)).verdict.clean

    forget_the_first_token_at_resume(monkeypatch)
    seed = next(seed for seed in range(100) if broken(seed))
    whole = draw(seed, faults=True)
    least = shrunk(whole, tries=60)
    assert 1 <= len(least.misfortunes) <= len(whole.misfortunes) and len(least.wishes) <= len(whole.wishes)
    assert all(judged(least.without(misfortunes=[each.number])).verdict.clean for each in least.misfortunes)
    assert not judged(least).verdict.clean
    monkeypatch.undo()
    assert judged(least).verdict.clean


def test_the_command_tells_the_story_of_a_seed() -> None:
    result = CliRunner().invoke(app, ["simulate", "--faults", "--seed", "3", "--trace"])
    assert result.exit_code == 0, result.output
    assert "PlacementWanted" in result.output and "seed 3:" in result.output


def test_the_command_names_the_seed_that_breaks_a_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_the_first_token_at_resume(monkeypatch)
    result = CliRunner().invoke(app, ["simulate", "--faults", "--seeds", "60", "--jobs", "1"])
    assert result.exit_code == 1
    assert "baton simulate --faults --seed" in result.output and "--trace" in result.output


def test_without_faults_nothing_is_ever_resumed() -> None:
    for seed in range(40):
        verdict = judged(draw(seed, faults=False)).verdict
        assert verdict.clean and verdict.resumes == 0 and verdict.faults == 0


def test_an_exception_in_a_core_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_session: Session, _event: Any, _now: float) -> Any:
        raise KeyError("no such thing")

    monkeypatch.setattr(Session, "handle", broken)
    verdict = judged(draw(1, faults=False)).verdict
    assert Invariant.NO_CRASH in {each.invariant for each in verdict.violations}

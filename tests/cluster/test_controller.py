"""Promise: whatever dies is started again, soon and not too often, as a whole, and the right ones hear of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.controller import END_WITHIN, START_WITHIN, Controller
from cluster.core.events import Begin, Died, Failed, GiveUp, Gone, Kill, Note, Ready, Start, TellDied, Tick, Up
from cluster.core.units import BackOff, Kind, Phase, Unit
from runtime.core.actions import WakeAt

BACK_OFF = BackOff()


def units() -> list[Unit]:
    def unit(name: str, kind: Kind, *processes: str, role: str = "") -> Unit:
        return Unit(name=name, kind=kind, processes=processes or (name,), back_off=BACK_OFF, role=role)

    return [
        unit("ray", Kind.HEAD),
        unit("router", Kind.ROUTER),
        unit("gateway", Kind.GATEWAY),
        unit("prefill-0", Kind.WORKER, role="prefill"),
        unit("prefill-1", Kind.WORKER, role="prefill"),
        unit("decode-0", Kind.WORKER, role="decode"),
        unit("decode-1", Kind.WORKER, "decode-1", "decode-1.rank1", role="decode"),
    ]


NAMES = [unit.name for unit in units() if unit.kind is not Kind.HEAD]


class Shell:
    """A controller, and a clock."""

    def __init__(self) -> None:
        self.controller = Controller(units())
        self.now = 100.0
        self.wake = float("inf")

    def handle(self, event: object, after: float = 0.0) -> list[object]:
        """What is to be done, without the ``WakeAt``."""
        self.now += after
        *actions, wake = self.controller.handle(event, self.now)  # type: ignore[arg-type]
        assert isinstance(wake, WakeAt)
        self.wake = wake.time
        self.controller.check_integrity()
        return list(actions)

    def tick(self) -> list[object]:
        """Let the time come that was asked for."""
        assert self.now <= self.wake < float("inf")
        return self.handle(Tick(), self.wake - self.now)

    def status(self, name: str):  # type: ignore[no-untyped-def]
        return next(status for status in self.controller.status(self.now) if status.name == name)

    def phase(self, name: str) -> Phase:
        phase: Phase = self.status(name).phase
        return phase


@pytest.fixture
def shell() -> Shell:
    """Everything runs."""
    shell = Shell()
    shell.handle(Begin())
    for name in NAMES:
        shell.handle(Ready(name, 1))
    shell.handle(Up())
    return shell


def test_everything_is_started_at_once() -> None:
    started = Shell().handle(Begin())
    assert started == [Start(name, 1, name.partition("-")[0] if "-" in name else "") for name in NAMES]


def test_a_first_start_that_fails_is_given_up_with_the_cause() -> None:
    shell = Shell()
    shell.handle(Begin())
    assert shell.handle(Failed("decode-0", 1, "no such model")) == [GiveUp("no such model")]


def test_a_process_that_dies_before_all_is_up_is_the_end_too() -> None:
    shell = Shell()
    shell.handle(Begin())
    shell.handle(Ready("router", 1))
    assert GiveUp("router died: killed") in shell.handle(Died("router", 1, "router", "killed"))


def test_a_first_start_that_never_ends_is_given_up() -> None:
    shell = Shell()
    shell.handle(Begin())
    assert any(isinstance(action, GiveUp) for action in shell.handle(Tick(), START_WITHIN))


def test_a_workers_death_is_told_before_anything_else_and_it_starts_again_at_once(shell: Shell) -> None:
    actions = shell.handle(Died("decode-0", 1, "decode-0", "killed"))
    assert actions[0] == TellDied("decode-0", 1, "killed")
    assert actions[-1] == Start("decode-0", 2, "decode")
    shell.handle(Ready("decode-0", 2))
    status = shell.status("decode-0")
    assert (status.phase, status.restarts, status.cause) == (Phase.RUNNING, 1, "killed")


def test_a_gateway_starts_again_and_the_router_hears_of_its_death(shell: Shell) -> None:
    actions = shell.handle(Died("gateway", 1, "gateway", "killed"))
    assert actions[0] == TellDied("gateway", 1, "killed") and Start("gateway", 2, "") in actions


def test_a_router_starts_again_too(shell: Shell) -> None:
    actions = shell.handle(Died("router", 1, "router", "killed"))
    assert Start("router", 2, "") in actions
    assert not any(isinstance(action, TellDied) for action in actions)


def test_the_last_worker_starts_again_like_any_other(shell: Shell) -> None:
    for name in ("prefill-0", "prefill-1"):
        assert Start(name, 2, "prefill") in shell.handle(Died(name, 1, name, "killed"))


def test_a_death_while_there_is_no_router_is_told_to_the_next_one(shell: Shell) -> None:
    shell.handle(Died("router", 1, "router", "killed"))
    assert not any(isinstance(a, TellDied) for a in shell.handle(Died("decode-0", 1, "decode-0", "killed")))
    assert TellDied("decode-0", 1, "killed") in shell.handle(Ready("router", 2))
    shell.handle(Died("router", 2, "router", "killed"))
    assert not any(isinstance(a, TellDied) for a in shell.handle(Ready("router", 3))), "told once"


def die_in_a_row(shell: Shell, name: str, times: int, health: float) -> list[float]:
    """Seconds from each death to the next start."""
    delays = []
    for _ in range(times):
        incarnation = shell.controller._units[name].incarnation
        died = shell.now
        actions = shell.handle(Died(name, incarnation, name, "killed"))
        while Start(name, incarnation + 1, "decode") not in actions:
            assert shell.phase(name) is Phase.BACK_OFF
            actions = shell.tick()
        delays.append(shell.now - died)
        shell.handle(Ready(name, incarnation + 1))
        shell.now += health
    return delays


def test_the_delay_doubles_from_half_a_second_to_a_minute(shell: Shell) -> None:
    assert die_in_a_row(shell, "decode-0", 11, health=59.0) == [0, 0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_healthy_minute_makes_the_next_death_the_first(shell: Shell) -> None:
    assert die_in_a_row(shell, "decode-0", 3, health=0.0) == [0, 0.5, 1]
    shell.now += BACK_OFF.reset_after
    assert die_in_a_row(shell, "decode-0", 2, health=0.0) == [0, 0.5]


def test_a_start_that_fails_counts_as_a_death_and_what_was_made_is_killed(shell: Shell) -> None:
    shell.handle(Died("decode-0", 1, "decode-0", "killed"))
    actions = shell.handle(Failed("decode-0", 2, "port taken"), after=1.0)
    assert Kill("decode-0", 2) in actions and shell.phase("decode-0") is Phase.ENDING
    shell.handle(Gone("decode-0", 2))
    assert shell.phase("decode-0") is Phase.BACK_OFF
    assert shell.status("decode-0").retry_in == pytest.approx(0.5)
    assert Start("decode-0", 3, "decode") in shell.tick()
    assert shell.status("decode-0").cause == "port taken"


def test_a_start_that_never_ends_is_killed(shell: Shell) -> None:
    shell.handle(Died("decode-0", 1, "decode-0", "killed"))
    assert Kill("decode-0", 2) in shell.tick()
    assert "did not start within" in shell.status("decode-0").cause


def test_the_back_off_counts_from_the_death_not_from_the_end_of_the_last_rank(shell: Shell) -> None:
    shell.handle(Died("decode-1", 1, "decode-1", "killed"))
    shell.handle(Died("decode-1", 1, "decode-1.rank1", "left alone"), after=1.0)
    assert shell.phase("decode-1") is Phase.STARTING


def test_a_group_is_replaced_as_a_whole_once_its_other_rank_has_ended(shell: Shell) -> None:
    actions = shell.handle(Died("decode-1", 1, "decode-1.rank1", "killed"))
    assert actions[0] == TellDied("decode-1", 1, "decode-1.rank1 died: killed")
    assert not any(isinstance(action, Start) for action in actions)
    actions = shell.handle(Died("decode-1", 1, "decode-1", "GroupLost"), after=0.1)
    assert Start("decode-1", 2, "decode") in actions
    assert not any(isinstance(action, TellDied) for action in actions), "told once"


def test_a_rank_that_does_not_end_is_killed(shell: Shell) -> None:
    shell.handle(Died("decode-1", 1, "decode-1", "killed"))
    assert shell.wake == pytest.approx(shell.now + END_WITHIN)
    assert shell.tick() == [Kill("decode-1", 1)]
    assert Start("decode-1", 2, "decode") in shell.handle(Died("decode-1", 1, "decode-1.rank1", "killed"))


def test_others_may_die_while_a_replacement_loads(shell: Shell) -> None:
    shell.handle(Died("decode-0", 1, "decode-0", "killed"))
    assert Start("prefill-0", 2, "prefill") in shell.handle(Died("prefill-0", 1, "prefill-0", "killed"))
    assert Note("decode-0", "ready") in shell.handle(Ready("decode-0", 2))


def test_what_comes_late_of_an_older_incarnation_is_dropped(shell: Shell) -> None:
    shell.handle(Died("decode-0", 1, "decode-0", "killed"))
    for late in (
        Died("decode-0", 1, "decode-0", "again"),
        Ready("decode-0", 1),
        Failed("decode-0", 1, "late"),
        Gone("decode-0", 1),
    ):
        assert shell.handle(late) == []
    assert shell.phase("decode-0") is Phase.STARTING


def test_while_rays_head_is_away_nothing_is_started_and_then_everything_that_is_due(shell: Shell) -> None:
    actions = shell.handle(Died("ray", 1, "ray", "killed"))
    assert Start("ray", 2, "") in actions
    actions = shell.handle(Died("decode-0", 1, "decode-0", "killed"))
    assert actions[0] == TellDied("decode-0", 1, "killed"), "the router hears of it nevertheless"
    assert not any(isinstance(action, Start) for action in actions)
    assert shell.phase("decode-0") is Phase.BACK_OFF
    assert Start("decode-0", 2, "decode") in shell.handle(Ready("ray", 2), after=30.0)


def test_rays_head_has_a_back_off_too(shell: Shell) -> None:
    shell.handle(Died("ray", 1, "ray", "killed"))
    shell.handle(Failed("ray", 2, "port taken"))
    shell.handle(Gone("ray", 2))
    assert shell.phase("ray") is Phase.BACK_OFF
    assert Start("ray", 3, "") in shell.tick()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["die", "ready", "fail", "gone", "tick"]),
        st.sampled_from(["ray", *NAMES]),
        st.integers(0, 1),
        st.floats(0, 90),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(STEPS)
def test_whatever_happens_everything_runs_in_the_end(steps: list[tuple[str, str, int, float]]) -> None:
    shell = Shell()
    shell.handle(Begin())
    for name in NAMES:
        shell.handle(Ready(name, 1))
    shell.handle(Up())
    for what, name, number, after in steps:
        unit = shell.controller._units[name]
        process = unit.processes[number % len(unit.processes)]
        event = {
            "die": Died(name, unit.incarnation, process, "killed"),
            "ready": Ready(name, unit.incarnation),
            "fail": Failed(name, unit.incarnation, "failed"),
            "gone": Gone(name, unit.incarnation),
            "tick": Tick(),
        }[what]
        shell.handle(event, after=after)
    for _ in range(10):
        for unit in shell.controller._units.values():
            if unit.phase is Phase.STARTING:
                shell.handle(Ready(unit.name, unit.incarnation))
            elif unit.phase is Phase.ENDING:
                shell.handle(Gone(unit.name, unit.incarnation))
        if shell.wake < float("inf"):
            shell.tick()
    assert {status.phase for status in shell.controller.status(shell.now)} == {Phase.RUNNING}

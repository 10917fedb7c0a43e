"""Promise: what people ask for is done one after the other, never against what is left to serve, and ends with word."""

import pytest

from cluster.core.events import (
    Died,
    Done,
    Drain,
    DrainWanted,
    Failed,
    Flip,
    FlipWanted,
    Gone,
    Kill,
    Moved,
    Ready,
    RestartWanted,
    Retire,
    Start,
    Stop,
    Undrain,
    UndrainWanted,
)
from cluster.core.operations import DRAIN_WITHIN, STOP_WITHIN, Refused
from cluster.core.units import Phase
from tests.cluster.test_controller import NAMES, Shell, shell

__all__ = ["shell"]
TICKET = 7


def role(name: str) -> str:
    return name.partition("-")[0] if "-" in name else ""


def test_a_rolling_restart_takes_the_workers_one_by_one_then_the_router_then_the_gateway(shell: Shell) -> None:
    actions = shell.handle(RestartWanted(TICKET, ()))
    order = [*(name for name in NAMES if "-" in name), "router", "gateway"]
    for name in order:
        if "-" in name:
            assert Drain(name, 1) in actions and shell.phase(name) is Phase.RUNNING
            actions = shell.handle(Moved(name, 1), after=5.0)
        if name == "gateway":
            assert Start(name, 2, "") in actions and Stop(name, 1) not in actions, "both listen for a while"
            actions = shell.handle(Ready(name, 2), after=5.0)
            assert Retire(name, 1) in actions
            break
        assert Stop(name, 1) in actions and shell.phase(name) is Phase.STOPPING
        assert all(shell.phase(other) is Phase.RUNNING for other in NAMES if other != name), "one at a time"
        actions = shell.handle(Gone(name, 1), after=1.0)
        assert Start(name, 2, role(name)) in actions, "without back-off"
        assert not any(isinstance(action, Done) for action in actions)
        actions = shell.handle(Ready(name, 2), after=5.0)
    assert Done(TICKET, "") in actions
    assert [shell.status(name).restarts for name in order] == [1] * len(order)
    assert [shell.status(name).cause for name in order] == [""] * len(order), "no death"


def test_a_gateway_whose_replacement_does_not_start_serves_on_until_one_does(shell: Shell) -> None:
    shell.handle(RestartWanted(TICKET, ("gateway",)))
    actions = shell.handle(Failed("gateway", 2, "no port"))
    assert Kill("gateway", 2) in actions and not any(isinstance(action, Retire) for action in actions)
    assert any(isinstance(action, Done) and "no port" in action.problem for action in actions)
    assert Start("gateway", 3, "") in shell.handle(Gone("gateway", 2))
    assert Retire("gateway", 1) in shell.handle(Ready("gateway", 3))


def test_a_gateway_that_dies_while_its_replacement_starts_is_nothing_new(shell: Shell) -> None:
    shell.handle(RestartWanted(TICKET, ("gateway",)))
    assert shell.handle(Died("gateway", 1, "gateway", "killed")) == []
    assert Done(TICKET, "") in shell.handle(Ready("gateway", 2))


def test_one_worker_is_restarted_and_no_other(shell: Shell) -> None:
    shell.handle(RestartWanted(TICKET, ("decode-0",)))
    shell.handle(Moved("decode-0", 1))
    shell.handle(Died("decode-0", 1, "decode-0", "it was killed when it had stopped"))
    assert Done(TICKET, "") in shell.handle(Ready("decode-0", 2))


def test_what_does_not_stop_in_time_is_killed(shell: Shell) -> None:
    assert Stop("router", 1) in shell.handle(RestartWanted(TICKET, ("router",)))
    assert shell.wake == shell.now + STOP_WITHIN
    assert shell.tick() == [Kill("router", 1)]
    assert Start("router", 2, "") in shell.handle(Gone("router", 1))


def test_a_replacement_that_does_not_start_ends_the_restart_and_spares_the_others(shell: Shell) -> None:
    shell.handle(RestartWanted(TICKET, ()))
    shell.handle(Moved("prefill-0", 1))
    shell.handle(Gone("prefill-0", 1))
    actions = shell.handle(Failed("prefill-0", 2, "no such model"))
    (done,) = (action for action in actions if isinstance(action, Done))
    assert "prefill-0 did not come back: no such model" in done.problem
    assert [shell.phase(name) for name in NAMES if name != "prefill-0"] == [Phase.RUNNING] * 5


def test_a_worker_that_dies_while_it_is_drained_is_replaced_and_the_restart_goes_on(shell: Shell) -> None:
    shell.handle(RestartWanted(TICKET, ("decode-0", "decode-1")))
    shell.handle(Died("decode-0", 1, "decode-0", "killed"))
    actions = shell.handle(Ready("decode-0", 2))
    assert Drain("decode-1", 1) in actions


def test_a_workers_turn_waits_until_another_one_of_its_role_takes_work(shell: Shell) -> None:
    shell.handle(Died("decode-1", 1, "decode-1", "killed"))
    actions = shell.handle(RestartWanted(TICKET, ("decode-0",)))
    assert not any(isinstance(action, Drain) for action in actions)
    shell.handle(Died("decode-1", 1, "decode-1.rank1", "left alone"))
    assert Drain("decode-0", 1) in shell.handle(Ready("decode-1", 2))


def test_what_is_in_back_off_is_started_at_once_when_asked(shell: Shell) -> None:
    shell.handle(Died("decode-0", 1, "decode-0", "killed"))
    for number in (2, 3, 4):
        shell.handle(Failed("decode-0", number, "no such model"))
        shell.handle(Gone("decode-0", number))
        if number < 4:
            shell.tick()
    assert shell.phase("decode-0") is Phase.BACK_OFF and (shell.status("decode-0").retry_in or 0) > 0
    assert Start("decode-0", 5, "decode") in shell.handle(RestartWanted(TICKET, ("decode-0",)))
    assert Done(TICKET, "") in shell.handle(Ready("decode-0", 5))


def test_a_worker_that_cannot_be_drained_in_time_goes_on_and_so_do_the_others(shell: Shell) -> None:
    shell.handle(RestartWanted(TICKET, ("decode-0", "decode-1")))
    assert shell.wake == shell.now + DRAIN_WITHIN
    undrain, done = shell.tick()
    assert undrain == Undrain("decode-0", 1)
    assert isinstance(done, Done) and "not drained within" in done.problem
    assert shell.phase("decode-0") is Phase.RUNNING


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (RestartWanted(TICKET, ("decode-2",)), "there is no 'decode-2'; did you mean 'decode-"),
        (RestartWanted(TICKET, ("ray",)), "when it dies"),
        (DrainWanted(TICKET, "router"), "no worker"),
        (FlipWanted(TICKET, "gateway"), "no worker"),
        (UndrainWanted(TICKET, "decode-0"), "is not drained"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(shell: Shell, wanted: object, why: str) -> None:
    with pytest.raises(Refused, match=why):
        shell.handle(wanted)


def test_one_restart_at_a_time(shell: Shell) -> None:
    shell.handle(RestartWanted(TICKET, ("decode-0",)))
    with pytest.raises(Refused, match="under way"):
        shell.handle(RestartWanted(TICKET + 1, ("prefill-0",)))
    with pytest.raises(Refused, match="moved already"):
        shell.handle(DrainWanted(TICKET + 1, "decode-0"))


def test_the_last_of_its_role_is_neither_drained_nor_flipped_nor_restarted_unless_forced(shell: Shell) -> None:
    assert Drain("decode-1", 1) in shell.handle(DrainWanted(TICKET, "decode-1"))
    assert Done(TICKET, "") in shell.handle(Moved("decode-1", 1))
    for wanted in (
        DrainWanted(TICKET, "decode-0"),
        FlipWanted(TICKET, "decode-0"),
        RestartWanted(TICKET, ("decode-0",)),
    ):
        with pytest.raises(Refused, match=r"last|only"):
            shell.handle(wanted)
    assert Stop("decode-0", 1) in shell.handle(RestartWanted(TICKET, ("decode-0",), force=True))


def test_a_drained_worker_stays_so_when_it_or_the_router_is_started_again(shell: Shell) -> None:
    shell.handle(DrainWanted(TICKET, "prefill-0"))
    shell.handle(Moved("prefill-0", 1))
    assert shell.status("prefill-0").drained
    shell.handle(Died("prefill-0", 1, "prefill-0", "killed"))
    assert Drain("prefill-0", 2) in shell.handle(Ready("prefill-0", 2))
    shell.handle(Died("router", 1, "router", "killed"))
    assert Drain("prefill-0", 2) in shell.handle(Ready("router", 2))
    assert shell.handle(UndrainWanted(TICKET, "prefill-0"))[1:] == [Undrain("prefill-0", 2), Done(TICKET, "")]
    assert not shell.status("prefill-0").drained


def test_a_drain_that_is_undone_ends_with_word_to_both(shell: Shell) -> None:
    shell.handle(DrainWanted(1, "prefill-0"))
    told = {
        action.ticket: action.problem for action in shell.handle(UndrainWanted(2, "prefill-0")) if type(action) is Done
    }
    assert told == {1: "it was told to take work again", 2: ""}


def test_a_worker_that_dies_during_a_drain_ends_it_with_word(shell: Shell) -> None:
    shell.handle(DrainWanted(TICKET, "prefill-0"))
    actions = shell.handle(Died("prefill-0", 1, "prefill-0", "killed"))
    assert Done(TICKET, "prefill-0 died before that: killed") in actions


def test_a_flipped_worker_keeps_its_new_role_when_it_is_started_again(shell: Shell) -> None:
    assert Flip("prefill-1", 1, "decode") in shell.handle(FlipWanted(TICKET, "prefill-1"))
    assert Done(TICKET, "") in shell.handle(Moved("prefill-1", 1))
    assert Start("prefill-1", 2, "decode") in shell.handle(Died("prefill-1", 1, "prefill-1", "killed"))
    with pytest.raises(Refused, match="last prefill worker"):
        shell.handle(FlipWanted(TICKET, "prefill-0"))


def test_a_drain_that_fails_ends_with_the_reason(shell: Shell) -> None:
    shell.handle(FlipWanted(TICKET, "prefill-1"))
    assert Done(TICKET, "prefill-1: no router") in shell.handle(Moved("prefill-1", 1, "no router"))
    assert shell.status("prefill-1").phase is Phase.RUNNING
    assert Start("prefill-1", 2, "prefill") in shell.handle(Died("prefill-1", 1, "prefill-1", "killed")), "as it was"

"""Promise: one seed is one sequence of faults, and none leaves nobody to do the work."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
import typer

from cluster.chaos.catalogue import catalogue
from cluster.chaos.core.faults import Fault, Kind, Planner, Victim
from cluster.chaos.options import kinds, seconds

ALL = (Kind.KILL, Kind.STOP, Kind.CUT, Kind.SLOW, Kind.CORRUPT)


def planner(seed: int, *wanted: Kind) -> Planner:
    return Planner(wanted or ALL, lambda number: Random(f"{seed}/{number}"))


def two_by_two(*, usable: frozenset[str] | None = None, restarts: bool = True) -> list[Victim]:
    names = {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode", "decode-1": "decode"}
    return [
        Victim(name, role, usable is None or name in usable, restarts, sends=role == "prefill")
        for name, role in names.items()
    ]


def faults(seed: int, count: int, victims: list[Victim]) -> list[Fault | None]:
    plan = planner(seed)
    return [plan.next(victims) for _ in range(count)]


def test_the_same_seed_gives_the_same_faults_and_another_one_others() -> None:
    assert faults(1, 50, two_by_two()) == faults(1, 50, two_by_two())
    assert faults(1, 50, two_by_two()) != faults(2, 50, two_by_two())


def test_every_kind_has_its_turn() -> None:
    drawn = Counter(fault.kind for fault in faults(3, 50, two_by_two()) if fault is not None)
    assert drawn == dict.fromkeys(ALL, 10)


def test_links_are_bad_only_where_kv_leaves() -> None:
    plan = planner(0, Kind.CUT, Kind.SLOW, Kind.CORRUPT)
    hit = {fault.victim for fault in (plan.next(two_by_two()) for _ in range(30)) if fault is not None}
    assert hit == {"prefill-0", "prefill-1"}


def test_nobody_is_killed_or_stopped_who_alone_does_the_work() -> None:
    left = frozenset({"prefill-0", "decode-0", "decode-1"})
    plan = planner(0, Kind.STOP)
    assert {plan.next(two_by_two(usable=left)).victim for _ in range(30)} == {"decode-0", "decode-1"}  # type: ignore[union-attr]
    alone = frozenset({"prefill-0", "decode-0"})
    assert planner(0, Kind.STOP, Kind.CUT).next(two_by_two(usable=alone)) is None
    assert planner(0, Kind.KILL).next(two_by_two(usable=alone, restarts=False)) is None


def test_the_one_router_is_hit_only_where_it_comes_back() -> None:
    assert planner(0, Kind.KILL).next([Victim("router", "router", usable=True)]) is None
    fault = planner(0, Kind.KILL).next([Victim("router", "router", usable=True, restarts=True)])
    assert fault is not None and fault.victim == "router"


def test_rays_head_is_hit_by_its_own_kind_alone_and_others_go_on_while_it_is_gone() -> None:
    plan = planner(0, Kind.HEAD, Kind.KILL)
    head = Victim("ray", "head", usable=True, restarts=True)
    drawn = [plan.next([*two_by_two(), head]) for _ in range(10)]
    assert {(fault.kind, fault.victim == "ray") for fault in drawn if fault} == {(Kind.HEAD, True), (Kind.KILL, False)}
    gone = [plan.next([*two_by_two(), replace(head, usable=False)]) for _ in range(6)]
    assert [fault and fault.kind for fault in gone] == [Kind.KILL] * 6


def test_a_gateway_is_killed_but_not_stopped_and_only_beside_another() -> None:
    both = [Victim(name, "gateway", usable=True, restarts=True) for name in ("gateway-0", "gateway-1")]
    assert {planner(seed, Kind.KILL).next(both).victim for seed in range(9)} == {"gateway-0", "gateway-1"}  # type: ignore[union-attr]
    assert planner(0, Kind.STOP).next(both) is None
    assert planner(0, Kind.KILL).next(both[:1]) is None


@pytest.mark.parametrize(("text", "value"), [("60s", 60), ("10m", 600), ("1.5m", 90), ("500ms", 0.5), ("7", 7)])
def test_times_are_read(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "0s", "s", "-5s", "1d", "nan"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        seconds(text)


def test_kinds_are_read_and_others_refused() -> None:
    assert kinds("kill, stop,kill") == (Kind.KILL, Kind.STOP)
    with pytest.raises(typer.BadParameter, match="burn"):
        kinds("kill,burn")


def test_the_catalogue_is_told_by_its_seed() -> None:
    def bodies(seed: int) -> list[object]:
        return [case.body for case in catalogue("m", seed, 32)]

    assert bodies(1) == bodies(1)
    assert bodies(1) != bodies(2)
    assert len({str(body) for body in bodies(1)}) == 32

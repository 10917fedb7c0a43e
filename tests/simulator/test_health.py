"""Promise: the checker knows since when nobody could serve, and takes no two faults that overlap for one that lasts."""

from messages.common import Role
from messages.ids import Epoch
from simulator.history import Frozen, Incarnation, Killed, Started, Thawed
from simulator.judges.health import NEVER, Health

P0, D0 = Incarnation("p0", Epoch(1)), Incarnation("d0", Epoch(2))
BOTH = (Role.PREFILL, Role.DECODE)


def health(*needed: Role) -> Health:
    health = Health(0.5, needed)
    for process, role in ((P0, Role.PREFILL), (D0, Role.DECODE)):
        health.take(Started(0.0, process, "worker", role, 64, 16, 16))
    return health


def test_of_two_roles_that_are_gone_one_after_the_other_none_has_been_gone_all_the_time() -> None:
    judged = health(*BOTH)
    assert judged.gone_since == NEVER
    judged.take(Frozen(1.0, D0))
    judged.take(Frozen(2.0, P0))
    assert judged.gone_since == 1.0
    judged.take(Thawed(3.0, D0))
    assert judged.gone_since == 2.0
    judged.take(Thawed(4.0, P0))
    assert judged.gone_since == NEVER


def test_a_role_that_another_can_stand_in_for_is_not_missed() -> None:
    judged = health(Role.DECODE)
    judged.take(Killed(1.0, P0))
    assert judged.gone_since == NEVER
    judged.take(Killed(2.0, D0))
    assert judged.gone_since == 2.0

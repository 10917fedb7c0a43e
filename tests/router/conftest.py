import pytest

from messages.common import Role
from tests.router.world import World, register


@pytest.fixture
def pair() -> World:
    """Two prefill and two decode workers."""
    world = World()
    for worker, role in (("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE)):
        assert world.handle(register(worker, role)) == []
    return world

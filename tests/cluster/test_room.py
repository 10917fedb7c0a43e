"""Promise: where there is no room for what a cluster needs, that is said before anything starts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import TopologyError
from cluster.launch import Cluster
from cluster.plan import make_plan
from cluster.topology import Topology

POOLS = [{"name": "a", "role": "colocated", "placement": {"labels": {"role": "a"}}}]


def books(cpus: float) -> Any:
    """Ray's, of the host of the launcher."""
    here = SimpleNamespace(get_node_id=lambda: "here")
    state = SimpleNamespace(available_resources_per_node=lambda: {"here": {"CPU": cpus}, "there": {"CPU": 64.0}})
    return SimpleNamespace(get_runtime_context=lambda: here, _private=SimpleNamespace(state=state))


def test_the_head_of_a_joined_ray_has_room_for_router_and_gateways_or_says_so(tiny_llama: Path) -> None:
    cluster = Cluster(
        make_plan(Topology.parse({"model": str(tiny_llama), "pools": POOLS, "cluster": {"address": "auto"}}))
    )
    assert cluster.plan.spread
    cluster._session.ray = books(0.0)
    with pytest.raises(TopologyError, match=r"this host has no room for router and gateways: .* 0 CPUs free; give"):
        cluster._check_room([])
    cluster._session.ray = books(4.0)
    cluster._check_room([])

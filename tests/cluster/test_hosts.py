"""Promise: a worker has a place on a host that is meant for it, and another one when that host is lost."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.errors import LaunchError
from cluster.hosts import Hosts

pytestmark = pytest.mark.ray
DECODE = {"role": "decode"}


@pytest.fixture
def ray_cluster() -> Iterator[Any]:
    """A Ray of several hosts, of which the first has no room for workers."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_worker_keeps_its_place_until_its_host_is_lost_and_has_another_one_then(ray_cluster: Any) -> None:
    import ray

    hosts, waited = Hosts(ray), threading.Event()

    def place(within: float, cancelled: bool = False) -> Any:
        return hosts.place(
            "decode-0", "decode", [{"CPU": 1.5}], DECODE, within=within, waits=waited.set, cancelled=lambda: cancelled
        )

    with pytest.raises(LaunchError, match="decode-0: it was stopped while it waited for room"):
        place(30, cancelled=True)
    first = ray_cluster.add_node(num_cpus=2, labels=DECODE)
    group, node = place(30)
    assert node.labels.items() >= DECODE.items() and node.id == first.node_id
    assert place(0) == (group, node)
    assert not waited.is_set()
    ray_cluster.remove_node(first)
    ray_cluster.add_node(num_cpus=2, labels={"role": "prefill"})
    with pytest.raises(LaunchError, match=r"no host has room for decode-0 \(1.5 CPU, labelled role=decode\).*prefill"):
        place(3)
    assert waited.is_set()
    second = ray_cluster.add_node(num_cpus=2, labels=DECODE)
    again, node = place(30)
    assert again is group and node.id == second.node_id

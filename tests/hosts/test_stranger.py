"""Promise: what lets everybody in does not escape the stranger of the test of ports; so its silence there says much."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cluster import ray_session
from cluster.errors import LaunchError
from cluster.ray_session import RaySession
from kv_transfer.transports.zmq import ZmqReceiver
from messages.codec import decoder_for
from messages.gateway_to_worker import Abort
from runtime.mailbox import Mailbox
from tests.gateway.conftest import serving
from tests.hosts.stranger import admitted
from tests.security.test_curve import SHARD


def said(target: str) -> set[str]:
    """Each without what was answered."""
    return {found.partition(":")[0] for found in admitted(target)}


def test_a_mailbox_and_a_receiver_of_kv_without_keys_are_found() -> None:
    mailbox = Mailbox("127.0.0.1", decoder_for(Abort))
    receiver = ZmqReceiver(np.zeros((4, 4096), np.uint8), "127.0.0.1", SHARD, print)
    try:
        assert said(mailbox.address.removeprefix("tcp://")) == {"ZeroMQ PUSH"}
        assert said(receiver.endpoint.address.removeprefix("tcp://")) == {"ZeroMQ DEALER"}
    finally:
        receiver.shutdown()
        mailbox.close()


def test_a_gateway_without_keys_is_found(tiny_llama: Path) -> None:
    with serving(tiny_llama, grpc_port=0) as (_, server):
        assert {"HTTP /v1/models", "HTTP /status", "HTTP /metrics"} <= said(f"127.0.0.1:{server.port}")
        assert said(f"127.0.0.1:{server.grpc_port}") == {
            "gRPC /vllm.grpc.engine.VllmEngine/GetModelInfo",
            "gRPC /inference.GRPCInferenceService/ServerMetadata",
        }


@pytest.fixture
def open_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray that asks for no token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.mark.ray
def test_a_ray_without_a_token_is_found(open_ray: Any) -> None:
    rays = [info.process.pid for processes in open_ray.head_node.all_processes.values() for info in processes]
    trees = [
        process for pid in rays for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))
    ]
    listening = {
        each.laddr.port for process in trees for each in process.net_connections("tcp") if each.status == "LISTEN"
    }
    found = {what for port in listening for what in said(f"127.0.0.1:{port}")}
    assert found >= {
        "gRPC /ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
        "gRPC /ray.rpc.InternalKVGcsService/InternalKVKeys",
        "gRPC /ray.rpc.NodeManagerService/GetNodeStats",
        "gRPC /ray.rpc.ObjectManagerService/Pull",
        "HTTP /get_runtime_envs_info",
    }


@pytest.mark.ray
def test_a_ray_beyond_loopback_without_a_token_is_joined_only_where_that_is_wanted(
    open_ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_session, "is_loopback", lambda host: False)
    with pytest.raises(LaunchError, match=r"asks for no token: .*cluster\.allow_open_ray: true"):
        RaySession(open_ray.address, "stranger").start()
    wanted = RaySession(open_ray.address, "stranger", allow_open=True)
    wanted.start()
    assert wanted.joined == open_ray.address
    wanted.stop()

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from gateway.protos.open_inference_pb2_grpc import GRPCInferenceServiceStub
from gateway.protos.vllm_engine_pb2_grpc import VllmEngineStub
from gateway.server import GatewayServer
from tests.gateway.conftest import serving
from tests.gateway.fake_cluster import FakeCluster


@pytest.fixture(scope="module")
def served(tiny_llama: Path) -> Iterator[tuple[FakeCluster, GatewayServer]]:
    with serving(tiny_llama, grpc_port=0) as pair:
        yield pair


@pytest.fixture(scope="module")
def channels(served: tuple[FakeCluster, GatewayServer]) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{served[1].grpc_port}") as channel:
        yield channel


@pytest.fixture
def channel(channels: grpc.Channel, cluster: FakeCluster) -> grpc.Channel:
    return channels


@pytest.fixture
def engine(channel: grpc.Channel) -> VllmEngineStub:
    return VllmEngineStub(channel)


@pytest.fixture
def inference(channel: grpc.Channel) -> GRPCInferenceServiceStub:
    return GRPCInferenceServiceStub(channel)

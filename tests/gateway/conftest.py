import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from gateway.auth import EVERYONE
from gateway.config import GatewayConfig
from gateway.openai_api import _owned, _sequence
from gateway.server import GatewayServer
from gateway.tokenization import Tokenizer
from tests.gateway.fake_cluster import FakeCluster

MODEL = "tiny-llama"


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer(tiny_llama)


def sequence(id: str, choice: int) -> str:
    """What the cluster calls a choice of an answer, where there are no API keys."""
    return _sequence(_owned(id, EVERYONE.name), choice)


@contextlib.contextmanager
def serving(model: Path, **settings: object) -> Iterator[tuple[FakeCluster, GatewayServer]]:
    """A gateway before a scripted cluster; both are gone afterwards."""
    cluster = FakeCluster()
    config = GatewayConfig(
        model=str(model), served_model_name=MODEL, router=cluster.address, **({"port": 0, "drain": 0.2} | settings)
    )
    server = GatewayServer(config)
    try:
        server.start()
        yield cluster, server
    finally:
        server.stop()
        cluster.stop()


@pytest.fixture(scope="module")
def served(tiny_llama: Path) -> Iterator[tuple[FakeCluster, GatewayServer]]:
    with serving(tiny_llama) as pair:
        yield pair


@pytest.fixture
def cluster(served: tuple[FakeCluster, GatewayServer]) -> FakeCluster:
    served[0].reset()
    return served[0]


@pytest.fixture
def server(served: tuple[FakeCluster, GatewayServer], cluster: FakeCluster) -> GatewayServer:
    return served[1]


@pytest.fixture(scope="module")
def clients(served: tuple[FakeCluster, GatewayServer]) -> Iterator[tuple[openai.OpenAI, httpx.Client]]:
    """Made once, since each reads the machine's certificates."""
    url = served[1].url
    with (
        openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=10) as client,
        httpx.Client(base_url=url, timeout=10) as http,
    ):
        yield client, http


@pytest.fixture
def client(clients: tuple[openai.OpenAI, httpx.Client], cluster: FakeCluster) -> openai.OpenAI:
    return clients[0]


@pytest.fixture
def http(clients: tuple[openai.OpenAI, httpx.Client], cluster: FakeCluster) -> httpx.Client:
    return clients[1]

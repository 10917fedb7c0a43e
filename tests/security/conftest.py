"""A gateway with tenants before a scripted cluster."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gateway.auth import Tenant, digest_of
from gateway.core.quotas import Allowance
from gateway.server import GatewayServer
from tests.gateway.conftest import serving
from tests.gateway.fake_cluster import FakeCluster

ALICE, BOB, ADMIN = "bt-alice-0123456789", "bt-bob-0123456789", "bt-admin-0123456789"
TENANTS = (
    Tenant(name="alice", digests=(digest_of("an older key"), digest_of(ALICE))),
    Tenant(name="bob", digests=(digest_of(BOB),), allowance=Allowance(max_concurrent_requests=2)),
    Tenant(name="ops", digests=(digest_of(ADMIN),), admin=True),
)
Served = tuple[FakeCluster, GatewayServer]


@pytest.fixture(scope="package")
def guarded(tiny_llama: Path) -> Iterator[Served]:
    with serving(tiny_llama, tenants=TENANTS) as pair:
        yield pair


@pytest.fixture
def cluster(guarded: Served) -> FakeCluster:
    guarded[0].reset()
    return guarded[0]


@pytest.fixture
def server(guarded: Served, cluster: FakeCluster) -> GatewayServer:
    return guarded[1]


@pytest.fixture(scope="package")
def connections(guarded: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded[1].url, timeout=10, verify=False) as client:
        yield client


@pytest.fixture
def http(connections: httpx.Client, cluster: FakeCluster) -> httpx.Client:
    return connections


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}

"""Promise: the OpenAPI document says what the gateway does. `schemathesis` makes requests from it, right ones and wrong
ones, and finds no answer that is not in it."""

from pathlib import Path

import pytest

from gateway.auth import Tenant, digest_of
from tests.gateway.conftest import serving
from tests.gateway.fake_cluster import counting
from tests.peers.conftest import program, run

CONFIG = Path(__file__).with_name("schemathesis.toml")


@pytest.mark.parametrize("keyed", [False, True])
def test_schemathesis_finds_nothing(keyed: bool, tiny_llama: Path, tmp_path: Path) -> None:
    """With a key it also sees whether any route lets it in without one."""
    tool = program("schemathesis", "st")
    tenant = Tenant(name="somebody", digests=(digest_of("secret"),), admin=True)
    with serving(tiny_llama, **({"tenants": (tenant,)} if keyed else {})) as (cluster, server):
        cluster.script = lambda prompt, most: counting(prompt, min(most, 2))
        document = f"{server.url}/openapi.json"
        key = ("--header", "Authorization: Bearer secret") if keyed else ()
        run(tool, "--config-file", CONFIG, "run", document, "--seed", "1", "--no-color", *key, cwd=tmp_path)

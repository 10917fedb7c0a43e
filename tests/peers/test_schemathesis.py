"""Promise: the OpenAPI document says what the gateway does. `schemathesis` makes requests from it, right ones and wrong
ones, and finds no answer that is not in it."""

from pathlib import Path

from tests.gateway.conftest import serving
from tests.gateway.fake_cluster import counting
from tests.peers.conftest import program, run

CONFIG = Path(__file__).with_name("schemathesis.toml")


def test_schemathesis_finds_nothing(tiny_llama: Path) -> None:
    tool = program("schemathesis", "st")
    with serving(tiny_llama) as (cluster, server):
        cluster.script = lambda prompt, most: counting(prompt, min(most, 2))
        run(tool, "--config-file", CONFIG, "run", f"{server.url}/openapi.json", "--seed", "1", "--no-color")

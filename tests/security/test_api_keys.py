"""Promise: API keys are shown once and kept as digests; without them a gateway is on loopback; with TLS nobody reads
them on their way."""

import gc
import json
import re
import socket
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import trustme

from cluster import cli
from cluster.api_keys import add_key, read_api_keys
from cluster.client import get, stream, text_of
from cluster.errors import ClusterError, TopologyError
from cluster.keys import KeyFileError
from cluster.plan import make_plan
from cluster.topology import Topology
from cluster.validate import check
from gateway import connections
from gateway.auth import Keyring
from gateway.config import GatewayConfig, Tls
from gateway.core.quotas import Allowance
from gateway.server import GatewayServer
from kv_transfer.curve import Exposed, is_loopback
from messages.ids import Address
from tests.gateway.conftest import MODEL, serving
from tests.gateway.raw import until
from tests.security.conftest import ALICE, TENANTS
from tests.security.test_curve import Wire

POOLS: dict[str, Any] = {"pools": [{"name": "a", "role": "colocated"}]}


def baton(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["baton", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_a_key_is_shown_once_and_kept_as_a_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = []
    for arguments in (["alice", "--requests-per-minute", 60], ["bob", "--admin"], ["alice", "--tokens-per-minute", 9]):
        assert baton(monkeypatch, "keys", "api", *arguments) == 0
        keys.append(capsys.readouterr().out.strip())
    file = tmp_path / "api-keys.json"
    content = file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and not [key for key in keys if key in content]
    assert [path.name for path in tmp_path.iterdir()] == ["api-keys.json"]
    alice, bob = read_api_keys(file)
    assert alice.allowance == Allowance(requests_per_minute=60, tokens_per_minute=9)
    assert bob.admin and not alice.admin
    assert [Keyring((alice, bob)).identify(f"Bearer {key}") for key in keys] == [alice, bob, alice]
    assert not [key for key in keys if key in repr((alice, bob))] and "digests" not in repr(alice)


def test_keys_that_are_made_at_once_are_all_there(tmp_path: Path) -> None:
    file = tmp_path / "api-keys.json"
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda number: add_key(file, f"t{number % 3}"), range(8)))
    known = Keyring(read_api_keys(file))
    assert all(known.identify(f"Bearer {key}") is not None for key in keys)


@pytest.mark.parametrize("tenant", ["", "-x", "a b", "a\nb", "../a", "x" * 101, "\N{GREEK SMALL LETTER ALPHA}"])
def test_a_tenants_name_is_plain(tmp_path: Path, tenant: str) -> None:
    with pytest.raises(KeyFileError, match="cannot be a tenant"):
        add_key(tmp_path / "keys.json", tenant)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "no file of API keys"),
        ("[]", "no file of API keys"),
        ('{"tenants": {}}', "holds no key"),
        ('{"tenants": {"a": {"keys": []}}}', "holds no key"),
        ('{"tenants": {"a": {"keys": ["plain"]}}}', "no file of API keys"),
        ('{"tenants": {"a b": {"keys": []}}}', "no file of API keys"),
        ('{"tenants": {"a": {"keys": [], "root": true}}}', "no file of API keys"),
        ('{"tenants": {"a": {"keys": [], "requests_per_minute": 0}}}', "no file of API keys"),
        (json.dumps({"tenants": {"a": {"keys": ["0" * 64]}, "b": {"keys": ["0" * 64]}}}), "one key twice"),
    ],
)
def test_what_is_no_file_of_keys_lets_nobody_in(tmp_path: Path, tiny_llama: Path, content: str, complaint: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(KeyFileError, match=complaint):
        read_api_keys(file)
    topology = Topology.parse({**POOLS, "model": str(tiny_llama), "security": {"api_keys": "keys.json"}}, tmp_path)
    with pytest.raises(TopologyError, match=rf"security\.api_keys: .*{complaint}"):
        make_plan(topology)


@pytest.mark.parametrize("host", ["203.0.113.7", "2001:db8::7", "0.0.0.0", "::", "no-such-host.invalid"])
def test_without_keys_no_gateway_serves_others(tiny_llama: Path, host: str) -> None:
    router = Address("tcp://127.0.0.1:1")
    config = GatewayConfig(model=str(tiny_llama), served_model_name=MODEL, router=router, host=host)
    with pytest.raises(Exposed, match="without API keys; run `baton keys api TENANT`"):
        GatewayServer(config).start()


def test_that_is_said_before_anything_starts(tmp_path: Path, tiny_llama: Path) -> None:
    addresses = [address.address for each in psutil.net_if_addrs().values() for address in each]
    others = [host for host in addresses if _is_ip(host) and not is_loopback(host)]
    if not others:
        pytest.skip("this machine has no address but loopback's")
    data = {**POOLS, "model": str(tiny_llama), "gateway": {"host": others[0], "port": 0}}
    with pytest.raises(TopologyError, match=r"gateway\.host: others can connect .* no API keys; run `baton keys api"):
        check(Topology.parse(data))
    add_key(tmp_path / "keys.json", "alice")
    plan = check(Topology.parse({**data, "security": {"api_keys": "keys.json"}}, tmp_path))
    assert plan.gateway_config("").tenants == read_api_keys(tmp_path / "keys.json")


def _is_ip(host: str) -> bool:
    return re.fullmatch(r"\d+\.\d+\.\d+\.\d+", host) is not None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*", ""])
def test_no_key_makes_up_for_a_wildcard(tmp_path: Path, tiny_llama: Path, host: str) -> None:
    add_key(tmp_path / "keys.json", "alice")
    data = {**POOLS, "model": str(tiny_llama), "gateway": {"host": host}, "security": {"api_keys": "keys.json"}}
    with pytest.raises(TopologyError, match="would listen on every network"):
        Topology.parse(data, tmp_path)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tls, Path]:
    """For 127.0.0.1, and whom to trust for that."""
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    return Tls(str(folder / "cert.pem"), str(folder / "key.pem")), folder / "ca.pem"


def test_with_tls_nobody_on_the_way_reads_a_key_or_a_prompt(
    tiny_llama: Path, tls: tuple[Tls, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, trusted = tls
    with serving(tiny_llama, tenants=TENANTS, tls=files) as (_, server):
        assert server.url.startswith("https://")
        with Wire(f"tcp://127.0.0.1:{server.port}") as wire:
            url = f"https://127.0.0.1:{wire.address.rpartition(':')[2]}"
            monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
            monkeypatch.setenv("BATON_API_KEY", ALICE)
            body = {"model": MODEL, "prompt": "a canary that nobody shall read", "max_tokens": 3}
            assert [text_of(chunk) for chunk in stream(url, "/v1/completions", body)]
            assert wire.passed and b"canary" not in wire.passed and ALICE.encode() not in wire.passed
        with pytest.raises(ClusterError, match="no such API key"):
            monkeypatch.setenv("BATON_API_KEY", "wrong")
            get(server.url, "/v1/models")
        monkeypatch.delenv("SSL_CERT_FILE")
        with pytest.raises(ClusterError, match="certificate"):
            get(server.url, "/v1/models")
        with pytest.raises(ClusterError, match="does not answer"):
            get(server.url.replace("https", "http"), "/v1/models")


def test_who_does_not_end_the_tls_handshake_loses_the_connection(tiny_llama: Path, tls: tuple[Tls, Path]) -> None:
    with (
        serving(tiny_llama, tenants=TENANTS, tls=tls[0], headers_timeout=0.3) as (_, server),
        socket.create_connection(("127.0.0.1", server.port), 10) as silent,
    ):
        assert silent.recv(1) == b""


def collected() -> bool:
    """What `heap.trim` does in a gateway's process every 30 s."""
    gc.collect()
    return True


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # asyncio leaves it to the garbage collector
def test_handshakes_that_do_not_end_take_no_more_than_their_share(
    tiny_llama: Path, tls: tuple[Tls, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "REFUSALS", 2)
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[1]))
    monkeypatch.setenv("BATON_API_KEY", ALICE)
    with ExitStack() as stack:
        _, server = stack.enter_context(serving(tiny_llama, tenants=TENANTS, tls=tls[0], max_connections=3))
        address = ("127.0.0.1", server.port)
        silent = [stack.enter_context(socket.create_connection(address, 10)) for _ in range(5)]
        for _ in range(20):  # one after the other: what was accepted before them waits for its handshake
            with socket.create_connection(address, 10) as refused:
                assert refused.recv(1) == b""
        for connection in silent:
            connection.close()
        until(lambda: collected() and answers(server), "others are served again")


def answers(server: GatewayServer) -> bool:
    try:
        return bool(get(server.url, "/v1/models"))
    except ClusterError:
        return False


def test_tls_files_that_cannot_be_used_are_named(tmp_path: Path, tiny_llama: Path, tls: tuple[Tls, Path]) -> None:
    data = {**POOLS, "model": str(tiny_llama)}
    for cert, key in ((tls[0].cert, "none.pem"), (tls[0].cert, str(tls[1])), (str(tls[1]), tls[0].key)):
        topology = Topology.parse({**data, "security": {"tls": {"cert": cert, "key": key}}}, tmp_path)
        with pytest.raises(TopologyError, match=r"security\.tls: .* cannot be used"):
            make_plan(topology)
    files = {"cert": tls[0].cert, "key": tls[0].key}
    plan = make_plan(Topology.parse({**data, "security": {"tls": files}}, tmp_path))
    assert plan.gateway_config("").tls == tls[0]

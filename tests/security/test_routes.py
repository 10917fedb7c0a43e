"""Promise (rows 11, 12 and 22): without a key there is nothing to be had but health and readiness, whatever the method
and however the path is written; and there are no doors beside those that are listed here."""

import ast
import inspect
import textwrap
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from gateway.auth import Keyring
from gateway.guard import OPEN
from gateway.server import GatewayServer
from messages.gateway_to_router import PlacementWanted
from tests.gateway.conftest import MODEL
from tests.gateway.fake_cluster import FakeCluster
from tests.gateway.raw import Reply, connected, read_reply
from tests.security.conftest import ADMIN, ALICE, BOB, TENANTS, bearer

ROUTES = {
    "/openapi.json": {"GET"},
    "/v1/completions": {"POST"},
    "/v1/chat/completions": {"POST"},
    "/v1/models": {"GET"},
    "/v1/models/{name:path}": {"GET"},
    "/v1/streams/{id}": {"GET"},
    "/health": {"GET"},
    "/ready": {"GET"},
    "/status": {"GET"},
    "/version": {"GET"},
    "/metrics": {"GET"},
    "/traces/{request_id}": {"GET"},
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW")
FOR_ADMINS = ("/status", "/metrics", "/traces/0123", "/no/such/path", "/", "/docs")
BODY = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 3}


def app_of(server: GatewayServer) -> FastAPI:
    http = server._http
    assert http is not None
    app: Any = http.config.app
    while not isinstance(app, FastAPI):
        app = app._app
    return app


def test_the_routes_are_these_and_no_others(server: GatewayServer) -> None:
    assert {route.path: set(route.methods) for route in app_of(server).routes} == ROUTES  # type: ignore[attr-defined]
    assert {("GET", "/health"), ("GET", "/ready")} == OPEN


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", [*ROUTES, *FOR_ADMINS, "/v1/", "/v1", "/v1/engines", "/invocations", "/pause"])
def test_no_route_and_no_method_answers_without_a_key(http: httpx.Client, path: str, method: str) -> None:
    path = path.replace("{name:path}", MODEL).replace("{id}", "0" * 32).replace("{request_id}", "0" * 32)
    if (method, path) in OPEN:
        assert http.request(method, path).status_code == 200
        return
    # httpx has no absolute form but for CONNECT, which is none of an origin server's methods.
    answer = http.request(method, path, json=BODY if method == "POST" else None)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    if method != "HEAD":
        assert answer.json()["error"]["code"] == "invalid_api_key"


def raw(server: GatewayServer, *lines: str) -> Reply:
    with connected(server) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        return read_reply(connection)


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models", "/v1//models", "/./v1/models", "/v1/..;/metrics", "/v1/../metrics", "/health/../metrics",
        "/health/..%2fmetrics", "/%2e/metrics", "/metrics%00/health", "/metrics;/health", "/metrics?/health",
        "/metrics#/health", "/health/", "/HEALTH", "/health%20", "/health.json", "/ready/", "/health\\..\\metrics",
        "http://gateway/metrics", "http://gateway/health", "http://gateway/v1/models", "*", "/v1/models?path=/health",
    ],
)  # fmt: skip
def test_no_way_to_write_a_path_gets_around_it(server: GatewayServer, target: str) -> None:
    assert raw(server, f"GET {target} HTTP/1.1", "Host: gateway").status in (400, 401)


@pytest.mark.parametrize(
    "header",
    [
        "Host: gateway/health?x=", "Host: /health", "X-Original-URL: /health", "X-Rewrite-URL: /health",
        "X-Forwarded-Prefix: /health", "X-Forwarded-For: 127.0.0.1", "X-Forwarded-Host: localhost",
        "Forwarded: for=127.0.0.1", "X-HTTP-Method-Override: GET", "X-Real-IP: 127.0.0.1", "Origin: http://localhost",
        "Connection: authorization", "Upgrade: websocket",
    ],
)  # fmt: skip
def test_no_header_gets_around_it(server: GatewayServer, header: str) -> None:
    host = [] if header.startswith("Host:") else ["Host: gateway"]
    assert raw(server, "GET /metrics HTTP/1.1", *host, header).status in (400, 401)


def test_two_lengths_are_one_too_many(server: GatewayServer) -> None:
    lines = ["POST /health HTTP/1.1", "Host: gateway", "Content-Length: 4", "Transfer-Encoding: chunked"]
    assert raw(server, *lines).status in (400, 401)


def test_what_comes_behind_a_refused_request_is_not_answered(server: GatewayServer) -> None:
    refused = "POST /v1/completions HTTP/1.1\r\nHost: gateway\r\nContent-Length: 49\r\n\r\n"
    smuggled = f"GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN}\r\n\r\n"
    with connected(server) as connection:
        connection.sendall((refused + "x" * 49 + smuggled).encode())
        reply = read_reply(connection)
        assert reply.status == 401 and reply.headers["connection"] == "close"
        rest = b""
        while part := connection.recv(65536):
            rest += part
        assert rest == b""


@pytest.mark.parametrize(
    "authorization",
    [
        "", "Bearer", "Bearer ", f"Basic {ALICE}", ALICE, f"Bearer {ALICE[:-1]}", f"Bearer {ALICE}x",
        f"Bearer x{ALICE}", f"Bearer {ALICE},{BOB}", f"Bearer Bearer {ALICE}", f"Bearer {ALICE.upper()}",
        "Bearer \xff\xfe", "Bearer " + "x" * 20_000, f"Bearer {ALICE}" + "\xa0",
    ],
)  # fmt: skip
def test_what_is_no_key_is_none(server: GatewayServer, authorization: str) -> None:
    reply = raw(server, "GET /v1/models HTTP/1.1", "Host: gateway", f"Authorization: {authorization}")
    assert reply.status == 401 and ALICE not in reply.body.decode()


def test_nor_are_two(server: GatewayServer) -> None:
    both = [f"Authorization: Bearer {ALICE}", "Authorization: Bearer wrong"]
    for lines in (both, both[::-1]):
        assert raw(server, "GET /v1/models HTTP/1.1", "Host: gateway", *lines).status == 401
    assert raw(server, "GET /v1/models HTTP/1.1", "Host: gateway", both[0].replace("Bearer", "bEARER")).status == 200


def test_a_key_opens_what_is_its_tenants(http: httpx.Client) -> None:
    for key in (ALICE, "an older key", BOB, ADMIN):
        assert http.get("/v1/models", headers=bearer(key)).status_code == 200
        assert http.post("/v1/completions", json=BODY, headers=bearer(key)).status_code == 200
        assert http.get("/v1/no/such/path", headers=bearer(key)).status_code == 404
        assert http.delete("/v1/models", headers=bearer(key)).status_code == 405


@pytest.mark.parametrize("path", FOR_ADMINS)
def test_what_is_everybodys_is_for_admins(http: httpx.Client, path: str) -> None:
    for key in (ALICE, BOB):
        answer = http.get(path, headers=bearer(key))
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "permission_denied"
    assert http.get(path, headers=bearer(ADMIN)).status_code in (200, 404)


def test_a_refused_request_costs_the_cluster_nothing(http: httpx.Client, cluster: FakeCluster) -> None:
    for _ in range(20):
        http.post("/v1/completions", json=BODY)
    http.post("/v1/completions", json=BODY, headers=bearer(ALICE))
    assert len(cluster.wait_for(PlacementWanted)) == 1


def test_keys_are_compared_in_a_time_that_does_not_tell_which() -> None:
    """Row 12, by the source: every key is compared, each in constant time, and none ends the loop. Digests are what is
    compared, so how much of a key is right is not to be seen in the first place."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(Keyring.identify)))
    (loop,) = [node for node in ast.walk(tree) if isinstance(node, ast.For)]
    assert not [
        node for node in ast.walk(loop) if isinstance(node, ast.Break | ast.Return | ast.Continue | ast.Compare)
    ]
    calls = [ast.unparse(node.func) for node in ast.walk(loop) if isinstance(node, ast.Call)]
    assert calls == ["hmac.compare_digest"]
    assert all(len(digest) == 32 for tenant in TENANTS for digest in tenant.digests)

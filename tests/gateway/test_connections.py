"""Promise: a connection that asks for nothing does not stay, and no number of connections keeps the gateway from
answering those that it has."""

import contextlib
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.config import GatewayConfig
from gateway.connections import REFUSALS, affordable
from gateway.server import GatewayServer
from messages.gateway_to_router import Prefilled
from tests.gateway.conftest import MODEL, serving
from tests.gateway.fake_cluster import FakeCluster
from tests.gateway.raw import connected, head, post, read_reply, until

SOON = 0.2
"""Seconds; what is due then must come before sockets in these tests time out."""
HEALTH = head("/health", method="GET")
COMPLETION = {"model": MODEL, "prompt": [5], "max_tokens": 8}


@pytest.fixture(scope="module")
def hasty(tiny_llama: Path) -> Iterator[tuple[FakeCluster, GatewayServer]]:
    with serving(tiny_llama, headers_timeout=SOON, keep_alive=1) as pair:
        yield pair


def is_closed(connection: socket.socket) -> bool:
    """By the other side, sooner or later."""
    with contextlib.suppress(ConnectionResetError):
        return connection.recv(1) == b""
    return True


def test_a_client_that_says_nothing_is_dropped(hasty: tuple[FakeCluster, GatewayServer]) -> None:
    with connected(hasty[1]) as connection:
        assert is_closed(connection)


@pytest.mark.parametrize("before", [b"", HEALTH], ids=["first request", "second request"])
@pytest.mark.parametrize("part", [b"P", b"POST /v1/completions HTTP/1.1\r\nHos", head("/v1/completions")[:-2]])
def test_half_a_head_is_not_waited_for(before: bytes, part: bytes, hasty: tuple[FakeCluster, GatewayServer]) -> None:
    with connected(hasty[1]) as connection:
        if before:
            connection.sendall(before)
            assert read_reply(connection).status == 200
        connection.sendall(part)
        reply = read_reply(connection)
        assert (reply.status, reply.error["code"], reply.error["type"]) == (
            408, "headers_timeout", "invalid_request_error",
        )  # fmt: skip
        assert reply.headers["connection"] == "close"
        assert is_closed(connection)


@pytest.mark.parametrize("start", [b"", HEALTH], ids=["first request", "second request"])
def test_a_head_that_comes_byte_by_byte_does_not_move_the_deadline(
    start: bytes, hasty: tuple[FakeCluster, GatewayServer]
) -> None:
    with connected(hasty[1]) as connection:
        connection.sendall(start)
        if start:
            read_reply(connection)
        began, dripped = time.monotonic(), 0
        connection.settimeout(SOON / 10)
        answer = b""
        while not answer:
            assert time.monotonic() < began + 5, "a byte now and then keeps it open"
            connection.sendall(b"GET /health HTTP/1.1\r\nX: " if not dripped else b"x")
            dripped += 1
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408") and dripped > 3


def test_a_body_that_nobody_reads_does_not_keep_its_connection(hasty: tuple[FakeCluster, GatewayServer]) -> None:
    """The answer is there; what still drips in of the request is no sign of the next one."""
    with connected(hasty[1]) as connection:
        connection.sendall(head("/nowhere", "Content-Length: 100000"))
        assert read_reply(connection).status == 404
        began = time.monotonic()
        connection.settimeout(SOON / 10)
        with contextlib.suppress(ConnectionError):
            while True:
                assert time.monotonic() < began + 5, "a byte now and then keeps it open"
                connection.sendall(b"x")
                with contextlib.suppress(TimeoutError):
                    if connection.recv(1) == b"":
                        break


def test_an_idle_connection_is_kept_between_requests_but_not_for_ever(
    hasty: tuple[FakeCluster, GatewayServer],
) -> None:
    with connected(hasty[1]) as connection:
        for _ in range(2):
            connection.sendall(HEALTH)
            assert read_reply(connection).status == 200
        answered = time.monotonic()
        assert is_closed(connection), "silently: there is nothing to answer"
        assert time.monotonic() - answered > 2 * SOON, "the deadline of headers is not the one of idleness"


def test_a_request_under_way_is_not_idle(hasty: tuple[FakeCluster, GatewayServer]) -> None:
    cluster, server = hasty
    cluster.reset()
    cluster.hold_after = 4
    with connected(server) as waiting, connected(server) as idle:
        waiting.sendall(post("/v1/completions", COMPLETION))
        cluster.wait_for(Prefilled)
        assert is_closed(idle), "its time is up, and that of the other connection would be"
        with connected(server) as idle:
            assert is_closed(idle)
        cluster.release()
        assert read_reply(waiting).status == 200


def test_more_connections_than_are_allowed_are_refused_in_the_apis_shape(tiny_llama: Path) -> None:
    with serving(tiny_llama, max_connections=2) as (cluster, server), connected(server) as first:
        cluster.hold_after = 4
        first.sendall(post("/v1/completions", COMPLETION))
        cluster.wait_for(Prefilled)
        with connected(server) as second:
            second.sendall(HEALTH)
            assert read_reply(second).status == 200
            for request in (b"", HEALTH, post("/v1/completions", COMPLETION)):
                with connected(server) as third:
                    third.sendall(request)
                    reply = read_reply(third)
                    assert (reply.status, reply.error["type"]) == (503, "server_error")
                    assert reply.headers["retry-after"] == "1" and reply.headers["connection"] == "close"
                    assert is_closed(third)
            second.sendall(HEALTH)
            assert read_reply(second).status == 200, "those that are there are served"
        until(lambda: answers(server), "there is room again")
        cluster.release()
        assert read_reply(first).status == 200


def answers(server: GatewayServer) -> bool:
    with connected(server) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(HEALTH)
        return connection.recv(65536).startswith(b"HTTP/1.1 200")
    return False


def test_a_crowd_in_front_of_the_door_does_not_keep_it_shut(tiny_llama: Path) -> None:
    """Refused connections do not count, however long their clients stay."""
    with serving(tiny_llama, max_connections=1) as (_, server), contextlib.ExitStack() as crowd:
        with connected(server) as only:
            only.sendall(HEALTH)
            assert read_reply(only).status == 200
            for _ in range(20):
                refused = crowd.enter_context(connected(server))
                assert read_reply(refused).status == 503
        until(lambda: answers(server), "there is room again")


def test_a_flood_of_connections_costs_little_and_harms_nobody(tiny_llama: Path) -> None:
    with serving(tiny_llama, max_connections=1) as (_, server), contextlib.ExitStack() as flood:
        with connected(server) as only:
            only.sendall(HEALTH)
            assert read_reply(only).status == 200
            refused = [flood.enter_context(connected(server)) for _ in range(4 * REFUSALS)]
            for connection in refused:  # some with an answer, some without
                with contextlib.suppress(ConnectionResetError):
                    received = connection.recv(65536)
                    assert received == b"" or received.startswith(b"HTTP/1.1 503")
            only.sendall(HEALTH)
            assert read_reply(only).status == 200
        until(lambda: answers(server), "there is room again")


@pytest.mark.parametrize(("soft", "most"), [(1024, 512), (65536, 4096), (resource.RLIM_INFINITY, 4096)])
def test_no_more_connections_are_taken_than_files_may_be_open(
    soft: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert affordable(4096) == most


def test_the_bounds_are_generous_where_nothing_is_said() -> None:
    config = GatewayConfig(model="m", served_model_name="m", router="r")
    assert (config.headers_timeout, config.keep_alive, config.max_connections) == (30.0, 75, 4096)

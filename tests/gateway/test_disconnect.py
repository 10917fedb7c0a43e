"""Promise: a client that goes away frees everything that was held for it, at once and everywhere."""

import gc
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from gateway.core.session import Session
from gateway.server import GatewayServer
from gateway.tokenization import Tokenizer
from messages.gateway_to_router import Finished, PlacementWanted, Prefilled
from messages.gateway_to_worker import Abort, EndAck, Prefill
from messages.ids import RequestId
from tests.gateway.conftest import MODEL, serving
from tests.gateway.fake_cluster import FakeCluster, counting
from tests.gateway.raw import connected, head, post, read_reply, until

COMPLETION = {"model": MODEL, "prompt": [5], "max_tokens": 50}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello"}], "max_tokens": 50}
PATHS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


def nothing_is_held(http: httpx.Client) -> None:
    assert http.get("/status").json()["sequences_in_flight"] == 0
    assert "baton_sequences_in_flight 0.0" in http.get("/metrics").text
    until(lambda: not [thing for thing in gc.get_objects() if type(thing) is Session], "no session is in memory")


def aborted(cluster: FakeCluster, *, sequences: int, workers: int) -> None:
    """Every sequence that was placed has been aborted at its workers, and the router knows that it has ended."""
    finished = cluster.wait_for(Finished, sequences)
    placed = {wanted.request for wanted in cluster.of(PlacementWanted)}
    assert len(placed) == sequences and sorted(end.request for end in finished) == sorted(placed)
    aborts = cluster.wait_for(Abort, sequences * workers) if workers else cluster.of(Abort)
    assert sorted(abort.request for abort in aborts) == sorted([*placed] * workers)
    assert {abort.attempt for abort in aborts} <= {1} and not cluster.of(EndAck)


def aborts_of(cluster: FakeCluster, requests: set[RequestId]) -> list[int]:
    aborted = [abort.request for abort in cluster.of(Abort)]
    return [aborted.count(request) for request in requests]


def close(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    """With a TCP reset instead of an end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


def half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


LEAVING = pytest.mark.parametrize("leave", [close, reset, half_close])


@LEAVING
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", PATHS)
def test_in_the_middle_of_a_stream(
    path: str, n: int, leave: Callable[[socket.socket], None], server: GatewayServer, cluster: FakeCluster, http: Any
) -> None:
    cluster.hold_after = 4
    with connected(server) as connection:
        connection.sendall(post(path, PATHS[path] | {"stream": True, "n": n}))
        received = b""
        while received.count(b"data: ") < n:
            received += connection.recv(65536)
        assert b"200 OK" in received
        cluster.wait_for(Prefilled, n)
        leave(connection)
        aborted(cluster, sequences=n, workers=2)
    nothing_is_held(http)


@LEAVING
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_before_the_first_token(
    path: str,
    stream: bool,
    leave: Callable[[socket.socket], None],
    server: GatewayServer,
    cluster: FakeCluster,
    http: Any,
) -> None:
    cluster.hold_after = 0
    with connected(server) as connection:
        connection.sendall(post(path, PATHS[path] | {"stream": stream}))
        cluster.wait_for(Prefill)
        leave(connection)
        aborted(cluster, sequences=1, workers=2)
    nothing_is_held(http)


@LEAVING
@pytest.mark.parametrize("path", PATHS)
def test_in_the_middle_of_an_answer_in_one_piece(
    path: str, leave: Callable[[socket.socket], None], server: GatewayServer, cluster: FakeCluster, http: Any
) -> None:
    cluster.hold_after = 4
    with connected(server) as connection:
        connection.sendall(post(path, PATHS[path] | {"n": 2}))
        cluster.wait_for(Prefilled, 2)
        leave(connection)
        aborted(cluster, sequences=2, workers=2)
    nothing_is_held(http)


@pytest.mark.parametrize("stream", [False, True])
def test_before_it_has_a_place(stream: bool, server: GatewayServer, cluster: FakeCluster, http: httpx.Client) -> None:
    """No worker knows it yet; the router does."""
    cluster.on_placement = lambda _: None
    with connected(server) as connection:
        connection.sendall(post("/v1/completions", COMPLETION | {"stream": stream}))
        (wanted,) = cluster.wait_for(PlacementWanted)
        close(connection)
        aborted(cluster, sequences=1, workers=0)
    nothing_is_held(http)
    # The router's answer crosses the end on its way: it hears once more that there is nothing to place.
    cluster.send(server.address, cluster.placed(wanted))
    cluster.wait_for(Finished, 2)
    assert not cluster.of(Prefill)


@LEAVING
def test_in_the_middle_of_its_body(
    leave: Callable[[socket.socket], None], server: GatewayServer, cluster: FakeCluster, http: httpx.Client
) -> None:
    with connected(server) as connection:
        connection.sendall(head("/v1/completions", "Content-Length: 1000") + json.dumps(COMPLETION).encode())
        leave(connection)
    nothing_is_held(http)
    assert not cluster.of(PlacementWanted)


def test_a_client_that_stays_has_its_answer_while_others_leave(
    client: openai.OpenAI, server: GatewayServer, cluster: FakeCluster, tokenizer: Tokenizer
) -> None:
    cluster.hold_after = 4
    stays = client.completions.create(**COMPLETION, stream=True)
    text = next(stays).choices[0].text
    for _ in range(5):
        with connected(server) as connection:
            connection.sendall(post("/v1/completions", COMPLETION | {"stream": True}))
            assert connection.recv(1)
    cluster.wait_for(Abort, 10)
    cluster.release()
    text += "".join(chunk.choices[0].text for chunk in stays)
    assert text == tokenizer.decode(counting([5], 50))
    assert len(cluster.of(Abort)) == 10


def test_tokens_for_a_client_that_is_gone_are_answered_with_an_abort(
    server: GatewayServer, cluster: FakeCluster, http: httpx.Client
) -> None:
    """The abort was lost: the worker goes on, and hears it again; its end is acked."""
    cluster.hold_after = 4
    with connected(server) as connection:
        connection.sendall(post("/v1/completions", COMPLETION | {"stream": True}))
        (order,) = cluster.wait_for(Prefill)
        cluster.wait_for(Prefilled)
    cluster.wait_for(Abort, 2)
    cluster.hold_after = None
    cluster.do(lambda: cluster.answer(order))  # all of it once more: 17 chunks, the last with the end
    (ack,) = cluster.wait_for(EndAck)
    assert ack.request == order.request
    assert {abort.request for abort in cluster.wait_for(Abort, 3)} == {order.request}
    nothing_is_held(http)


def test_a_client_that_does_not_read_is_dropped(tiny_llama: Path) -> None:
    with (
        serving(tiny_llama, client_stall=0.2) as (cluster, server),
        httpx.Client(base_url=server.url) as http,
        connected(server, receive_buffer=4096) as connection,
    ):
        cluster.chunk_size, cluster.hold_after = 500, 4000
        body = {"model": MODEL, "prompt": [5], "max_tokens": 4090, "n": 8, "logprobs": 20, "stream": True}
        connection.sendall(post("/v1/completions", body))
        finished = {end.request for end in cluster.wait_for(Finished, 8)}
        # Tokens may cross the aborts; they are answered with one more.
        until(lambda: all(count >= 2 for count in aborts_of(cluster, finished)), "both workers of all of them know it")
        assert finished == {wanted.request for wanted in cluster.of(PlacementWanted)} and not cluster.of(EndAck)
        nothing_is_held(http)
        ours = connection.getsockname()
        until(lambda: ours not in clients_of(server), "the connection is closed, though nobody took what was sent")


def test_a_client_that_does_not_read_its_answer_in_one_piece_is_dropped(tiny_llama: Path) -> None:
    with (
        serving(tiny_llama, client_stall=0.2) as (cluster, server),
        connected(server, receive_buffer=4096) as connection,
    ):
        cluster.chunk_size = 500
        body = {"model": MODEL, "prompt": [5], "max_tokens": 4090, "n": 4, "logprobs": 20}
        connection.sendall(post("/v1/completions", body))
        cluster.wait_for(Finished, 4)
        ours = connection.getsockname()
        until(lambda: ours not in clients_of(server), "the connection is closed, though nobody took what was sent")


def clients_of(server: GatewayServer) -> list[Any]:
    connections = psutil.Process().net_connections("tcp")
    return [connection.raddr for connection in connections if connection.laddr and connection.laddr[1] == server.port]


def test_a_body_that_does_not_come_is_not_waited_for(tiny_llama: Path) -> None:
    with serving(tiny_llama, body_timeout=0.1) as (cluster, server), connected(server) as connection:
        connection.sendall(head("/v1/completions", "Content-Length: 100") + b'{"model"')
        reply = read_reply(connection)
        assert (reply.status, reply.error["code"]) == (408, "body_timeout")
        assert connection.recv(1) == b"", "the connection is closed"
        assert not cluster.of(PlacementWanted)


def test_one_connection_serves_one_request_after_another(server: GatewayServer, cluster: FakeCluster) -> None:
    with connected(server) as connection:
        for path, status in (("/v1/completions", 200), ("/nowhere", 404), ("/v1/chat/completions", 200)):
            connection.sendall(post(path, PATHS.get(path, {})))
            assert read_reply(connection).status == status

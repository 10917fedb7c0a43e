"""Promise: gRPC is as well guarded and bounded as HTTP: keys, sizes, overload, clients that do not read, and an end."""

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gateway.auth import Tenant, digest_of
from gateway.config import Tls
from gateway.core.quotas import Allowance
from gateway.protos import open_inference_pb2
from gateway.protos import vllm_engine_pb2 as pb
from gateway.protos.vllm_engine_pb2_grpc import VllmEngineStub
from gateway.server import GatewayServer
from messages.gateway_to_router import Finished, PlacementWanted
from messages.gateway_to_worker import Prefill
from messages.router_to_gateway import Rejected
from tests.gateway.conftest import serving
from tests.gateway.fake_cluster import FakeCluster, counting
from tests.gateway.grpc.test_engine import PROMPT, generate, idle
from tests.gateway.raw import until

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
ALICE, BOB, ADMIN = "alice's key", "bob's key", "admin's key"
TENANTS = (
    Tenant(name="alice", digests=(digest_of(ALICE),)),
    Tenant(name="bob", digests=(digest_of(BOB),), allowance=Allowance(max_concurrent_requests=1)),
    Tenant(name="ops", digests=(digest_of(ADMIN),), admin=True),
)


def failed(call: Any) -> Any:
    """The error that ends ``call()``."""
    with pytest.raises(grpc.RpcError) as caught:
        list(call())
    return caught.value


def with_key(*keys: str) -> Any:
    return [("authorization", f"Bearer {key}") for key in keys]


def list_services(channel: grpc.Channel, **options: Any) -> set[str]:
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
        iter([asked]), timeout=10, **options
    )
    return {service.name for service in answer.list_services_response.service}


def test_health_is_told_of_each_service(channel: grpc.Channel, cluster: FakeCluster) -> None:
    health = health_pb2_grpc.HealthStub(channel)

    def status(service: str) -> Any:
        return health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status

    services = ("", "vllm.grpc.engine.VllmEngine", "inference.GRPCInferenceService")
    until(lambda: {status(service) for service in services} == {SERVING}, "all serve")
    cluster.ready = False
    until(lambda: {status(service) for service in services} == {NOT_SERVING}, "none serves")
    error = failed(lambda: [status("another")])
    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_health_can_be_watched(channel: grpc.Channel, cluster: FakeCluster) -> None:
    watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""), timeout=10)
    told = (answer.status for answer in watching)
    while next(told) != SERVING:
        pass
    cluster.ready = False
    assert next(told) == NOT_SERVING
    watching.cancel()


def test_its_services_can_be_found_by_reflection(channel: grpc.Channel) -> None:
    found = list_services(channel)
    assert found >= {"vllm.grpc.engine.VllmEngine", "inference.GRPCInferenceService", "grpc.health.v1.Health"}


def test_a_request_that_is_too_large_is_refused_before_it_is_read(engine: VllmEngineStub, cluster: FakeCluster) -> None:
    error = failed(lambda: engine.Generate(pb.GenerateRequest(text="x" * (9 << 20)), timeout=10))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = failed(lambda: engine.Generate(generate(), timeout=10, metadata=[("long", "x" * 100_000)]))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not cluster.of(PlacementWanted)


METHODS = {
    f"/{service.full_name}/{method.name}": method
    for file in (pb, open_inference_pb2, health_pb2, reflection_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
UNARY = [path for path, method in METHODS.items() if not method.client_streaming]
"""Those that take one message."""


@pytest.mark.parametrize("garbage", [b"\xff" * 64, b"\x0a\xff\xff\xff\xff\x0f", bytes(range(256)) * 40])
def test_bytes_that_are_no_message_harm_nobody(garbage: bytes, channel: grpc.Channel, cluster: FakeCluster) -> None:
    for path in METHODS:
        error = failed(lambda path=path: channel.stream_stream(path)(iter([garbage]), timeout=10))
        assert error.code() not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE), path
        assert path not in UNARY or error.code() is grpc.StatusCode.INVALID_ARGUMENT, path
        assert "0x" not in error.details() and ".py" not in error.details()
    assert not cluster.of(PlacementWanted)
    assert list(VllmEngineStub(channel).Generate(generate(), timeout=10))


def test_a_call_without_a_message_is_told_so(channel: grpc.Channel) -> None:
    assert len(UNARY) > 20
    for path in UNARY:
        error = failed(lambda path=path: channel.stream_stream(path)(iter([]), timeout=10))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "no message" in error.details(), path


@pytest.mark.parametrize(("timeout", "within"), [(0.3, "0.3 s"), (30.0, "1 s")])
def test_who_never_sends_a_message_holds_a_call_for_a_while_only(timeout: float, within: str, tiny_llama: Path) -> None:
    """Without a key not for longer than a second."""
    with (
        serving(tiny_llama, grpc_port=0, tenants=TENANTS, max_connections=2, body_timeout=timeout) as (_, server),
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
        silence() as requests,
    ):
        path = "/grpc.health.v1.Health/Check"
        for call in [channel.stream_stream(path)(requests(), timeout=20) for _ in range(2)]:
            error = failed(lambda call=call: call)
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and f"within {within}" in error.details()

        def served() -> bool:
            try:
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            except grpc.RpcError as error:  # the last call is over for its client a moment before it is for the server
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
                return False
            return True

        until(served, "others are served")
        assert list(VllmEngineStub(channel).Generate(generate(), timeout=10, metadata=with_key(ALICE)))


@contextlib.contextmanager
def silence() -> Iterator[Callable[[], Iterator[bytes]]]:
    """Of clients: requests that do not come."""
    over = threading.Event()

    def requests() -> Iterator[bytes]:
        over.wait()
        yield from ()

    try:
        yield requests
    finally:
        over.set()


@pytest.mark.parametrize(
    ("unavailable", "code"), [(False, grpc.StatusCode.RESOURCE_EXHAUSTED), (True, grpc.StatusCode.UNAVAILABLE)]
)
def test_overload_says_when_to_come_back(
    unavailable: bool, code: grpc.StatusCode, engine: VllmEngineStub, cluster: FakeCluster
) -> None:
    cluster.on_placement = lambda wanted: Rejected(
        request=wanted.request, attempt=wanted.attempt, detail="", retry_after=2.5, unavailable=unavailable
    )
    error = failed(lambda: engine.Generate(generate(stream=True), timeout=10))
    assert error.code() is code
    trailing = dict(error.trailing_metadata())
    assert (trailing["retry-after"], trailing["grpc-retry-pushback-ms"]) == ("3", "3000")


def test_calls_are_counted_by_method_and_status(
    engine: VllmEngineStub, channel: grpc.Channel, http: httpx.Client
) -> None:
    list(engine.Generate(generate(), timeout=10))
    failed(lambda: engine.Generate(generate(min_tokens=1), timeout=10))
    failed(lambda: [channel.unary_unary("/nobody/knows")(b"", timeout=10)])
    page = http.get("/metrics").text
    for labels in (
        'code="OK",method="/vllm.grpc.engine.VllmEngine/Generate"',
        'code="INVALID_ARGUMENT",method="/vllm.grpc.engine.VllmEngine/Generate"',
        'code="UNIMPLEMENTED",method="other"',
    ):
        assert f"baton_grpc_responses_total{{{labels}}}" in page


def test_who_leaves_or_sends_too_much_is_not_counted_as_who_sends_nothing(
    engine: VllmEngineStub, channel: grpc.Channel, http: httpx.Client
) -> None:
    method = "/vllm.grpc.engine.VllmEngine/Generate"

    def counted(code: str) -> float:
        found = re.search(
            rf'baton_grpc_responses_total{{code="{code}",method="{method}"}} (\S+)', http.get("/metrics").text
        )
        return float(found[1]) if found else 0

    wrong, left = counted("INVALID_ARGUMENT"), counted("CANCELLED")
    with silence() as requests:
        assert failed(lambda: channel.stream_stream(method)(requests(), timeout=0.3)).code() is (
            grpc.StatusCode.DEADLINE_EXCEEDED
        )
    failed(lambda: engine.Generate(pb.GenerateRequest(text="x" * (9 << 20)), timeout=10))
    until(lambda: counted("CANCELLED") == left + 2, "both have left")
    assert counted("INVALID_ARGUMENT") == wrong


@pytest.fixture(scope="module")
def keyed(tiny_llama: Path) -> Iterator[tuple[FakeCluster, GatewayServer, grpc.Channel]]:
    with (
        serving(tiny_llama, grpc_port=0, tenants=TENANTS) as (cluster, server),
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        yield cluster, server, channel


@pytest.mark.parametrize(
    "metadata",
    [None, with_key("nobody's key"), [("authorization", ALICE)], with_key(ALICE, ALICE), [("x-api-key", ALICE)]],
)
def test_without_a_key_nothing_but_health_is_answered(keyed: Any, metadata: Any) -> None:
    cluster, _, channel = keyed
    cluster.reset()
    assert len(METHODS) > 20
    for path in [*METHODS, "/no/such"]:
        call = channel.stream_stream(path)
        if path == "/grpc.health.v1.Health/Check":
            assert list(call(iter([b""]), timeout=10, metadata=metadata))
            continue
        error = failed(lambda call=call: call(iter([b""]), timeout=10, metadata=metadata))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED, path
    assert not cluster.of(PlacementWanted)


def test_tenants_are_kept_apart(keyed: Any) -> None:
    cluster, _, channel = keyed
    cluster.reset()
    engine = VllmEngineStub(channel)
    cluster.hold_after = 2
    theirs = engine.Generate(generate(stream=True, request_id="same"), timeout=10, metadata=with_key(BOB))
    next(theirs)
    engine.Abort(pb.AbortRequest(request_ids=["same"]), timeout=10, metadata=with_key(ALICE))
    of_alice = engine.GetServerInfo(pb.GetServerInfoRequest(), timeout=10, metadata=with_key(ALICE))
    of_bob = engine.GetServerInfo(pb.GetServerInfoRequest(), timeout=10, metadata=with_key(BOB))
    assert (of_alice.active_requests, of_bob.active_requests) == (0, 1)
    error = failed(lambda: engine.Generate(generate(), timeout=10, metadata=with_key(BOB)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(error.trailing_metadata())["retry-after"] == "1"
    cluster.release()
    *_, end = theirs
    assert end.complete.finish_reason == "length"
    list(engine.Generate(generate(), timeout=10, metadata=with_key(ALICE)))
    bobs, alices = (order.generation.cache_salt for order in cluster.of(Prefill))
    assert bobs and alices and bobs != alices


def test_the_clusters_load_is_for_admins(keyed: Any) -> None:
    engine = VllmEngineStub(keyed[2])
    error = failed(lambda: [engine.GetLoads(pb.GetLoadsRequest(), timeout=10, metadata=with_key(ALICE))])
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert engine.GetLoads(pb.GetLoadsRequest(), timeout=10, metadata=with_key(ADMIN)).loads
    assert "inference.GRPCInferenceService" in list_services(keyed[2], metadata=with_key(ALICE))


def test_with_tls_nobody_speaks_in_the_clear(tiny_llama: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    own = authority.issue_cert("127.0.0.1")
    own.private_key_pem.write_to_path(tmp_path / "key.pem")
    for part in own.cert_chain_pems:
        part.write_to_path(tmp_path / "cert.pem", append=True)
    tls = Tls(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    with serving(tiny_llama, grpc_port=0, tenants=TENANTS, tls=tls) as (_, server):
        address = f"127.0.0.1:{server.grpc_port}"
        trusted = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        with grpc.secure_channel(address, trusted) as channel:
            (answer,) = VllmEngineStub(channel).Generate(generate(), timeout=10, metadata=with_key(ALICE))
            assert list(answer.complete.output_ids) == counting(PROMPT, 6)
        with grpc.insecure_channel(address) as channel:
            error = failed(lambda: VllmEngineStub(channel).Generate(generate(), timeout=10, metadata=with_key(ALICE)))
            assert error.code() is grpc.StatusCode.UNAVAILABLE


def test_who_does_not_read_loses_the_request_and_hears_so(tiny_llama: Path) -> None:
    window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    with (
        serving(tiny_llama, grpc_port=0, client_stall=0.3) as (cluster, server),
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}", window) as channel,
        httpx.Client(base_url=server.url) as http,
    ):
        cluster.hold_after = 3000
        stream = VllmEngineStub(channel).Generate(generate(stream=True, n=4, max_tokens=4000, logprobs=20), timeout=20)
        assert len(cluster.wait_for(Finished, 4)) == 4
        idle(http)
        error = failed(lambda: stream)
        assert error.code() is grpc.StatusCode.ABORTED and "nothing was read" in error.details()


def test_connections_are_bounded_and_must_speak_http2(tiny_llama: Path) -> None:
    with serving(tiny_llama, grpc_port=0, max_connections=3, headers_timeout=0.5) as (_, server):
        assert server.grpc_port is not None
        address = ("127.0.0.1", server.grpc_port)
        with contextlib.ExitStack() as open_sockets:
            first = [open_sockets.enter_context(socket.create_connection(address, 10)) for _ in range(3)]
            assert all(connection.recv(9) for connection in first)  # the server's settings: it has accepted
            one_more = open_sockets.enter_context(socket.create_connection(address, 10))
            assert closed(one_more)
            assert all(closed(connection) for connection in first)
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            assert list(VllmEngineStub(channel).Generate(generate(), timeout=10, wait_for_ready=True))


def closed(connection: socket.socket) -> bool:
    """Whether the server closes it, sooner or later; raises ``TimeoutError`` where it does not."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


def test_at_its_end_it_answers_what_it_has(tiny_llama: Path) -> None:
    with (
        serving(tiny_llama, grpc_port=0) as (cluster, server),
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        cluster.hold_after = 2
        stream = VllmEngineStub(channel).Generate(generate(stream=True), timeout=10)
        next(stream)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        error = failed(lambda: stream)
        stopping.join()
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in error.details()


def test_a_replacement_listens_on_the_same_port_while_streams_end(tiny_llama: Path) -> None:
    with serving(tiny_llama, grpc_port=0) as (cluster, server):
        cluster.hold_after = 2
        ports = {"grpc_port": server.grpc_port, "port": server.port}
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            stream = VllmEngineStub(channel).Generate(generate(stream=True), timeout=10)
            next(stream)
            with serving(tiny_llama, **ports, reuse_port=True) as (second, replacement):
                drained: list[bool] = []
                draining = threading.Thread(target=lambda: drained.append(server.drain(10)))
                draining.start()
                fresh = [("grpc.use_local_subchannel_pool", 1)]
                with grpc.insecure_channel(f"127.0.0.1:{replacement.grpc_port}", fresh) as other:

                    def answers() -> bool:
                        try:
                            return bool(
                                list(VllmEngineStub(other).Generate(generate(), timeout=10, wait_for_ready=True))
                            )
                        except grpc.RpcError as error:  # it had reached the former one, which closed at that moment
                            assert error.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)  # type: ignore[attr-defined]
                            return False

                    until(answers, "it answers")
                assert draining.is_alive()
                cluster.release()
                *_, end = stream
                assert end.complete.finish_reason == "length"
                draining.join()
                assert drained == [True] and second.of(PlacementWanted)


def test_a_port_that_is_taken_is_told(tiny_llama: Path, served: tuple[FakeCluster, GatewayServer]) -> None:
    began = time.monotonic()
    with (
        pytest.raises(OSError, match="in use"),
        serving(tiny_llama, grpc_port=served[1].grpc_port),
    ):
        pass
    assert time.monotonic() - began < 5

"""Promise: who runs the gateway sees what it does: health, readiness, state and figures, each in its standard form."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from gateway import hub
from gateway.actor import GatewayActor
from gateway.config import GatewayConfig
from gateway.metrics import Metrics
from gateway.server import GatewayServer
from messages.common import AbortCounts, AbortReason, BlockCounts, DecisionCounts, Role, TransferCounts, WorkerAddress
from messages.gateway_to_router import Finished, PlacementWanted
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.router_to_gateway import ClusterState, Placed, WorkerLost, WorkerState
from messages.worker_to_gateway import TokenBatch
from tests.gateway.conftest import MODEL, serving
from tests.gateway.fake_cluster import DECODE, EPOCH, PREFILL, FakeCluster
from tests.gateway.raw import connected, until

BODY = {"model": MODEL, "prompt": [1, 2], "max_tokens": 5}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_of(text: str) -> Samples:
    """The metrics page, by name and labels; it must be well-formed."""
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type != "unknown", family.name
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples, f"{key} stands there twice"
            samples[key] = sample.value
    return samples


def page(http: httpx.Client) -> Samples:
    answer = http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return samples_of(answer.text)


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


def test_the_metrics_page_counts_what_was_served(http: httpx.Client, cluster: FakeCluster) -> None:
    until(lambda: http.get("/ready").status_code == 200, "the cluster's state is known")
    before = page(http)
    http.post("/v1/completions", json=BODY | {"n": 2})
    http.post("/v1/completions", json=BODY | {"n": 0})
    http.post("/v1/chat/completions", json={"model": "gpt-5", "messages": []})
    http.get("/no/such/path")
    http.get("/v1/models/" + MODEL)
    after = page(http)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert grown("baton_http_responses_total", route="/v1/completions", code="200") == 1
    assert grown("baton_http_responses_total", route="/v1/completions", code="400") == 1
    assert grown("baton_http_responses_total", route="/v1/chat/completions", code="404") == 1
    assert grown("baton_http_responses_total", route="other", code="404") == 1
    assert grown("baton_sequences_finished_total", reason="length") == 2
    assert grown("baton_prompt_tokens_total") == 4
    assert grown("baton_generation_tokens_total") == 10
    assert grown("baton_attempts_total") == 2 and grown("baton_resumes_total") == 0
    for latency in ("time_to_first_token", "time_per_output_token", "request_latency"):
        assert grown(f"baton_{latency}_seconds_count") == 2, latency
        assert grown(f"baton_{latency}_seconds_bucket", le="+Inf") == 2
    assert value(after, "baton_sequences_in_flight") == 0
    assert value(after, "baton_kv_blocks", worker=DECODE, role="decode", state="free") == 90
    assert value(after, "baton_worker_alive", worker=PREFILL, role="prefill") == 1
    paths = {dict(labels).get("route") for _, labels in after}
    assert not any(path and "such" in path for path in paths), "no label that a client makes up"


def test_the_metrics_page_stays_well_formed_whatever_a_workers_name_is() -> None:
    names = ["plain", 'a "quoted" name', "back\\slash", "two\nlines", "日本"]
    blocks = BlockCounts(free=1, held=2, cached=3, total=6)
    workers = tuple(
        WorkerState(
            worker=WorkerId(name), epoch=Epoch(1), role=Role.DECODE, alive=False, running=0, waiting=0, steps=0,
            blocks=blocks, kv_bytes_sent=0, kv_bytes_received=0, transfers=0, assigned=0,
        )
        for name in names
    )  # fmt: skip
    metrics = Metrics()
    metrics.cluster = ClusterState(workers=workers, queued=3, ready=False)
    samples = samples_of(metrics.text().decode())
    assert value(samples, "baton_router_queued") == 3
    shown = {dict(labels)["worker"] for name, labels in samples if name == "baton_worker_alive"}
    assert shown == set(names)


def test_the_metrics_page_says_who_has_decided_where_prompts_are_computed_and_why() -> None:
    decode = WorkerState(
        worker=DECODE, epoch=Epoch(1), role=Role.DECODE, alive=True, running=0, waiting=0, steps=0,
        blocks=BlockCounts(0, 0, 0, 0), kv_bytes_sent=0, kv_bytes_received=0, transfers=0, assigned=0,
        prefill_rate=1500.5, transfer_rate=2e9, decisions=DecisionCounts(too_late=3, costs_less=4),
    )  # fmt: skip
    metrics = Metrics()
    decisions = DecisionCounts(unmeasured=5)
    metrics.cluster = ClusterState(workers=(decode,), queued=0, ready=True, decisions=decisions)
    samples = samples_of(metrics.text().decode())
    for by, counts in ((DECODE, decode.decisions), ("router", decisions)):
        for reason in counts.__struct_fields__:
            counted = value(samples, "baton_disaggregation_decisions_total", decided_by=by, reason=reason)
            assert counted == getattr(counts, reason)
    labels = {"worker": DECODE, "role": "decode"}
    assert value(samples, "baton_worker_prefill_rate", **labels) == 1500.5
    assert value(samples, "baton_worker_transfer_rate", **labels) == 2e9


def test_the_metrics_page_says_how_kv_moves() -> None:
    counts = TransferCounts(
        in_flight=1, seconds=2.5, hidden_bytes=3, repairs=4, quarantined_blocks=5, quarantine_seconds=6.5,
        aborts=AbortCounts(refused=7, integrity=8),
    )  # fmt: skip
    decode = WorkerState(
        worker=DECODE, epoch=Epoch(1), role=Role.DECODE, alive=True, running=0, waiting=0, steps=0,
        blocks=BlockCounts(0, 0, 0, 0), kv_bytes_sent=9, kv_bytes_received=10, transfers=11, assigned=0,
        handovers=counts,
    )  # fmt: skip
    metrics = Metrics()
    metrics.cluster = ClusterState(workers=(decode,), queued=0, ready=True)
    samples = samples_of(metrics.text().decode())
    shown = {
        "kv_transfers_in_flight": 1, "kv_transfer_seconds_total": 2.5, "kv_transfer_hidden_bytes_total": 3,
        "kv_transfer_repairs_total": 4, "kv_quarantined_blocks": 5, "kv_quarantine_seconds_total": 6.5,
        "kv_transfers_total": 11,
    }  # fmt: skip
    labels = {"worker": DECODE, "role": "decode"}
    assert {name: value(samples, f"baton_{name}", **labels) for name in shown} == shown
    for direction, count in (("sent", 9), ("received", 10)):
        assert value(samples, "baton_kv_transfer_bytes_total", **labels, direction=direction) == count
    for reason in AbortReason:
        expected = getattr(counts.aborts, reason.value)
        assert value(samples, "baton_kv_transfer_aborts_total", **labels, reason=reason.value) == expected


def test_a_gateway_before_a_cluster_that_is_not_ready_is_healthy_all_the_same(tiny_llama: Path) -> None:
    with serving(tiny_llama, state_every=3600.0) as (cluster, server), httpx.Client(base_url=server.url) as http:
        cluster.ready = False
        cluster.send(server.address, cluster.state())
        until(lambda: http.get("/status").json()["cluster"] is not None, "the router has answered")
        until(lambda: http.get("/ready").status_code == 503, "the router has said that it lacks a role")
        assert (http.get("/health").status_code, http.get("/health").json()) == (200, {"status": "ok"})
        answer = http.get("/ready")
        assert (answer.status_code, answer.json()) == (503, {"ready": False})
        assert not server.ready
        cluster.ready = True
        cluster.send(server.address, cluster.state())
        until(lambda: http.get("/ready").status_code == 200, "the gateway is ready")
        assert http.get("/ready").json() == {"ready": True} and server.ready


def test_a_router_that_falls_silent_makes_the_gateway_unready(
    http: httpx.Client, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    until(lambda: http.get("/ready").status_code == 200, "the gateway is ready")
    monkeypatch.setattr(hub, "STATE_FRESH", -1.0)
    assert http.get("/ready").status_code == 503
    assert http.get("/health").status_code == 200


def test_the_status_has_every_field_of_every_worker(http: httpx.Client, cluster: FakeCluster) -> None:
    until(lambda: http.get("/ready").status_code == 200, "the cluster's state is known")
    status = http.get("/status").json()
    assert status.keys() == {"ready", "sequences_in_flight", "cluster"}
    for worker in status["cluster"]["workers"]:
        assert worker["epoch"] == str(EPOCH), "64 bits do not fit JavaScript's numbers"
        assert set(worker) == set(WorkerState.__struct_fields__)


def test_the_api_describes_itself(http: httpx.Client, cluster: FakeCluster) -> None:
    """Every path and method that there is, and no other; `schemathesis` looks at what they answer."""
    document = http.get("/openapi.json").json()
    for path, item in document["paths"].items():
        asked = path.replace("{name}", MODEL)
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
            answer = http.request(method, asked)
            assert (answer.status_code == 405) == (method.lower() not in item), f"{method} {path}"
            if method.lower() in item:
                assert str(answer.status_code) in item[method.lower()]["responses"], f"{method} {path}"
    referred = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert referred <= document["components"]["schemas"].keys()
    for path, field in (("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        name = body["$ref"].rpartition("/")[2]
        assert field in document["components"]["schemas"][name]["required"]


def test_every_route_is_described(http: httpx.Client, server: GatewayServer) -> None:
    assert server._http is not None
    app: Any = server._http.config.app
    while not hasattr(app, "routes"):  # what is around the application
        app = app._app
    routes = {route.path.replace(":path}", "}") for route in app.routes}
    assert routes == set(http.get("/openapi.json").json()["paths"])


def test_frames_that_are_no_message_are_counted_and_do_no_harm(
    http: httpx.Client, server: GatewayServer, cluster: FakeCluster
) -> None:
    cluster.send(server.address, Finished(request=RequestId("r"), attempt=Attempt(1)))  # a router's message
    cluster.send(server.address, TokenBatch(WorkerId("nobody"), ()))
    with connected(server) as connection:  # and HTTP's port hears what is no HTTP
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    until(lambda: value(page(http), "baton_malformed_frames") == 1, "the router's message is counted, the batch is not")
    assert http.post("/v1/completions", json=BODY).status_code == 200


def test_the_socket_to_a_worker_that_stays_lost_is_closed(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "FORGET_AFTER", 0.05)
    with serving(tiny_llama) as (cluster, server), httpx.Client(base_url=server.url) as http:
        assert server._hub is not None
        peers = server._hub._mailbox.outbox._peers
        dead = WorkerAddress(WorkerId("dead"), EPOCH, Address("tcp://127.0.0.1:9"))

        def place(wanted: PlacementWanted) -> Placed:
            if wanted.attempt > 1:
                assert dead.mailbox in peers, "its start message was sent there"
                return cluster.placed(wanted)
            lost = WorkerLost(worker=dead.worker, epoch=EPOCH, detail="dead")
            cluster.do(lambda: cluster.send(server.address, lost))  # behind the answer
            return Placed(request=wanted.request, attempt=wanted.attempt, prefill=None, decode=dead, ticket=None)

        cluster.on_placement = place
        assert http.post("/v1/completions", json=BODY).status_code == 200
        until(lambda: dead.mailbox not in peers, "the socket to the dead worker is closed")
        assert cluster.address in peers
        assert http.post("/v1/completions", json=BODY).status_code == 200


def test_the_actor_starts_answers_and_stops(tiny_llama: Path) -> None:
    cluster = FakeCluster()
    try:
        fields = {
            "model": str(tiny_llama), "served_model_name": MODEL, "router": cluster.address, "port": 0,
            "limits": {"max_n": 2}, "timeouts": {"progress": 5.0},
        }  # fmt: skip
        actor = GatewayActor(fields)
        where = actor.start()
        try:
            until(actor.ready, "the actor is ready")
            with httpx.Client(base_url=where["http_url"]) as http:
                assert http.post("/v1/completions", json=BODY | {"n": 3}).status_code == 400
                assert http.post("/v1/completions", json=BODY | {"n": 2}).status_code == 200
            assert where["address"] == cluster.wait_for(PlacementWanted)[0].gateway
        finally:
            actor.stop()
        actor.stop()  # once more does no harm
    finally:
        cluster.stop()
    with pytest.raises(TypeError, match="frobnicate"):
        GatewayActor(fields | {"frobnicate": 1})


def test_a_gateway_is_replaced_on_its_port_while_its_streams_finish(tiny_llama: Path) -> None:
    with serving(tiny_llama) as (cluster, old), httpx.Client(base_url=old.url) as http:
        cluster.hold_after = 4
        body = {"model": MODEL, "prompt": [5], "max_tokens": 10, "stream": True}
        config = GatewayConfig(
            model=str(tiny_llama), served_model_name=MODEL, router=cluster.address, port=old.port, drain=0.2
        )
        with pytest.raises(OSError, match="in use"):  # nobody takes another's port without being told to
            GatewayServer(config).start()
        new = GatewayServer(replace(config, reuse_port=True))
        with http.stream("POST", "/v1/completions", json=body) as stream, ThreadPoolExecutor(1) as threads:
            lines = stream.iter_lines()
            next(lines)
            try:
                new.start()
                drained = threads.submit(old.drain, 10.0)
                until(lambda: not listens(old), "the old one takes nothing more")
                with httpx.Client(base_url=old.url) as other:
                    cluster.hold_after = None
                    assert other.post("/v1/completions", json=body | {"stream": False}).status_code == 200
                assert not drained.done()
                cluster.release()
                assert "data: [DONE]" in list(lines) and drained.result()
            finally:
                new.stop()


async def _fails(self: uvicorn.Server, sockets: object) -> None:
    raise LookupError("no HTTP today")


async def _ends(self: uvicorn.Server, sockets: object) -> None:
    pass


@pytest.mark.parametrize(
    ("serve", "error", "text"), [(_fails, LookupError, "no HTTP today"), (_ends, RuntimeError, "before it began")]
)
def test_a_gateway_without_http_does_not_start_and_says_why(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, serve: Any, error: type[Exception], text: str
) -> None:
    monkeypatch.setattr(uvicorn.Server, "serve", serve)
    with pytest.raises(error, match=text), serving(tiny_llama):
        pass


def listens(server: GatewayServer) -> bool:
    assert server._http is not None
    return any(listening.is_serving() for listening in server._http.servers)


def test_a_stream_that_does_not_finish_in_time_is_not_waited_for(tiny_llama: Path) -> None:
    with serving(tiny_llama) as (cluster, server), httpx.Client(base_url=server.url) as http:
        cluster.hold_after = 4
        body = {"model": MODEL, "prompt": [5], "max_tokens": 10, "stream": True}
        with http.stream("POST", "/v1/completions", json=body):
            assert not server.drain(0.1)

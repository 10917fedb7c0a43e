"""Promise (rows 6 and 19): one tenant sees, slows and guesses nothing of another."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.config import GatewayConfig
from gateway.core.quotas import Allowance, Quota
from gateway.server import GatewayServer
from messages.common import Role
from messages.gateway_to_router import AdoptionWanted, PlacementWanted
from messages.gateway_to_worker import Abort, Prefill
from messages.sampling import SamplingParams
from tests.gateway.conftest import MODEL, serving
from tests.gateway.fake_cluster import FakeCluster
from tests.gateway.raw import until
from tests.gateway.test_resume import events_of, reading, text
from tests.security.conftest import ADMIN, ALICE, BOB, TENANTS, Served, bearer
from tests.workers.relay import relay_of

COMPLETIONS = "/v1/completions"
BODY: dict[str, Any] = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 6}


def test_the_same_prompt_of_two_tenants_has_no_kv_in_common(http: httpx.Client, cluster: FakeCluster) -> None:
    for key in (ALICE, BOB, "an older key"):
        for salt in ({}, {"cache_salt": "shared"}):
            assert http.post(COMPLETIONS, json=BODY | salt, headers=bearer(key)).status_code == 200
    alice, alices, bob, bobs, again, agains = (order.generation.cache_salt for order in cluster.of(Prefill))
    assert (alice, alices) == (again, agains), "two keys of one tenant"
    assert len({alice, alices, bob, bobs}) == 4
    assert [wanted.tenant for wanted in cluster.of(PlacementWanted)] == ["alice"] * 2 + ["bob"] * 2 + ["alice"] * 2


def test_nothing_that_a_worker_has_cached_for_one_salt_is_a_hit_for_another(tiny_llama: Path) -> None:
    """The same prompt again and again, through a real worker: what is cached tells of its own salt only."""
    prompt, params = list(range(5, 133)), SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    with relay_of(tiny_llama, Role.COLOCATED) as relay:
        cached = []
        for salt in (b"a" * 32, b"b" * 32, b"a" * 32, b"b" * 32, b"c" * 32):
            request = relay.send(prompt, params, salt=salt, colocated="colocated-0")
            (stream,) = relay.finish(request)
            cached.append(sum(chunk.cached_tokens for chunk in stream.chunks))
    assert cached == [0, 0, len(prompt) - 1, len(prompt) - 1, 0]  # the last token's logits are wanted


def test_a_client_chooses_no_id(http: httpx.Client, cluster: FakeCluster) -> None:
    """Row 6: whatever it says, the cluster's ids are the gateway's own, one for each sequence."""
    said = {"X-Request-Id": "0" * 32, "Traceparent": "00-" + "0" * 32 + "-" + "0" * 16 + "-01"}
    ids = set()
    for _ in range(5):
        answer = http.post(COMPLETIONS, json=BODY | {"n": 3}, headers=bearer(ALICE) | said)
        ids.add(answer.headers["x-request-id"])
    requests = {wanted.request for wanted in cluster.of(PlacementWanted)}
    assert len(ids) == 5 and "0" * 32 not in ids
    assert len(requests) == 15 and not [request for request in requests if "0" * 32 in request]


@pytest.fixture(scope="module")
def other(guarded: Served, tiny_llama: Path) -> Iterator[httpx.Client]:
    """Another gateway of the same cluster."""
    config = GatewayConfig(
        model=str(tiny_llama), served_model_name=MODEL, router=guarded[0].address, port=0, drain=0.2, tenants=TENANTS
    )
    with ExitStack() as stack:
        server = GatewayServer(config)
        stack.callback(server.stop)
        server.start()
        yield stack.enter_context(httpx.Client(base_url=server.url, timeout=10))


def test_a_stream_is_read_on_by_its_tenant_only(http: httpx.Client, other: httpx.Client, cluster: FakeCluster) -> None:
    cluster.hold_after, cluster.chunk_size = 2, 1
    body = BODY | {"stream": True, "stream_options": {"resumable": True}}
    with http.stream("POST", COMPLETIONS, json=body, headers=bearer(ALICE)) as stream:
        id, events = stream.headers["x-request-id"], events_of(stream.iter_lines())
        seen = [next(events)]
        for gateway in (http, other):
            for key in (BOB, ADMIN):
                asked = gateway.get(f"/v1/streams/{id}", headers=bearer(key))
                assert asked.status_code == 404 and asked.json()["error"]["code"] == "stream_not_found"
            assert gateway.get(f"/v1/streams/{id}").status_code == 401
        cluster.release()
        seen += events
    assert seen[-1].data == "[DONE]", "others have cut it off"
    assert not cluster.of(Abort)
    assert {wanted.request for wanted in cluster.of(AdoptionWanted)}.isdisjoint(
        wanted.request for wanted in cluster.of(PlacementWanted)
    ), "somebody else's stream was asked for by its name"
    rest = http.get(f"/v1/streams/{id}", params={"after": seen[0].id}, headers=bearer(ALICE))
    assert reading([seen[0], *text(rest.text)]) == reading(seen)  # however the pieces are cut


def test_who_has_too_much_in_flight_is_told_and_nobody_else_is(
    http: httpx.Client, server: GatewayServer, cluster: FakeCluster
) -> None:
    cluster.hold_after = 1
    with http.stream("POST", COMPLETIONS, json=BODY | {"stream": True, "n": 2, "seed": 1}, headers=bearer(BOB)) as two:
        until(lambda: len(cluster.of(Prefill)) == 2, "they run")
        refused = http.post(COMPLETIONS, json=BODY, headers=bearer(BOB))
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(refused.headers["retry-after"]) >= 1
        assert http.get("/v1/models", headers=bearer(BOB)).status_code == 200
        cluster.release()
        assert http.post(COMPLETIONS, json=BODY, headers=bearer(ALICE)).status_code == 200
        two.read()
    assert http.post(COMPLETIONS, json=BODY, headers=bearer(BOB)).status_code == 200
    assert server._hub is not None and server._hub._quotas["bob"].in_flight == 0


def test_requests_of_a_minute_come_back_evenly() -> None:
    quota = Quota(Allowance(requests_per_minute=6), 100.0, retry_after=1.0)
    for _ in range(6):
        assert quota.refusal(1, 100.0) is None
        quota.begin(10**6)
    refused = quota.refusal(1, 100.0)
    assert refused is not None and refused.retry_after == pytest.approx(10)
    assert quota.refusal(1, 109.9) is not None
    assert quota.refusal(1, 110.0) is None
    quota.begin(0)
    assert quota.refusal(1, 110.0) is not None
    assert quota.refusal(1, 1e6) is None, "no more than a minute's worth is kept"
    for _ in range(6):
        quota.begin(0)
    assert quota.refusal(1, 1e6) is not None


def test_streams_that_are_taken_over_are_no_new_requests() -> None:
    quota = Quota(Allowance(requests_per_minute=1, tokens_per_minute=1, max_concurrent_requests=2), 0.0, retry_after=1)
    quota.begin(100)
    assert quota.refusal(1, 0.0) is not None and quota.crowded(2) is None
    quota.in_flight = 1
    assert quota.crowded(2) is not None


def test_a_stream_is_taken_over_though_its_tenant_has_had_all_of_this_minute(tiny_llama: Path) -> None:
    tenants = (replace(TENANTS[0], allowance=Allowance(requests_per_minute=1)),)
    with serving(tiny_llama, tenants=tenants) as (cluster, one), ExitStack() as stack:
        cluster.hold_after, cluster.chunk_size = 2, 1
        other = GatewayServer(replace(one._config, router=cluster.address, port=0, tenants=tenants))
        stack.callback(other.stop)
        other.start()
        here, there = (
            stack.enter_context(httpx.Client(base_url=server.url, timeout=10, headers=bearer(ALICE)))
            for server in (one, other)
        )
        with here.stream("POST", COMPLETIONS, json=BODY | {"stream": True}) as stream:
            id, events = stream.headers["x-request-id"], events_of(stream.iter_lines())
            seen = [next(events)]
            with there.stream("POST", COMPLETIONS, json=BODY | {"stream": True}) as all_of_it:
                assert all_of_it.status_code == 200
                assert there.post(COMPLETIONS, json=BODY).status_code == 429
                with there.stream("GET", f"/v1/streams/{id}", params={"after": seen[0].id}) as rest:
                    assert rest.status_code == 200
                    cluster.release()
                    assert list(events_of(rest.iter_lines()))[-1].data == "[DONE]"


def test_tokens_of_a_minute_are_those_of_prompts_and_answers() -> None:
    quota = Quota(Allowance(tokens_per_minute=60), 0.0, retry_after=1.0)
    quota.begin(50)
    quota.use(5)
    assert quota.refusal(1, 0.0) is None
    quota.begin(20)  # whoever has some left may ask for any prompt, and waits for as much longer afterwards
    refused = quota.refusal(1, 0.0)
    assert refused is not None and refused.retry_after == pytest.approx(16)
    assert quota.refusal(1, 16.1) is None


def test_no_limit_is_no_limit() -> None:
    quota = Quota(Allowance(), 0.0, retry_after=1.0)
    for _ in range(1000):
        quota.begin(10**9)
    quota.in_flight = 10**9
    assert quota.refusal(10**9, 0.0) is None

"""Promise: a stream goes on at any other gateway when its own one is gone, with exactly the missing rest."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.config import GatewayConfig
from gateway.server import GatewayServer
from gateway.tokenization import Tokenizer
from messages.gateway_to_router import AdoptionWanted
from messages.gateway_to_worker import Abort, EndAck, Prefill
from tests.gateway.conftest import MODEL, sequence, serving
from tests.gateway.fake_cluster import FakeCluster
from tests.gateway.raw import until
from tests.gateway.test_resume import CASES, COMPLETION, ask, events_of, path_of, reading, tell, text

Pair = tuple[FakeCluster, httpx.Client, httpx.Client]
PLAIN = {name: body | {"stream_options": {"include_usage": True}} for name, body in CASES.items()}
"""No client need say beforehand that its gateway may die."""


@pytest.fixture(scope="module")
def pair(tiny_llama: Path) -> Iterator[Pair]:
    """Two gateways of one cluster."""
    with serving(tiny_llama) as (cluster, one), ExitStack() as stack:
        config = GatewayConfig(
            model=str(tiny_llama), served_model_name=MODEL, router=cluster.address, port=0, drain=0.2
        )
        two = GatewayServer(config)
        stack.callback(two.stop)
        two.start()
        here, there = (stack.enter_context(httpx.Client(base_url=server.url, timeout=10)) for server in (one, two))
        yield cluster, here, there


@pytest.mark.parametrize("body", PLAIN.values(), ids=PLAIN)
def test_what_has_left_is_told_again_from_any_event_on(body: dict[str, Any], pair: Pair) -> None:
    cluster, here, there = pair
    cluster.reset()
    cluster.chunk_size = 2
    id, events = ask(here, body)
    whole = reading(events)
    for cut in range(len(events) - 1):
        rest = there.get(f"/v1/streams/{id}", params={"after": events[cut].id})
        assert rest.status_code == 200 and rest.headers["x-request-id"] == id
        assert reading([*events[: cut + 1], *text(rest.text)]) == whole, f"behind {events[cut].id}"
    assert len(cluster.of(AdoptionWanted)) >= len(whole.choices)


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
@pytest.mark.parametrize("name", ["completion", "several", "echo", "chat with logprobs"])
def test_a_stream_goes_on_elsewhere_in_the_middle(name: str, cut: int, pair: Pair) -> None:
    """Whatever its first gateway still thinks: it hears that it has lost it, and stops nothing."""
    cluster, here, there = pair
    cluster.reset()
    body = PLAIN[name]
    whole = reading(ask(here, body)[1])
    cluster.reset()
    cluster.chunk_size, cluster.hold_after = 1, cut or 1
    with here.stream("POST", path_of(body), json=body) as first:
        id, seen = first.headers["x-request-id"], []
        earlier = events_of(first.iter_lines())
        if cut:
            seen = [next(earlier)]
        with there.stream("GET", f"/v1/streams/{id}", headers={"Last-Event-ID": seen[-1].id} if seen else {}) as rest:
            *_, last = earlier
            assert last.body["error"]["code"] == "stream_taken"
            assert not cluster.of(Abort)
            cluster.release()
            after = list(events_of(rest.iter_lines()))
    assert same(reading([*seen, *after]), whole)
    assert {ack.attempt for ack in cluster.wait_for(EndAck, len(whole.choices))} == {2}
    assert here.get("/status").json()["sequences_in_flight"] == 0


def same(one: Any, other: Any) -> bool:
    """Two answers to one question, but for what is each one's own."""
    return (one.choices, one.usage, one.done) == (other.choices, other.usage, other.done) and len(one.constant) == 1


def test_a_stop_string_that_nobody_has_told_the_client_of_ends_the_rest(pair: Pair, tokenizer: Tokenizer) -> None:
    cluster, here, there = pair
    cluster.reset()
    cluster.script, cluster.chunk_size = tell(tokenizer, "one two ENDE three"), 1
    body = COMPLETION | {"max_tokens": 50, "stop": "ENDE"}
    id, events = ask(here, body)
    for cut in range(len(events) - 1):
        rest = text(there.get(f"/v1/streams/{id}", params={"after": events[cut].id}).text)
        assert reading([*events[: cut + 1], *rest]) == reading(events)
    assert reading(events).choices[0]["text"] == "one two "


def test_an_attempt_after_the_adoption_knows_everything(pair: Pair) -> None:
    """The adopter's worker is lost in turn; the next attempt has the whole transcript, log-probabilities and all, for
    yet another gateway."""
    cluster, here, there = pair
    cluster.reset()
    body = PLAIN["chat with logprobs"]
    whole = reading(ask(here, body)[1])
    cluster.reset()
    cluster.chunk_size, cluster.hold_after = 1, 4
    with here.stream("POST", path_of(body), json=body) as first:
        id, earlier = first.headers["x-request-id"], events_of(first.iter_lines())
        seen = [next(earlier)]
        until(lambda: len(cluster.made(sequence(id, 0)).tokens) == 4, "it stands still")
        with there.stream("GET", f"/v1/streams/{id}", params={"after": seen[0].id}):
            cluster.fail(sequence(id, 0))
            order = cluster.wait_for(Prefill, 2)[1]
            assert order.attempt == 3 and len(order.generation.generated) == 4 * 4
            assert len(order.generation.logprobs.sampled) == 4
            with here.stream("GET", f"/v1/streams/{id}", params={"after": seen[0].id}) as third:
                cluster.release()
                rest = list(events_of(third.iter_lines()))
    assert same(reading([*seen, *rest]), whole)


def test_nobody_has_it_is_said_fast(pair: Pair) -> None:
    cluster, _, there = pair
    cluster.reset()
    for id in ("0" * 32, "nonsense", "0" * 31 + "/"):
        answer = there.get(f"/v1/streams/{id}", params={"after": "3"})
        assert answer.status_code == 404
    assert {wanted.request for wanted in cluster.of(AdoptionWanted)} == {sequence("0" * 32, 0)}


def test_a_stream_of_which_a_choice_is_lost_is_not_read_on(pair: Pair) -> None:
    """But for a choice that the client has read to its end."""
    cluster, here, there = pair
    cluster.reset()
    id, events = ask(here, PLAIN["several"])
    cluster.forget(sequence(id, 1))
    tokens = reading(events).usage["completion_tokens"] // 2
    lost = there.get(f"/v1/streams/{id}", params={"after": f"3,{tokens - 1}"})
    assert (lost.status_code, lost.json()["error"]["code"]) == (404, "stream_not_found")
    rest = reading(text(there.get(f"/v1/streams/{id}", params={"after": f"0,{tokens}e"}).text))
    assert rest.choices[0] == reading(events).choices[0] and rest.usage == reading(events).usage and rest.done

"""Promise: whoever names a request and the last event that it has seen gets exactly the rest, whatever came between."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import InvalidRequest
from gateway.core.positions import Cursor, Position, at_end, event_id, parse
from gateway.core.stop_strings import StopStrings
from gateway.server import GatewayServer
from gateway.tokenization import Tokenizer
from messages.common import FailReason
from messages.gateway_to_router import Finished
from messages.gateway_to_worker import Abort, Prefill
from messages.worker_to_gateway import AttemptFailed
from tests.gateway.conftest import MODEL, serving
from tests.gateway.fake_cluster import DECODE, FakeCluster
from tests.gateway.raw import connected, post, until

EMOJI = "\N{GRINNING FACE} zwei, drei \N{PARTY POPPER}"
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": [5, 6], "max_tokens": 14, "stream": True}
CHAT: dict[str, Any] = {
    "model": MODEL, "messages": [{"role": "user", "content": "Say hello"}], "max_tokens": 12, "stream": True,
}  # fmt: skip
USAGE = {"include_usage": True, "resumable": True}
CASES: dict[str, dict[str, Any]] = {
    "completion": COMPLETION | {"stream_options": USAGE},
    "without usage": COMPLETION | {"stream_options": {"resumable": True}},
    "several": COMPLETION | {"n": 2, "seed": 3, "stream_options": USAGE},
    "several prompts": COMPLETION | {"prompt": ["one", "two"], "stream_options": USAGE},
    "logprobs": COMPLETION | {"logprobs": 2, "stream_options": USAGE, "return_token_ids": True},
    "echo": COMPLETION | {"echo": True, "logprobs": 1, "n": 2, "seed": 1, "stream_options": USAGE},
    "only echo": COMPLETION | {"echo": True, "max_tokens": 0, "logprobs": 1, "stream_options": USAGE},
    "chat": CHAT | {"stream_options": USAGE},
    "chat with logprobs": CHAT | {"logprobs": True, "top_logprobs": 2, "stream_options": USAGE},
}


class SseEvent(NamedTuple):
    id: str
    data: str

    @property
    def body(self) -> Any:
        return json.loads(self.data)


def events_of(lines: Iterator[str]) -> Iterator[SseEvent]:
    """Server-sent events, each of which must have an id."""
    id = data = None
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "id":
            id = value
        elif name == "data":
            data = value
        elif not line:
            assert id is not None and data is not None, "an event without an id"
            yield SseEvent(id, data)
            id = data = None


def text(body: str) -> list[SseEvent]:
    return list(events_of(iter(body.split("\n")[:-1])))


class Reading(NamedTuple):
    """What a client makes of events: pieces of one choice joined, so that cuts do not matter."""

    choices: dict[int, dict[str, Any]]
    usage: Any
    done: bool
    constant: set[str]


def reading(events: list[SseEvent]) -> Reading:
    choices: dict[int, dict[str, Any]] = {}
    usage, constant = None, set()
    for event in events:
        if event.data == "[DONE]":
            continue
        body = event.body
        constant.add(json.dumps({name: body[name] for name in ("id", "created", "model", "object")}))
        usage = body.get("usage") or usage
        for part in body["choices"]:
            known = choices.setdefault(part["index"], {"text": "", "tokens": [], "logprobs": [], "finish": None})
            known["text"] += part.get("text", part.get("delta", {}).get("content", ""))
            known["tokens"] += part.get("token_ids", [])
            known["logprobs"] += entries(part["logprobs"])
            known["finish"] = part["finish_reason"] or known["finish"]
            known["roles"] = known.get("roles", 0) + ("role" in part.get("delta", {}))
            known["prompts"] = known.get("prompts", 0) + ("prompt_token_ids" in part)
    return Reading(choices, usage, events[-1].data == "[DONE]", constant)


def entries(logprobs: Any) -> list[Any]:
    if logprobs is None:
        return []
    if "content" in logprobs:
        return list(logprobs["content"])
    return list(
        zip(*(logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")), strict=True)
    )


def path_of(body: dict[str, Any]) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


def ask(http: httpx.Client, body: dict[str, Any]) -> tuple[str, list[SseEvent]]:
    answer = http.post(path_of(body), json=body)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-request-id"], text(answer.text)


def tell(tokenizer: Tokenizer, said: str) -> Callable[[list[int], int], list[int]]:
    """A script that says this."""
    tokens = tokenizer.encode(said, add_special_tokens=False)
    return lambda prompt, most: tokens[:most]


@pytest.mark.parametrize("body", CASES.values(), ids=CASES)
def test_behind_every_event_comes_just_what_came_behind_it(
    body: dict[str, Any], http: httpx.Client, cluster: FakeCluster
) -> None:
    cluster.chunk_size = 2
    id, events = ask(http, body)
    whole = reading(events)
    assert whole.done and len({event.id for event in events}) == len(events)
    for cut in range(len(events)):
        after = events[cut].id
        rest = http.get(f"/v1/streams/{id}", params={"after": after})
        if cut == len(events) - 1:
            assert (rest.status_code, rest.content) == (204, b""), "an EventSource stops at this"
            continue
        assert rest.status_code == 200 and rest.headers["x-request-id"] == id
        assert reading([*events[: cut + 1], *text(rest.text)]) == whole, f"behind {after}"
    again = http.get(f"/v1/streams/{json.loads(events[0].data)['id']}")  # the id in the body does as well
    assert reading(text(again.text)) == whole, "from the start"


def test_characters_and_stop_strings_that_straddle_the_cut_stay_whole(
    http: httpx.Client, cluster: FakeCluster, tokenizer: Tokenizer
) -> None:
    cluster.script, cluster.chunk_size = tell(tokenizer, "eins " + EMOJI + " ENDE und mehr"), 1
    body = COMPLETION | {"max_tokens": 100, "stop": ["EXIT", "ENDE"], "stream_options": USAGE}
    id, events = ask(http, body)
    whole = reading(events)
    assert whole.choices[0]["text"] == "eins " + EMOJI + " " and whole.choices[0]["finish"] == "stop"
    tokens = cluster.script([], 100)[: whole.usage["completion_tokens"]]
    detokenizer, stops, sent = (
        tokenizer.detokenizer(COMPLETION["prompt"]),
        StopStrings(("EXIT", "ENDE"), include=False),
        "",
    )
    for position, token in enumerate(tokens):  # those too at which no event ended
        rest = reading(text(http.get(f"/v1/streams/{id}", params={"after": str(position)}).text))
        assert sent + rest.choices[0]["text"] == whole.choices[0]["text"], f"behind {position} tokens"
        assert (rest.choices[0]["finish"], rest.usage) == ("stop", whole.usage)
        sent += stops.feed(detokenizer.step(token)).text


def test_a_client_whose_connection_broke_reads_on_while_the_answer_grows(
    server: GatewayServer, http: httpx.Client, cluster: FakeCluster
) -> None:
    whole = reading(ask(http, CASES["chat"])[1])
    cluster.reset()
    cluster.hold_after = 4
    with http.stream("POST", path_of(CHAT), json=CASES["chat"]) as broken:
        id = broken.headers["x-request-id"]
        first = [next(events_of(broken.iter_lines()))]
    until(lambda: http.get("/status").json()["sequences_in_flight"] == 1, "it goes on without its client")
    headers = {"Last-Event-ID": first[-1].id}  # as an EventSource does
    with http.stream("GET", f"/v1/streams/{id}", headers=headers) as rest:
        cluster.release()
        both = reading([*first, *events_of(rest.iter_lines())])
    assert both.choices == whole.choices and both.usage == whole.usage and both.done and len(both.constant) == 1
    assert not cluster.of(Abort)


def test_of_two_who_read_the_later_one_gets_the_stream(http: httpx.Client, cluster: FakeCluster) -> None:
    cluster.hold_after = 4
    with http.stream("POST", path_of(CHAT), json=CASES["chat"]) as earlier:
        id, seen = earlier.headers["x-request-id"], events_of(earlier.iter_lines())
        next(seen)
        with http.stream("GET", f"/v1/streams/{id}") as later:
            *_, last = seen
            assert last.body["error"]["code"] == "stream_taken"
            cluster.release()
            assert reading(list(events_of(later.iter_lines()))).choices[0]["finish"] == "length"
    assert not cluster.of(Abort)


def test_a_stream_that_is_not_resumable_ends_with_its_client(http: httpx.Client, cluster: FakeCluster) -> None:
    cluster.hold_after = 4
    with http.stream("POST", path_of(CHAT), json=CHAT) as broken:
        id = broken.headers["x-request-id"]
        next(events_of(broken.iter_lines()))
    cluster.wait_for(Finished)
    answer = http.get(f"/v1/streams/{id}", params={"after": "1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "stream_not_found")


def test_a_client_that_does_not_come_back_in_time_frees_everything(tiny_llama: Path) -> None:
    with serving(tiny_llama, resume_grace=0.2) as (cluster, server), httpx.Client(base_url=server.url) as http:
        cluster.hold_after = 4
        with connected(server) as connection:
            connection.sendall(post(path_of(CHAT), CASES["chat"]))
            cluster.wait_for(Prefill)
        assert {abort.request for abort in cluster.wait_for(Abort, 2)} == {cluster.of(Prefill)[0].request}
        cluster.wait_for(Finished)
        id = cluster.of(Prefill)[0].request.partition("-")[0]
        until(lambda: http.get(f"/v1/streams/{id}").status_code == 404, "nothing is kept of it")


def test_a_stream_that_failed_says_so_again(server: GatewayServer, http: httpx.Client, cluster: FakeCluster) -> None:
    cluster.hold_after = 4
    with http.stream("POST", path_of(CHAT), json=CASES["chat"]) as stream:
        id, seen = stream.headers["x-request-id"], events_of(stream.iter_lines())
        first = next(seen)
        (order,) = cluster.wait_for(Prefill)
        failed = AttemptFailed(
            request=order.request, attempt=order.attempt, worker=DECODE, reason=FailReason.CAPACITY, detail="too long"
        )
        cluster.send(server.address, failed)
        *_, last = seen
    assert last.body["error"]["code"] == "capacity_exceeded"
    again = http.get(f"/v1/streams/{id}", params={"after": first.id})
    assert (again.status_code, again.json()) == (400, last.body)


@pytest.mark.parametrize("after", ["x", "1,2", "-1", "1e,", "1,usage,usage", "99999999999", "usage", ",", "1\n"])
def test_what_is_no_id_of_the_stream_is_refused(after: str, http: httpx.Client, cluster: FakeCluster) -> None:
    id, _ = ask(http, CASES["completion"])
    answer = http.get(f"/v1/streams/{id}", params={"after": after})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after")


positions = st.builds(Position, st.integers(0, 10**9 - 1), st.booleans())


@given(st.lists(positions, min_size=1, max_size=8), st.booleans())
def test_an_id_names_its_position(choices: list[Position], usage: bool) -> None:
    id = event_id(choices, *(["usage"] if usage else []))
    assert parse(id, len(choices)) == Cursor(tuple(choices), usage) and not at_end(id)
    assert at_end(event_id(choices, "done"))


@given(st.text(alphabet="0123456789e,usagedon", max_size=30), st.integers(1, 4))
def test_any_text_is_a_position_or_refused(text: str, num_choices: int) -> None:
    try:
        cursor = parse(text, num_choices)
    except InvalidRequest as error:
        assert error.param == "after"
    else:
        assert len(cursor.choices) == num_choices

"""Promise: whatever a client sends, it hears a typed refusal at once, nothing of it reaches the cluster, and the
streams of others go on unharmed."""

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from gateway.core.limits import Limits
from gateway.server import GatewayServer
from gateway.tokenization import Tokenizer
from messages.gateway_to_router import PlacementWanted
from tests.gateway.conftest import MODEL
from tests.gateway.fake_cluster import FakeCluster, counting
from tests.gateway.raw import Reply, converse, head

AT_ONCE = 0.1
"""Seconds."""
ATTEMPTS = 3
"""The fastest of them counts: others use this machine too."""
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HUNDRED_MB = 100_000_000
CONTEXT = 4096


@contextlib.contextmanager
def a_stream_beside(client: openai.OpenAI, cluster: FakeCluster, tokenizer: Tokenizer) -> Iterator[None]:
    """A stream that begins before, stands in the middle of its answer during, and ends complete and correct after."""
    cluster.hold_after = 4
    stream = client.completions.create(model=MODEL, prompt=[77], max_tokens=40, stream=True)
    text = next(stream).choices[0].text
    yield
    cluster.release()
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == tokenizer.decode(counting([77], 40))


def refused_at_once(ask: Callable[[], Reply]) -> Reply:
    """The reply, which must be an error in OpenAI's shape, and quick."""
    fastest = float("inf")
    for _ in range(ATTEMPTS):
        began = time.perf_counter()
        reply = ask()
        fastest = min(fastest, time.perf_counter() - began)
    assert 400 <= reply.status < 500, reply.body
    assert reply.headers["content-type"] == "application/json"
    error = reply.error
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert isinstance(error["message"], str) and 0 < len(error["message"]) < 600
    assert fastest < AT_ONCE, f"it took {1000 * fastest:.0f} ms"
    return reply


def asking(http: httpx.Client, path: str, body: bytes, **headers: str) -> Callable[[], Reply]:
    def ask() -> Reply:
        answer = http.post(path, content=body, headers={"Content-Type": "application/json"} | headers)
        return Reply(answer.status_code, dict(answer.headers), answer.content, len(body))

    return ask


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "x"} | fields).encode()


def chat(*messages: Any, **fields: Any) -> bytes:
    return json.dumps(
        {"model": MODEL, "messages": list(messages) or [{"role": "user", "content": "x"}]} | fields
    ).encode()


def raw(field: str) -> bytes:
    """A completion with a field that Python would not write."""
    return b'{"model": "tiny-llama", "prompt": "x", ' + field.encode() + b"}"


def prompt_of(content: str) -> bytes:
    return b'{"model": "tiny-llama", "prompt": ' + content.encode() + b"}"


BAD_COMPLETIONS: dict[str, tuple[bytes, str | None]] = {
    # The body, and the parameter that the error names.
    "nothing": (b"", None),
    "no JSON": (b"prompt=hello", None),
    "broken JSON": (b'{"model": "tiny-llama", "prompt": "x"', None),
    "two values": (completion() + b"{}", None),
    "a trailing comma": (b'{"model": "tiny-llama", "prompt": "x",}', None),
    "a number": (b"5", None),
    "a string": (b'"prompt"', None),
    "null": (b"null", None),
    "a list": (b"[" + completion() + b"]", None),
    "no model": (b'{"prompt": "x"}', "model"),
    "no prompt": (b'{"model": "tiny-llama"}', "prompt"),
    "a null model": (completion(model=None), "model"),
    "an unknown model": (completion(model="gpt-5"), "model"),
    "a very long unknown model": (completion(model="m" * 1_000_000), "model"),
    "an unknown parameter": (completion(frobnicate=1), "frobnicate"),
    "a parameter of chat": (completion(messages=[]), "messages"),
    "a very long unknown parameter": (completion(**{"f" * 100_000: 1}), None),
    "a suffix": (completion(suffix="end"), "suffix"),
    "best_of": (completion(best_of=2), "best_of"),
    "stream options without a stream": (completion(stream_options={"include_usage": True}), "stream_options"),
    "unknown stream options": (completion(stream=True, stream_options={"x": 1}), "stream_options"),
    "a stream flag that is text": (completion(stream="true"), "stream"),
    "NaN as temperature": (raw('"temperature": NaN'), None),
    "Infinity as temperature": (raw('"temperature": Infinity'), None),
    "-Infinity as temperature": (raw('"temperature": -Infinity'), None),
    "a temperature beyond floats": (raw('"temperature": 1e999'), "temperature"),
    "a temperature of 1000 digits": (raw('"temperature": ' + "9" * 1000), "temperature"),
    "a negative temperature": (completion(temperature=-0.1), "temperature"),
    "a temperature in words": (completion(temperature="hot"), "temperature"),
    "a list as temperature": (completion(temperature=[1]), "temperature"),
    "top_p of 0": (completion(top_p=0), "top_p"),
    "top_p above 1": (completion(top_p=1.01), "top_p"),
    "top_k below -1": (completion(top_k=-2), "top_k"),
    "min_p above 1": (completion(min_p=2), "min_p"),
    "a repetition penalty of 0": (completion(repetition_penalty=0), "repetition_penalty"),
    "a presence penalty above 2": (completion(presence_penalty=2.1), "presence_penalty"),
    "a frequency penalty below -2": (completion(frequency_penalty=-3), "frequency_penalty"),
    "n of a million": (completion(n=10**6), "n"),
    "n beyond the index": (completion(n=2**31), "n"),
    "n of 0": (completion(n=0), "n"),
    "a negative n": (completion(n=-1), "n"),
    "a fractional n": (completion(n=1.5), "n"),
    "more sequences than one request may have": (completion(prompt=["x"] * 100, n=100), "prompt"),
    "100,000 prompts": (completion(prompt=["x"] * 100_000), "prompt"),
    "a negative max_tokens": (completion(max_tokens=-1), "max_tokens"),
    "no tokens at all": (completion(max_tokens=0), "max_tokens"),
    "max_tokens beyond the context": (completion(max_tokens=CONTEXT + 1), "max_tokens"),
    "max_tokens beyond an index": (completion(max_tokens=10**12), "max_tokens"),
    "max_tokens of 1000 digits": (raw('"max_tokens": ' + "9" * 1000), "max_tokens"),
    "max_tokens of 100,000 digits": (raw('"max_tokens": ' + "9" * 100_000), "max_tokens"),
    "a seed of 100 digits": (completion(seed=10**100), "seed"),
    "logprobs of a million": (completion(logprobs=10**6), "logprobs"),
    "negative logprobs": (completion(logprobs=-1), "logprobs"),
    "an empty prompt": (completion(prompt="", add_special_tokens=False), "prompt"),
    "no prompts": (completion(prompt=[]), "prompt"),
    "a prompt without tokens": (completion(prompt=[[]]), "prompt"),
    "an empty prompt among others": (completion(prompt=["x", []]), "prompt"),
    "a null prompt": (completion(prompt=None), "prompt"),
    "a prompt that is an object": (completion(prompt={"text": "x"}), "prompt"),
    "a number as prompt": (completion(prompt=7), "prompt"),
    "a token id out of range": (completion(prompt=[2048]), "prompt"),
    "a negative token id": (completion(prompt=[5, -1]), "prompt"),
    "a token id of 64 bits": (completion(prompt=[2**62]), "prompt"),
    "a token id beyond 64 bits": (completion(prompt=[2**70]), "prompt"),
    "a fractional token id": (completion(prompt=[1.5]), "prompt[0]"),
    "a bool as token id": (completion(prompt=[1, True]), "prompt[1]"),
    "text among token ids": (completion(prompt=[1, "x"]), "prompt"),
    "a bad token id in the second prompt": (completion(prompt=[[1], [1, 99999]]), "prompt"),
    "more token ids than the context has": (completion(prompt=[5] * (CONTEXT + 1)), "prompt"),
    "a million token ids": (completion(prompt=[5] * 1_000_000), "prompt"),
    "a text longer than the context": (completion(prompt="hello " * CONTEXT), "prompt"),
    "a text of 4 MB": (completion(prompt="x" * 4_000_000), "prompt"),
    "a full context": (completion(prompt=[5] * CONTEXT), "prompt"),
    "lone surrogates in the prompt": (completion(prompt="\ud800 x"), None),
    "a lone low surrogate in the prompt": (completion(prompt="x \udfff"), None),
    "swapped surrogates in the prompt": (completion(prompt="\udc00\ud800"), None),
    "an encoded surrogate in the prompt": (prompt_of('"').replace(b'"}', b'"\xed\xa0\x80"}'), None),
    "invalid UTF-8 in the prompt": (prompt_of('"').replace(b'"}', b'"\xff\xfe"}'), None),
    "overlong UTF-8 in the prompt": (prompt_of('"').replace(b'"}', b'"\xc0\xaf"}'), None),
    "invalid UTF-8 as the body": (b"\xff\xfe{}", None),
    "a lone surrogate in a stop string": (completion(stop=["a", "\ud83d"]), None),
    "an empty stop string": (completion(stop=["a", ""]), "stop"),
    "17 stop strings": (completion(stop=[str(i) for i in range(17)]), "stop"),
    "a very long stop string": (completion(stop="s" * 100_000), "stop"),
    "numbers as stop strings": (completion(stop=[1]), "stop[0]"),
    "a stop token out of range": (completion(stop_token_ids=[2048]), "stop_token_ids"),
    "a negative stop token": (completion(stop_token_ids=[-1]), "stop_token_ids"),
    "100,000 stop tokens": (completion(stop_token_ids=[1] * 100_000), "stop_token_ids"),
    "a logit bias out of range": (completion(logit_bias={"5": 101}), "logit_bias"),
    "a logit bias below the range": (completion(logit_bias={"5": -100.5}), "logit_bias"),
    "a logit bias for no token": (completion(logit_bias={"2048": 1}), "logit_bias"),
    "a logit bias for a negative token": (completion(logit_bias={"-1": 1}), "logit_bias"),
    "a logit bias for a word": (completion(logit_bias={"hello": 1}), "logit_bias"),
    "a logit bias for an Arabic digit": (completion(logit_bias={"\u0665": 1}), "logit_bias"),
    "a logit bias for a token of 10,000 digits": (completion(logit_bias={"1" * 10_000: 1}), "logit_bias"),
    "a null logit bias": (completion(logit_bias={"5": None}), "logit_bias[...]"),
    "2000 logit biases": (completion(logit_bias={str(i): 1 for i in range(2000)}), "logit_bias"),
    "a list as logit bias": (completion(logit_bias=[5]), "logit_bias"),
    "a very long user": (completion(user="u" * 1000), "user"),
    "nested lists as the body": (b"[" * 1_000_000, None),
    "nested lists as the prompt": (prompt_of("[" * 100_000 + "]" * 100_000), "prompt[0][0]"),
    "nested objects in an unsupported field": (raw('"suffix": ' + '{"a":' * 100_000 + "1" + "}" * 100_000), None),
    "nested lists in an unsupported field": (raw('"suffix": ' + "[" * 500 + "]" * 500), "suffix"),
    "a number of 100,000 digits in an unsupported field": (raw('"suffix": ' + "1" * 100_000), "suffix"),
}


@pytest.mark.parametrize(("body", "param"), BAD_COMPLETIONS.values(), ids=BAD_COMPLETIONS)
def test_a_bad_completion_is_refused_at_once(
    body: bytes,
    param: str | None,
    http: httpx.Client,
    client: openai.OpenAI,
    cluster: FakeCluster,
    tokenizer: Tokenizer,
) -> None:
    with a_stream_beside(client, cluster, tokenizer):
        reply = refused_at_once(asking(http, COMPLETIONS, body))
    assert reply.status == (404 if reply.error["code"] == "model_not_found" else 400)
    assert reply.error["param"] == param
    assert len(cluster.of(PlacementWanted)) == 1, "the stream's alone"


USER = {"role": "user", "content": "x"}
BAD_CHATS: dict[str, tuple[bytes, str | None]] = {
    "no messages": (b'{"model": "tiny-llama"}', "messages"),
    "an empty list of messages": (json.dumps({"model": MODEL, "messages": []}).encode(), "messages"),
    "a text as messages": (chat(messages="hi"), "messages"),
    "a text as message": (chat("hi"), "messages[0]"),
    "a message without a role": (chat({"content": "x"}), "messages[0]"),
    "an unknown role": (chat(USER, {"role": "wizard", "content": "x"}), "messages[1].role"),
    "a role of tools": (chat({"role": "tool", "content": "x"}), "messages[0].role"),
    "a message without content": (chat({"role": "user"}), "messages[0].content"),
    "a message with a number as content": (chat({"role": "user", "content": 5}), "messages[0].content"),
    "a message with an unknown field": (chat(USER | {"mood": "good"}), "messages[0]"),
    "an image": (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}),
        "messages[0].content",
    ),
    "a part without text": (chat({"role": "user", "content": [{"type": "text"}]}), "messages[0].content"),
    "a part with a number as text": (
        chat({"role": "user", "content": [{"type": "text", "text": 5}]}),
        "messages[0].content",
    ),
    "a part that is text": (chat({"role": "user", "content": ["x"]}), "messages[0].content[0]"),
    "a lone surrogate in the content": (chat({"role": "user", "content": "\ud800"}), None),
    "a lone surrogate in a part": (chat({"role": "user", "content": [{"type": "text", "text": "\udbff"}]}), None),
    "a lone surrogate in a name": (chat(USER | {"name": "\udc00"}), None),
    "a lone surrogate in a role": (chat({"role": "\udc00", "content": "x"}), None),
    "a very long name": (chat(USER | {"name": "n" * 1000}), "messages[0].name"),
    "100,000 messages": (chat(*[USER] * 100_000), "messages"),
    "content longer than the context": (chat({"role": "user", "content": "hello " * 100_000}), "prompt"),
    "content just longer than the context": (chat({"role": "user", "content": "hello " * CONTEXT}), "prompt"),
    "nested lists as content": (
        b'{"model": "tiny-llama", "messages": [{"role": "user", "content": [{"type": ' + b"[" * 100_000,
        None,
    ),
    "top_logprobs without logprobs": (chat(top_logprobs=2), "top_logprobs"),
    "21 top_logprobs": (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    "a number as logprobs": (chat(logprobs=2), "logprobs"),
    "max_tokens of 0": (chat(max_tokens=0), "max_tokens"),
    "max_completion_tokens of 0": (chat(max_completion_tokens=0), "max_completion_tokens"),
    "max_completion_tokens beyond the context": (chat(max_completion_tokens=CONTEXT), "max_completion_tokens"),
    "n of a million": (chat(n=10**6), "n"),
    "tools": (chat(tools=[{"type": "function", "function": {"name": "f"}}]), "tools"),
    "a forced tool": (chat(tool_choice="required"), "tool_choice"),
    "a JSON answer": (chat(response_format={"type": "json_object"}), "response_format"),
    "audio": (chat(modalities=["text", "audio"]), "modalities"),
    "earlier tool calls": (
        chat({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}),
        "messages[0].tool_calls",
    ),
    "a chat template": (chat(chat_template="{{ 1 }}"), "chat_template"),
    "other variables of the template": (chat(chat_template_kwargs={"messages": True}), "chat_template_kwargs"),
    "a switch of the template that is text": (
        chat(chat_template_kwargs={"enable_thinking": "yes"}),
        "chat_template_kwargs",
    ),
    "two kinds of generation": (chat(continue_final_message=True, add_generation_prompt=True), "messages"),
    "metadata that is no text": (chat(metadata={"a": 1}), "metadata[...]"),
    "a parameter of completions": (chat(echo=True), "echo"),
}


@pytest.mark.parametrize(("body", "param"), BAD_CHATS.values(), ids=BAD_CHATS)
def test_a_bad_chat_is_refused_at_once(
    body: bytes,
    param: str | None,
    http: httpx.Client,
    client: openai.OpenAI,
    cluster: FakeCluster,
    tokenizer: Tokenizer,
) -> None:
    with a_stream_beside(client, cluster, tokenizer):
        reply = refused_at_once(asking(http, CHAT, body))
    assert reply.status == 400
    assert reply.error["param"] == param
    assert len(cluster.of(PlacementWanted)) == 1, "the stream's alone"


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonl",
        "",
        "\xff",
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_another_content_type_is_refused(
    path: str, content_type: str, http: httpx.Client, cluster: FakeCluster
) -> None:
    body = completion() if path == COMPLETIONS else chat()
    headers = {"Content-Type": content_type.encode("latin-1")}

    def ask() -> Reply:
        answer = http.post(path, content=body, headers=headers)
        return Reply(answer.status_code, dict(answer.headers), answer.content, len(body))

    reply = refused_at_once(ask)
    assert (reply.status, reply.error["code"]) == (415, "unsupported_media_type")
    assert not cluster.of(PlacementWanted)


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON ; charset=utf-8"])
def test_json_is_taken_however_its_type_is_written(content_type: str, http: httpx.Client, cluster: FakeCluster) -> None:
    answer = http.post(COMPLETIONS, content=completion(max_tokens=1), headers={"Content-Type": content_type})
    assert answer.status_code == 200


def test_a_compressed_body_is_refused(http: httpx.Client, cluster: FakeCluster) -> None:
    reply = refused_at_once(asking(http, COMPLETIONS, b"\x1f\x8b" * 100, **{"Content-Encoding": "gzip"}))
    assert (reply.status, reply.error["code"]) == (400, "unsupported_encoding")


def test_a_body_of_100_mb_is_refused_before_it_is_read(
    server: GatewayServer, client: openai.OpenAI, cluster: FakeCluster, tokenizer: Tokenizer
) -> None:
    request = head(COMPLETIONS, f"Content-Length: {HUNDRED_MB}")
    with a_stream_beside(client, cluster, tokenizer):
        reply = refused_at_once(lambda: converse(server, request, iter([])))
        assert (reply.status, reply.error["code"]) == (413, "body_too_large")
        assert reply.headers["connection"] == "close"
        sending = itertools.repeat(b"x" * 65536, HUNDRED_MB // 65536)
        assert refused_at_once(lambda: converse(server, request, sending)).sent < HUNDRED_MB // 2


def test_a_chunked_body_of_100_mb_is_refused_once_it_is_too_long(
    server: GatewayServer, client: openai.OpenAI, cluster: FakeCluster, tokenizer: Tokenizer
) -> None:
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with a_stream_beside(client, cluster, tokenizer):
        reply = refused_at_once(
            lambda: converse(
                server,
                head(COMPLETIONS, "Transfer-Encoding: chunked"),
                itertools.repeat(chunk, HUNDRED_MB // 65536),
            )
        )
    assert (reply.status, reply.error["code"]) == (413, "body_too_large")
    assert Limits().max_body_bytes < reply.sent < HUNDRED_MB // 2


def test_a_client_that_asks_first_need_not_send_what_is_too_long(server: GatewayServer, cluster: FakeCluster) -> None:
    request = head(COMPLETIONS, f"Content-Length: {HUNDRED_MB}", "Expect: 100-continue")
    reply = refused_at_once(lambda: converse(server, request, iter([])))
    assert (reply.status, reply.sent) == (413, 0)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "/docs", 404),
        ("POST", "/v1/completions/", 404),
        ("POST", "//v1/completions", 404),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/Completions", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/%ff%fe%00", 404),
        ("GET", "/v1/models/" + "m" * 10_000, 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/v1/completions", 405),
        ("PUT", "/v1/completions", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/tiny-llama", 405),
        ("POST", "/v1/models", 405),
        ("POST", "/health", 405),
        ("POST", "/metrics", 405),
        ("BREW", "/v1/completions", 405),
    ],
)
def test_wrong_paths_and_methods_are_refused_at_once(
    method: str, path: str, status: int, http: httpx.Client, cluster: FakeCluster
) -> None:
    def ask() -> Reply:
        answer = http.request(method, path)
        return Reply(answer.status_code, dict(answer.headers), answer.content, 0)

    reply = refused_at_once(ask)
    assert reply.status == status
    if status == 405:
        assert reply.headers["allow"] in ("GET", "POST"), "a 405 says what would be right"


def test_a_question_for_the_head_of_what_is_not_there_has_no_body(http: httpx.Client) -> None:
    answer = http.head("/nowhere")
    assert (answer.status_code, answer.content) == (404, b"")


def test_streams_flow_while_bad_requests_rain(
    server: GatewayServer, cluster: FakeCluster, tokenizer: Tokenizer
) -> None:
    """The streams are long, in small chunks, and all the table's bodies come at the same time."""
    cluster.chunk_size = 1
    hostile = [(COMPLETIONS, body) for body, _ in BAD_COMPLETIONS.values()]
    hostile += [(CHAT, body) for body, _ in BAD_CHATS.values()]

    async def stream(client: openai.AsyncOpenAI, first: int) -> str:
        stream = await client.completions.create(model=MODEL, prompt=[first], max_tokens=1500, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def volley() -> tuple[list[str], list[int]]:
        json_type = {"Content-Type": "application/json"}
        limits = httpx.Limits(max_connections=8)
        async with (
            openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
            httpx.AsyncClient(base_url=server.url, headers=json_type, limits=limits, timeout=10) as web,
        ):
            streams = [asyncio.create_task(stream(client, first)) for first in (5, 6, 7)]
            answers = await asyncio.gather(*[web.post(path, content=body) for path, body in hostile])
            return await asyncio.gather(*streams), [answer.status_code for answer in answers]

    texts, statuses = asyncio.run(volley())
    assert texts == [tokenizer.decode(counting([first], 1500)) for first in (5, 6, 7)]
    assert all(400 <= status < 500 for status in statuses)
    assert len(cluster.of(PlacementWanted)) == 3

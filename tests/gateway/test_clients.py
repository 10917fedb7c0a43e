"""Promise: OpenAI's clients, synchronous or not, see the same answers, and errors as the classes that they have for
them."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gateway.choice import Choice
from gateway.core.limits import Limits
from gateway.core.session import SessionTimeouts
from gateway.server import GatewayServer
from gateway.tokenization import Tokenizer
from messages.codec import pack_tokens, unpack_tokens
from messages.common import FailReason
from messages.gateway_to_router import Finished, PlacementWanted
from messages.gateway_to_worker import Abort, Prefill
from messages.ids import Attempt
from messages.router_to_gateway import Rejected, WorkerLost
from messages.sampling import FinishReason
from messages.worker_to_gateway import AttemptFailed, TokenBatch, TokenChunk
from tests.gateway.conftest import MODEL, serving
from tests.gateway.fake_cluster import DECODE, EPOCH, PREFILL, FakeCluster, counting
from tests.gateway.raw import until

HELLO: Any = [{"role": "user", "content": "Say hello"}]


def in_flight(http: httpx.Client) -> int:
    count: int = http.get("/status").json()["sequences_in_flight"]
    return count


@asynccontextmanager
async def async_client(server: GatewayServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=10) as client:
        yield client


def texts_of(chunks: list[Any]) -> dict[int, str]:
    """Each choice's text, of chunks or whole answers of either API."""
    texts: dict[int, str] = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        text = choice.text if hasattr(choice, "text") else (getattr(choice, "delta", None) or choice.message).content
        texts[choice.index] = texts.get(choice.index, "") + (text or "")
    return texts


COMPLETION = {"model": MODEL, "prompt": [5, 6], "max_tokens": 20}
CHAT = {"model": MODEL, "messages": HELLO, "max_completion_tokens": 20}
CASES: dict[str, dict[str, Any]] = {
    "completion": COMPLETION,
    "several": COMPLETION | {"n": 3, "seed": 1},
    "several prompts": COMPLETION | {"prompt": ["one", "two"], "n": 2},
    "logprobs": COMPLETION | {"logprobs": 2},
    "echo": COMPLETION | {"echo": True, "logprobs": 1},
    "several echoes": COMPLETION | {"echo": True, "logprobs": 1, "n": 3, "seed": 1},
    "stop": COMPLETION | {"stop": ["zzz", "qqq"]},
    "chat": CHAT,
    "chat with logprobs": CHAT | {"logprobs": True, "top_logprobs": 2, "n": 2},
    "chat with stop": CHAT | {"stop": "zzz"},
}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_four_ways_to_ask_give_one_answer(
    arguments: dict[str, Any], client: openai.OpenAI, server: GatewayServer, cluster: FakeCluster
) -> None:
    """Synchronous or not, streamed or not: the same texts, ends, log-probabilities and usage."""
    streaming = {"stream": True, "stream_options": {"include_usage": True}}

    def api(client: Any) -> Any:
        return client.chat.completions if "messages" in arguments else client.completions

    async def without_waiting() -> tuple[Any, list[Any]]:
        async with async_client(server) as asynchronous:
            whole = await api(asynchronous).create(**arguments)
            stream = await api(asynchronous).create(**arguments, **streaming)
            return whole, [chunk async for chunk in stream]

    whole = api(client).create(**arguments)
    chunks = list(api(client).create(**arguments, **streaming))
    async_whole, async_chunks = asyncio.run(without_waiting())
    num_choices = len(whole.choices)
    texts, ends = texts_of([whole]), {choice.index: choice.finish_reason for choice in whole.choices}
    assert set(texts) == set(range(num_choices)) and all(texts.values())
    for others in (chunks, async_chunks):
        assert texts_of(others) == texts
        finished = [choice for chunk in others for choice in chunk.choices if choice.finish_reason is not None]
        assert {choice.index: choice.finish_reason for choice in finished} == ends and len(finished) == num_choices
        assert others[-1].usage == whole.usage and others[-1].choices == []
        for index in range(num_choices):
            assert streamed_logprobs(others, index) == entries_of(whole.choices[index].logprobs)
    assert async_whole.model_dump(exclude={"id", "created"}) == whole.model_dump(exclude={"id", "created"})
    assert whole.usage.completion_tokens == 20 * num_choices


def entries_of(logprobs: Any) -> list[Any]:
    if logprobs is None:
        return []
    if hasattr(logprobs, "content"):
        return list(logprobs.content)
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return list(zip(*(getattr(logprobs, name) for name in names), strict=True))


def streamed_logprobs(chunks: list[Any], index: int) -> list[Any]:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return [entry for choice in choices for entry in entries_of(choice.logprobs)]


def test_models_are_listed_for_an_asynchronous_client(server: GatewayServer, cluster: FakeCluster) -> None:
    async def ask() -> list[str]:
        async with async_client(server) as client:
            assert (await client.models.retrieve(MODEL)).object == "model"
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("gpt-5")
            return [model.id async for model in client.models.list()]

    assert asyncio.run(ask()) == [MODEL]


def test_a_hundred_streams_at_once_are_each_their_own(
    server: GatewayServer, cluster: FakeCluster, tokenizer: Tokenizer
) -> None:
    async def stream(client: openai.AsyncOpenAI, first: int) -> str:
        stream = await client.completions.create(model=MODEL, prompt=[first], max_tokens=30, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with async_client(server) as client:
            return await asyncio.gather(*(stream(client, first) for first in range(100)))

    assert asyncio.run(all_of_them()) == [tokenizer.decode(counting([first], 30)) for first in range(100)]


def test_refused_requests_raise_their_own_class(client: openai.OpenAI, cluster: FakeCluster) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt="x", temperature=-1)
    assert (bad.value.param, bad.value.type, bad.value.status_code) == ("temperature", "invalid_request_error", 400)
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=[5] * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="x")
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model=MODEL, prompt="x" * (9 << 20))
    assert (large.value.status_code, large.value.code) == (413, "body_too_large")
    assert not cluster.of(PlacementWanted)


def test_an_asynchronous_client_hears_of_a_refusal_of_its_stream(server: GatewayServer, cluster: FakeCluster) -> None:
    async def ask() -> None:
        async with async_client(server) as client:
            await client.chat.completions.create(model=MODEL, messages=HELLO, n=1000, stream=True)

    with pytest.raises(openai.BadRequestError, match="n must be in"):
        asyncio.run(ask())


@pytest.mark.parametrize("stream", [False, True])
def test_too_many_at_once_are_told_to_come_again(tiny_llama: Path, stream: bool) -> None:
    with (
        serving(tiny_llama, limits=Limits(max_sequences=3)) as (cluster, server),
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        cluster.hold_after = 1
        running = client.completions.create(model=MODEL, prompt="x", n=2, stream=True)
        next(running)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model=MODEL, prompt="x", n=2, stream=stream)
        assert refused.value.response.headers["retry-after"] == "1"
        cluster.release()
        assert len(texts_of(list(running))) == 2
        assert client.completions.create(model=MODEL, prompt="x", n=2).choices[1].text, "there is room again"


@pytest.mark.parametrize("stream", [False, True])
def test_a_cluster_that_never_answers_is_a_server_error(tiny_llama: Path, stream: bool) -> None:
    with (
        serving(tiny_llama, timeouts=SessionTimeouts(placement=0.1)) as (cluster, server),
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        cluster.on_placement = lambda _: None
        with pytest.raises(openai.InternalServerError) as failed:
            client.completions.create(model=MODEL, prompt="x", stream=stream)
        assert (failed.value.status_code, failed.value.code) == (503, "unavailable")
        assert failed.value.response.headers["retry-after"] == "1"
        cluster.wait_for(Finished)


def failing(cluster: FakeCluster, server: GatewayServer) -> None:
    """The worker of the only request says that it can never run it."""
    (order,) = cluster.of(Prefill)
    detail = "it has no room"
    failed = AttemptFailed(
        request=order.request, attempt=order.attempt, worker=DECODE, reason=FailReason.CAPACITY, detail=detail
    )
    cluster.send(server.address, failed)


def test_an_error_before_the_first_token_has_its_status(
    client: openai.OpenAI, server: GatewayServer, cluster: FakeCluster, http: httpx.Client
) -> None:
    cluster.hold_after = 0

    def fail() -> None:
        cluster.wait_for(Prefill)
        failing(cluster, server)

    thread = threading.Thread(target=fail)
    thread.start()
    with pytest.raises(openai.BadRequestError, match="it has no room"):
        client.completions.create(model=MODEL, prompt="x", stream=True)
    thread.join()
    assert in_flight(http) == 0


def test_an_error_in_the_middle_of_a_stream_is_raised_there(
    client: openai.OpenAI, server: GatewayServer, cluster: FakeCluster, tokenizer: Tokenizer, http: httpx.Client
) -> None:
    cluster.hold_after = 4
    stream = client.completions.create(model=MODEL, prompt=[5], max_tokens=20, stream=True)
    text = ""
    while len(text) < len(tokenizer.decode(counting([5], 4))):
        text += next(stream).choices[0].text
    failing(cluster, server)
    with pytest.raises(openai.APIError, match="it has no room"):
        list(stream)
    assert text == tokenizer.decode(counting([5], 4))
    cluster.wait_for(Abort, 2)
    cluster.wait_for(Finished)
    assert in_flight(http) == 0


def test_an_error_in_the_middle_of_a_stream_says_when_to_come_back(
    client: openai.OpenAI, server: GatewayServer, cluster: FakeCluster
) -> None:
    cluster.hold_after = 4
    stream = client.completions.create(model=MODEL, prompt=[5], max_tokens=20, stream=True)
    next(stream)
    order = cluster.of(Prefill)[-1]
    cluster.on_placement = lambda wanted: Rejected(
        request=wanted.request, attempt=wanted.attempt, detail="no worker is there", retry_after=1.5, unavailable=True
    )
    cluster.send(server.address, AttemptFailed(
        request=order.request, attempt=order.attempt, worker=DECODE, reason=FailReason.ENGINE, detail="out of luck"
    ))  # fmt: skip
    with pytest.raises(openai.APIError, match="no worker is there") as failed:
        list(stream)
    assert isinstance(failed.value.body, dict) and failed.value.body["retry_after"] == 2


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_loses_patience_leaves_nothing_behind(
    client: openai.OpenAI, cluster: FakeCluster, http: httpx.Client, chat: bool, stream: bool
) -> None:
    cluster.hold_after = 1 if stream else 0
    arguments: Any = CHAT if chat else COMPLETION
    impatient: Any = client.with_options(timeout=0.2)
    with pytest.raises((openai.APITimeoutError, httpx.ReadTimeout)):  # the client does not wrap those within a stream
        list((impatient.chat.completions if chat else impatient.completions).create(**arguments, stream=stream))
    (finished,) = cluster.wait_for(Finished)
    aborts = cluster.of(Abort)  # they went before
    assert len(aborts) == (2 if cluster.of(Prefill) else 0), "on a very busy machine it did not get that far"
    assert {(abort.request, abort.attempt) for abort in aborts} <= {(finished.request, Attempt(1))}
    assert in_flight(http) == 0


def test_an_asynchronous_request_that_is_cancelled_is_aborted(
    server: GatewayServer, cluster: FakeCluster, http: httpx.Client
) -> None:
    cluster.hold_after = 0

    async def cancel() -> None:
        async with async_client(server) as client:
            request = asyncio.create_task(client.completions.create(model=MODEL, prompt="x"))
            await asyncio.to_thread(cluster.wait_for, Prefill)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request

    asyncio.run(cancel())
    cluster.wait_for(Abort, 2)
    cluster.wait_for(Finished)
    assert in_flight(http) == 0


@pytest.mark.parametrize("lost", [PREFILL, DECODE])
def test_a_stream_survives_its_worker_and_a_zombie(
    client: openai.OpenAI, server: GatewayServer, cluster: FakeCluster, tokenizer: Tokenizer, lost: Any
) -> None:
    """The client sees no gap and no repeat; what the old attempt still sends is stopped."""
    cluster.hold_after = 1 if lost == PREFILL else 4
    stream = client.completions.create(model=MODEL, prompt=[5], max_tokens=20, stream=True, logprobs=0)
    chunks = [next(stream)]
    while len(texts_of(chunks)[0]) < len(tokenizer.decode(counting([5], cluster.hold_after))):
        chunks.append(next(stream))
    (first,) = cluster.of(Prefill)
    cluster.send(server.address, WorkerLost(worker=lost, epoch=EPOCH, detail="why", dead=True))
    second = next(order for order in cluster.wait_for(Prefill, 2) if order.attempt == 2)
    assert cluster.of(PlacementWanted)[1].avoid == (lost,)
    generated = unpack_tokens(second.generation.generated).tolist()
    assert generated == counting([5], 4 if lost == DECODE else 1)
    zombie = TokenChunk(first.request, first.attempt, len(generated), pack_tokens([999] * 3), finish=FinishReason.STOP)
    cluster.send(server.address, TokenBatch(DECODE, (zombie,)))
    cluster.release()
    chunks += list(stream)
    assert texts_of(chunks) == {0: tokenizer.decode(counting([5], 20))}
    assert [entry[1] for entry in streamed_logprobs(chunks, 0)] == [-token / 1000 for token in counting([5], 20)]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert {abort.attempt for abort in cluster.wait_for(Abort, 2)} == {Attempt(1)}


def test_a_bug_that_one_request_hits_fails_that_request_only(
    client: openai.OpenAI,
    cluster: FakeCluster,
    http: httpx.Client,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster.hold_after = 4
    beside = client.completions.create(model=MODEL, prompt=[5], max_tokens=20, stream=True)
    text = ""
    while len(text) < len(tokenizer.decode(counting([5], 4))):  # nothing of it is under way when the bug is there
        text += next(beside).choices[0].text
    cluster.hold_after = None
    for broken in ("deliver", "ended"):
        with monkeypatch.context() as patch:
            patch.setattr(Choice, broken, lambda *_: 1 / 0)
            with pytest.raises(openai.InternalServerError, match="internal error") as failed:
                client.completions.create(model=MODEL, prompt=[7], max_tokens=3)
        assert failed.value.code == "internal_error"
    cluster.release()
    text += "".join(chunk.choices[0].text for chunk in beside)
    assert text == tokenizer.decode(counting([5], 20))
    # One whose own end is broken says so twice, so four: which three requests, not how many messages.
    finished = cluster.wait_for(Finished, 4)
    assert {message.request for message in finished} == {message.request for message in cluster.of(PlacementWanted)}
    assert in_flight(http) == 0


def test_small_answers_do_not_wait_for_the_clients_ack(http: httpx.Client) -> None:
    """Nagle's algorithm would hold the second write of each answer back until the client's delayed ack, 40 ms later."""
    fastest = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        http.get("/health")
        fastest = min(fastest, time.perf_counter() - began)
    assert fastest < 0.03


def test_a_gateway_that_stops_takes_nothing_new_and_ends_what_it_has(tiny_llama: Path, tokenizer: Tokenizer) -> None:
    with (
        serving(tiny_llama, drain=30.0) as (cluster, server),
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
        httpx.Client(base_url=server.url) as http,
    ):
        until(lambda: http.get("/ready").status_code == 200, "the gateway is ready")
        cluster.hold_after = 4
        stream = client.completions.create(model=MODEL, prompt=[5], max_tokens=20, stream=True)
        text = next(stream).choices[0].text
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        until(lambda: http.get("/ready").status_code == 503, "the gateway drains")
        with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
            client.completions.create(model=MODEL, prompt=[5])
        assert refused.value.response.headers["retry-after"] == "1"
        cluster.release()
        text += "".join(chunk.choices[0].text for chunk in stream)
        stopping.join()
        assert text == tokenizer.decode(counting([5], 20))
        with pytest.raises(httpx.ConnectError):
            http.get("/health")


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_end_in_time_hears_of_the_stop(tiny_llama: Path, stream: bool) -> None:
    with (
        serving(tiny_llama) as (cluster, server),
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        cluster.hold_after = 4
        stopping = threading.Thread(target=lambda: (cluster.wait_for(Prefill), server.stop()))
        stopping.start()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(client.completions.create(model=MODEL, prompt=[5], max_tokens=20, stream=stream))
        stopping.join()
        assert cluster.wait_for(Abort, 2) and cluster.wait_for(Finished)

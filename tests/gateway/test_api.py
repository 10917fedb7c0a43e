"""Promise: what OpenAI's own client sends is answered as OpenAI's API answers it."""

import json
import re
from typing import Any

import httpx
import openai
import pytest

from gateway.choice import Choice, Echo
from gateway.core.session import Deliver
from gateway.core.stop_strings import StopStrings
from gateway.metrics import Metrics
from gateway.tokenization import Tokenizer
from messages.codec import unpack_tokens
from messages.gateway_to_router import Finished, Prefilled
from messages.gateway_to_worker import Abort, EndAck, Prefill
from messages.router_to_gateway import Rejected
from messages.sampling import FinishReason
from tests.gateway.conftest import MODEL
from tests.gateway.fake_cluster import KV_BYTES, FakeCluster, counting, logprobs_of
from tests.gateway.raw import until

HELLO = [{"role": "user", "content": "Say hello"}]


def said(tokenizer: Tokenizer, text: str) -> Any:
    """A script that says ``text``, then ends."""
    return lambda _prompt, _most: [*tokenizer.encode(text, add_special_tokens=False), 2]


def sampling(cluster: FakeCluster) -> list[Any]:
    return [order.generation.sampling for order in cluster.of(Prefill)]


def test_a_completion_streams_the_tokens_text(
    client: openai.OpenAI, cluster: FakeCluster, tokenizer: Tokenizer
) -> None:
    chunks = list(client.completions.create(model=MODEL, prompt="Hello there", max_tokens=10, stream=True))
    prompt = tokenizer.encode("Hello there", add_special_tokens=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == tokenizer.decode(counting(prompt, 10))
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert len({chunk.id for chunk in chunks}) == 1
    (order,) = cluster.of(Prefill)
    assert unpack_tokens(order.generation.prompt).tolist() == prompt
    cluster.wait_for(Prefilled)
    cluster.wait_for(EndAck)
    cluster.wait_for(Finished)


def test_a_completion_in_one_piece_has_text_and_usage(
    client: openai.OpenAI, cluster: FakeCluster, tokenizer: Tokenizer
) -> None:
    answer = client.completions.create(model=MODEL, prompt=[5, 6, 7])
    assert answer.choices[0].text == tokenizer.decode(counting([5], 16)), "16 tokens by default"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 16, 19)


def test_a_chat_answers_as_assistant_and_stops_at_the_end_token(
    client: openai.OpenAI, cluster: FakeCluster, tokenizer: Tokenizer
) -> None:
    cluster.script = said(tokenizer, "Hello, 👩‍👩‍👧!")
    answer = client.chat.completions.create(model=MODEL, messages=HELLO)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "Hello, 👩‍👩‍👧!"
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].finish_reason == "stop"
    (order,) = cluster.of(Prefill)
    prompt = unpack_tokens(order.generation.prompt).tolist()
    assert prompt == tokenizer.encode(
        "<|im_start|>user\nSay hello<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
    )
    assert order.generation.sampling.max_tokens == 4096 - len(prompt), "the rest of the context by default"


def test_a_chat_streams_deltas_and_usage_when_asked(
    client: openai.OpenAI, cluster: FakeCluster, tokenizer: Tokenizer
) -> None:
    cluster.script = said(tokenizer, "A 👩‍👩‍👧 here")
    stream = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,  # type: ignore[arg-type]
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "A 👩‍👩‍👧 here"
    assert not any("\ufffd" in (chunk.choices[0].delta.content or "") for chunk in chunks)
    assert last.choices == [] and last.usage is not None
    assert last.usage.completion_tokens == len(cluster.script([], 0))
    assert all(chunk.usage is None for chunk in chunks)


def test_content_parts_of_text_are_joined(client: openai.OpenAI, cluster: FakeCluster, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}], max_tokens=1)  # type: ignore[list-item,misc]
    prompt = unpack_tokens(cluster.of(Prefill)[0].generation.prompt).tolist()
    assert "a\nb" in tokenizer.decode(prompt)


def test_labels_and_what_asks_for_nothing_are_taken(client: openai.OpenAI, cluster: FakeCluster) -> None:
    arguments: Any = {"model": MODEL, "messages": HELLO, "max_tokens": 1}
    labels: Any = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"a": "b"}}
    inert: Any = {"store": False, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "stop": None}
    assert client.chat.completions.create(**arguments, **labels, **inert).choices[0].finish_reason == "length"


def test_n_choices_are_n_sequences_with_consecutive_seeds(client: openai.OpenAI, cluster: FakeCluster) -> None:
    answer = client.completions.create(model=MODEL, prompt="x", n=3, seed=7, max_tokens=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(params.seed for params in sampling(cluster)) == [7, 8, 9]
    assert len({order.request for order in cluster.of(Prefill)}) == 3
    assert answer.usage is not None and answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens == len(cluster.of(Prefill)[0].generation.prompt) // 4


def test_without_a_seed_each_choice_draws_its_own(client: openai.OpenAI, cluster: FakeCluster) -> None:
    client.completions.create(model=MODEL, prompt="x", n=3, max_tokens=1)
    assert len({params.seed for params in sampling(cluster)}) == 3


@pytest.mark.parametrize(("prompt", "count"), [(["a", "b"], 2), ([[1, 2], [3]], 2), ([1, 2, 3], 1), (["a", [5, 6]], 2)])
def test_every_form_of_prompt_is_taken(http: httpx.Client, cluster: FakeCluster, prompt: Any, count: int) -> None:
    answer = http.post("/v1/completions", json={"model": MODEL, "prompt": prompt, "n": 2, "max_tokens": 1})
    assert [choice["index"] for choice in answer.json()["choices"]] == list(range(2 * count))


def test_interleaved_streams_of_several_choices_are_told_apart_by_index(
    client: openai.OpenAI, cluster: FakeCluster, tokenizer: Tokenizer
) -> None:
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(model=MODEL, prompt=[[5], [300]], max_tokens=9, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: tokenizer.decode(counting([5], 9)), 1: tokenizer.decode(counting([300], 9))}


def test_sampling_parameters_reach_the_worker(client: openai.OpenAI, cluster: FakeCluster) -> None:
    client.completions.create(
        model=MODEL,
        prompt="x",
        max_tokens=4,
        temperature=0.5,
        top_p=0.25,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"5": 10},
        seed=-1,
        extra_body={
            "top_k": -1,
            "min_p": 0.1,
            "repetition_penalty": 1.5,
            "stop_token_ids": [9],
            "ignore_eos": True,
        },
    )
    (params,) = sampling(cluster)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.25, 0, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.5)
    assert (params.logit_bias, params.stop_token_ids, params.ignore_eos) == ({5: 10}, (9,), True)
    assert params.seed == 2**63 - 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("include", "text"), [(False, "one two "), (True, "one two three")])
def test_a_stop_string_ends_the_text_and_the_work(
    client: openai.OpenAI, cluster: FakeCluster, tokenizer: Tokenizer, stream: bool, include: bool, text: str
) -> None:
    script = tokenizer.encode("one two three four five six seven eight nine ten", add_special_tokens=False)
    cluster.script = lambda _prompt, most: (script * 100)[:most]
    cluster.hold_after = len(script) * 2
    answer: Any = client.completions.create(
        model=MODEL,
        prompt="x",
        max_tokens=1000,
        stop=["nothing", "three"],
        stream=stream,
        extra_body={"include_stop_str_in_output": include},
    )
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "stop"
    cluster.wait_for(Abort)
    cluster.wait_for(Finished)
    if not stream:
        assert answer.usage.completion_tokens == len(tokenizer.encode("one two three", add_special_tokens=False))


def test_completion_logprobs(client: openai.OpenAI, cluster: FakeCluster, tokenizer: Tokenizer) -> None:
    answer = client.completions.create(model=MODEL, prompt=[300], max_tokens=4, logprobs=2)
    tokens = counting([300], 4)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.top_logprobs is not None
    assert logprobs.tokens == [tokenizer.token_text(token)[0] for token in tokens]
    assert logprobs.token_logprobs == [-token / 1000 for token in tokens]
    assert logprobs.top_logprobs[0][logprobs.tokens[0]] == -tokens[0] / 1000
    assert len(logprobs.top_logprobs[0]) == 2
    assert logprobs.text_offset is not None and logprobs.text_offset[0] == 0


def test_chat_logprobs(client: openai.OpenAI, cluster: FakeCluster, tokenizer: Tokenizer) -> None:
    cluster.script = said(tokenizer, "👩")
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=3)  # type: ignore[arg-type]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert bytes(byte for entry in logprobs.content[:-1] for byte in entry.bytes or []) == "👩".encode()
    assert logprobs.content[-1].token == "<|im_end|>"
    assert len(logprobs.content[0].top_logprobs) == 3


def test_streamed_logprobs_are_those_of_the_whole_answer(client: openai.OpenAI, cluster: FakeCluster) -> None:
    chunks = list(client.completions.create(model=MODEL, prompt=[9], max_tokens=8, logprobs=1, stream=True))
    whole = client.completions.create(model=MODEL, prompt=[9], max_tokens=8, logprobs=1).choices[0].logprobs
    assert whole is not None
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        parts = [getattr(chunk.choices[0].logprobs, name) for chunk in chunks if chunk.choices[0].logprobs]
        assert [entry for part in parts for entry in part] == getattr(whole, name)


@pytest.mark.parametrize("prompt", ["Hello there", [300, 301, 302]])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_begins_with_the_prompt_and_its_logprobs(
    client: openai.OpenAI, cluster: FakeCluster, tokenizer: Tokenizer, prompt: Any, stream: bool
) -> None:
    answer: Any = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=2, echo=True, logprobs=1, stream=stream
    )
    ids = tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices) == tokenizer.decode(ids + counting(ids, 2))
    values = [value for choice in choices for value in choice.logprobs.token_logprobs]
    assert values == [None, *(-token / 1000 for token in ids[1:] + counting(ids, 2))]


def test_echo_of_no_new_tokens_scores_the_prompt(client: openai.OpenAI, cluster: FakeCluster) -> None:
    answer = client.completions.create(model=MODEL, prompt=[300, 301], max_tokens=0, echo=True, logprobs=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs == [None, -0.301]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_the_choices_of_a_prompt_share_its_scores(
    client: openai.OpenAI, cluster: FakeCluster, tokenizer: Tokenizer, stream: bool
) -> None:
    prompts = [[300, 301, 302], [400, 401]]
    answer: Any = client.completions.create(
        model=MODEL, prompt=prompts, n=3, max_tokens=2, echo=True, logprobs=1, stream=stream
    )
    choices = [choice for part in (answer if stream else [answer]) for choice in part.choices]
    for index in range(6):
        prompt = prompts[index // 3]
        own = [choice for choice in choices if choice.index == index]
        assert "".join(choice.text for choice in own) == tokenizer.decode(prompt + counting(prompt, 2))
        values = [value for choice in own for value in choice.logprobs.token_logprobs]
        assert values == [None, *(-token / 1000 for token in prompt[1:] + counting(prompt, 2))]
    scored = [
        order.generation for order in cluster.of(Prefill) if order.generation.sampling.prompt_logprobs is not None
    ]
    assert sorted(unpack_tokens(generation.prompt).tolist() for generation in scored) == prompts, "each prompt once"


def test_a_choice_that_is_ready_before_its_prompts_scores_waits_for_them() -> None:
    echo = Echo("p", [7, 8], logprobs=True)
    first, second = (
        Choice(
            index, Words(), StopStrings((), include=False), include_stop=False, logprobs=True, echo=echo,
            is_first=index == 0, arrived=0.0, changed=lambda: None, metrics=Metrics(),
        )
        for index in range(2)
    )  # fmt: skip
    second.deliver(Deliver([3], logprobs_of([3], 0), None, FinishReason.LENGTH), 1.0)
    second.ended(FinishReason.LENGTH, 1.0)
    assert second.fresh and second.take(even_without_text=True) is None
    assert second.fresh, "it is asked again when anything happens"
    first.deliver(Deliver([4], logprobs_of([4], 0), logprobs_of([8], 0), None), 2.0)
    for choice, token in ((first, 4), (second, 3)):
        piece = choice.take(even_without_text=True)
        assert piece is not None and piece.first and piece.text == f"p{token}"
        assert [(entry.token, entry.logprob) for entry in piece.logprobs] == [
            (7, None), (8, -0.008), (token, -token / 1000),
        ]  # fmt: skip


class Words:
    """A detokenizer that writes the ids."""

    def step(self, token: int) -> str:
        return str(token)

    def flush(self) -> str:
        return ""


@pytest.mark.parametrize("stream", [False, True])
def test_echo_of_no_new_tokens_without_logprobs_scores_nothing(
    client: openai.OpenAI, cluster: FakeCluster, stream: bool
) -> None:
    answer: Any = client.completions.create(
        model=MODEL, prompt="Hello there", max_tokens=0, echo=True, n=2, stream=stream
    )
    choices = [choice for part in (answer if stream else [answer]) for choice in part.choices]
    for index in range(2):
        own = [choice for choice in choices if choice.index == index]
        assert "".join(choice.text for choice in own) == "Hello there" and own[-1].finish_reason == "length"
    assert {order.generation.sampling.prompt_logprobs for order in cluster.wait_for(Prefill, 2)} == {None}


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_are_returned_when_asked(http: httpx.Client, cluster: FakeCluster, stream: bool) -> None:
    body = {"model": MODEL, "prompt": [5, 6], "max_tokens": 7, "return_token_ids": True, "stream": stream}
    answers = (
        events(http.post("/v1/completions", json=body).text)
        if stream
        else [http.post("/v1/completions", json=body).json()]
    )
    assert answers[0]["choices"][0]["prompt_token_ids"] == [5, 6]
    assert [token for answer in answers for token in answer["choices"][0]["token_ids"]] == counting([5], 7)


def events(text: str) -> list[Any]:
    """The events of a whole SSE answer, which must end with [DONE]."""
    *found, end = text.split("\n\n")
    lines = [event.split("\n") for event in found]
    assert not end and all(id.startswith("id: ") and data.startswith("data: ") for id, data in lines)
    datas = [data.removeprefix("data: ") for _, data in lines]
    assert datas.pop() == "[DONE]"
    return [json.loads(data) for data in datas]


@pytest.mark.parametrize("stream", [False, True])
def test_a_traced_request_is_told_who_ran_it(http: httpx.Client, cluster: FakeCluster, stream: bool) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 7, "stream": stream, "n": 2}
    answer = http.post("/v1/chat/completions", json=body, headers={"X-Baton-Trace": "1"})
    choices = [chunk["choices"][0] for chunk in events(answer.text)] if stream else answer.json()["choices"]
    batons = [choice["baton"] for choice in choices if choice["finish_reason"]]
    assert len(batons) == 2
    for baton in batons:
        assert (baton["prefill_worker"], baton["decode_worker"]) == ("prefill-0", "decode-0")
        assert (baton["attempts"], baton["kv_bytes"]) == (1, KV_BYTES)
        assert 0 <= baton["ttft_ms"] < 10_000 and 0 <= baton["tpot_ms"] < 10_000
    assert "baton" not in http.post("/v1/chat/completions", json=body).text


def test_the_request_id_is_the_servers(http: httpx.Client, cluster: FakeCluster) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    answers = [http.post("/v1/completions", json=body, headers={"X-Request-Id": "mine"}) for _ in range(2)]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 2 and all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in ids)
    assert answers[0].json()["id"] == "cmpl-" + answers[0].headers["x-request-id"]


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "baton"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("retry_after", "status"), [(1.5, openai.RateLimitError), (None, openai.BadRequestError)], ids=["busy", "too big"]
)
def test_a_rejected_request_has_its_status_before_the_first_byte(
    client: openai.OpenAI, cluster: FakeCluster, stream: bool, retry_after: float | None, status: type[Any]
) -> None:
    cluster.on_placement = lambda wanted: Rejected(
        request=wanted.request, attempt=wanted.attempt, detail="no room", retry_after=retry_after
    )
    with pytest.raises(status) as raised:
        client.completions.create(model=MODEL, prompt="x", stream=stream)
    assert raised.value.response.headers.get("retry-after") == ("2" if retry_after else None)
    assert "no room" in raised.value.message
    cluster.wait_for(Finished)


def test_health_readiness_status_version(http: httpx.Client, cluster: FakeCluster) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert "version" in http.get("/version").json()
    until(lambda: http.get("/ready").status_code == 200, "the gateway is ready")
    status = http.get("/status").json()
    assert [worker["worker"] for worker in status["cluster"]["workers"]] == ["prefill-0", "decode-0"]
    assert status["cluster"]["workers"][0]["blocks"] == {"free": 90, "held": 8, "cached": 2, "total": 100}
    cluster.ready = False
    until(lambda: http.get("/ready").status_code == 503, "the router has said that it lacks a role")


def test_metrics_show_requests_latencies_and_workers(http: httpx.Client, cluster: FakeCluster) -> None:
    http.post("/v1/completions", json={"model": MODEL, "prompt": [1, 2], "max_tokens": 5})
    http.get("/nowhere")
    text = http.get("/metrics").text
    for line in (
        'baton_http_responses_total{code="200",route="/v1/completions"}',
        'baton_http_responses_total{code="404",route="other"}',
        'baton_sequences_finished_total{reason="length"}',
        "baton_time_to_first_token_seconds_count",
        "baton_time_per_output_token_seconds_count",
        "baton_inter_token_latency_seconds_count",
        "baton_request_latency_seconds_count",
        "baton_generation_tokens_total",
        "baton_sequences_in_flight 0.0",
        'baton_kv_blocks{role="decode",state="held",worker="decode-0"} 8.0',
        'baton_worker_waiting{role="prefill",worker="prefill-0"} 2.0',
    ):
        assert line in text, line

"""Promise: a gateway that speaks to engines by vLLM's gRPC stands in front of Baton as it is, with OpenAI's API."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.peers.conftest import free_port, program

WITHIN = 60.0
CHAT: dict[str, Any] = {
    "model": "tiny-llama",
    "messages": [{"role": "user", "content": "Tell me a story"}],
    "max_completion_tokens": 30,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def smg(grpc_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """It is told nothing but where Baton is: the tokenizer, too, comes from there."""
    port, log = free_port(), tmp_path_factory.mktemp("smg") / "log"
    command: list[str | Path] = [program("smg", "smg"), "launch", "--worker-urls", f"grpc://{grpc_address}"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=own)
    try:
        url, give_up = f"http://127.0.0.1:{port}/v1", time.monotonic() + WITHIN
        while not knows_the_model(url):
            assert process.poll() is None and time.monotonic() < give_up, log.read_text()
            time.sleep(0.1)
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            yield client
    finally:
        process.kill()
        process.wait()


def knows_the_model(url: str) -> bool:
    try:
        return "tiny-llama" in httpx.get(f"{url}/models").text
    except httpx.TransportError:
        return False


@pytest.fixture
def direct(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_smg_answers_chats_as_baton_does(smg: openai.OpenAI, direct: openai.OpenAI) -> None:
    here, there = (client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2) for client in (smg, direct))
    assert here.choices[0].message.content and here.choices[0].message.content == there.choices[0].message.content
    assert here.choices[0].finish_reason == there.choices[0].finish_reason
    assert here.usage and there.usage and here.usage.completion_tokens == there.usage.completion_tokens == 30
    assert here.usage.prompt_tokens == there.usage.prompt_tokens
    logprobs = [
        [round(entry.logprob, 3) for entry in answer.choices[0].logprobs.content or ()]
        for answer in (here, there)
        if answer.choices[0].logprobs
    ]
    assert len(logprobs[0]) == 30 and logprobs[0] == pytest.approx(logprobs[1], abs=0.002)


def test_smg_streams_chats(smg: openai.OpenAI, direct: openai.OpenAI) -> None:
    whole = direct.chat.completions.create(**CHAT).choices[0].message.content
    stream = smg.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(texts) == whole and len(texts) > 5
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 30


def test_smg_completes_prompts_and_stops(smg: openai.OpenAI, direct: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny-llama", "prompt": "Once upon a time", "max_tokens": 30, "temperature": 0}
    here, there = (client.completions.create(**asked).choices[0].text for client in (smg, direct))
    assert here and here == there
    stop = there[len(there) // 2 :][:4]
    stopped = smg.completions.create(**asked, stop=[stop]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (there[: there.index(stop)], "stop")
    several = smg.chat.completions.create(**CHAT | {"temperature": 1}, n=3)
    assert [choice.index for choice in several.choices] == [0, 1, 2]


def test_smg_hears_what_cannot_be_done(smg: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="json_schema is not supported"):
        smg.chat.completions.create(**CHAT, response_format={"type": "json_object"})
    with pytest.raises(openai.BadRequestError, match="context"):
        smg.completions.create(model="tiny-llama", prompt="Once", max_tokens=100_000)


def test_who_leaves_smg_frees_what_baton_held(smg: openai.OpenAI, url: str) -> None:
    def in_flight() -> int:
        return int(httpx.get(url + "/status").json()["sequences_in_flight"])

    endless = CHAT | {"max_completion_tokens": 3000, "extra_body": {"ignore_eos": True}}
    stream = smg.chat.completions.create(**endless, stream=True)
    next(stream)
    assert in_flight() == 1
    stream.close()
    give_up = time.monotonic() + 5
    while in_flight():
        assert time.monotonic() < give_up
        time.sleep(0.05)

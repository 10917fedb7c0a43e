"""Promise: from YAML to tokens on a client's screen, over Ray, the KV moving between processes: the right tokens."""

import asyncio
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import Running, wait_until_idle
from tests.relay_cases import OUTPUT_TOKENS, Case, relay_cases

pytestmark = pytest.mark.ray
AT_ONCE = 32
BLOCK = 16
KV_BYTES = 96 << 10
"""Of one block of the bundled model in fp32: 6 layers x (K, V) x 4 heads x 16 tokens x 32 x 4 bytes."""


async def answer(client: openai.AsyncOpenAI, case: Case, *, stream: bool) -> tuple[list[int], dict[str, object]]:
    """Token ids and the trace of one request."""
    wanted = {"return_token_ids": True, "ignore_eos": True}
    call = client.completions.create(
        model="tiny-llama", prompt=case.prompt, max_tokens=OUTPUT_TOKENS, temperature=0, stream=stream,
        extra_body=wanted, extra_headers={"X-Baton-Trace": "1"},
    )  # fmt: skip
    if not stream:
        choice = (await call).choices[0]
        return choice.token_ids, choice.baton
    tokens, trace = [], None
    async for chunk in await call:
        for choice in chunk.choices:
            tokens += choice.token_ids
            trace = getattr(choice, "baton", None) or trace
    assert trace is not None
    return tokens, trace


async def answers(url: str, cases: list[Case]) -> list[tuple[list[int], dict[str, object]]]:
    """All of them, 32 at a time, streamed and not by turns."""
    free = asyncio.Semaphore(AT_ONCE)
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=120) as client:

        async def one(number: int, case: Case) -> tuple[list[int], dict[str, object]]:
            async with free:
                return await answer(client, case, stream=number % 2 == 0)

        return await asyncio.gather(*(one(number, case) for number, case in enumerate(cases)))


@pytest.mark.parametrize("cluster", ["shm", "zmq", "two-to-one", "one-to-two", "colocated"], indirect=True)
def test_sixty_prompts_over_http_get_the_tokens_of_transformers(cluster: Running, tiny_llama: Path) -> None:
    cases = list(relay_cases(tiny_llama))
    got = asyncio.run(answers(cluster.url, cases))
    assert [tokens for tokens, _ in got] == [case.answer for case in cases]
    for case, (_, trace) in zip(cases, got, strict=True):
        blocks = -(-len(case.prompt) // BLOCK)
        if cluster.kind == "colocated":
            assert (trace["prefill_worker"], trace["kv_bytes"]) == (trace["decode_worker"], 0)
        else:
            assert (trace["prefill_worker"][:7], trace["decode_worker"][:6]) == ("prefill", "decode")
            assert trace["kv_bytes"] == blocks * KV_BYTES
    busy = {trace["decode_worker"] for _, trace in got}
    assert len(busy) == 2, "least load puts requests on both"
    wait_until_idle(cluster, within=5)

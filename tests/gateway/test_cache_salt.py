"""Promise: KV is shared within one tenant and one salt only, and the answer says how much of the prompt it was."""

import itertools

import httpx
import openai
import pytest

from gateway.core.salts import cache_salt
from messages.gateway_to_worker import Prefill
from tests.gateway.conftest import MODEL
from tests.gateway.fake_cluster import FakeCluster


def test_two_requests_have_a_salt_in_common_only_if_tenant_and_wish_are_the_same() -> None:
    wishes = [("a", ""), ("a", "b"), ("ab", ""), ("", "ab"), ("a", "\0b"), ("b", "a")]
    salts = [cache_salt(*wish) for wish in wishes]
    assert all(len(salt) == 32 for salt in salts)
    assert all(one != other for one, other in itertools.combinations(salts, 2))
    assert salts == [cache_salt(*wish) for wish in wishes]


def test_the_salt_goes_to_the_workers(client: openai.OpenAI, cluster: FakeCluster) -> None:
    for salt in (None, "mine", "mine", "theirs"):
        client.completions.create(
            model=MODEL, prompt=[5], max_tokens=2, extra_body={"cache_salt": salt} if salt else {}
        )
    none, mine, again, theirs = (order.generation.cache_salt for order in cluster.of(Prefill))
    assert mine == again and len({none, mine, theirs}) == 3 and len(none) == 32


@pytest.mark.parametrize("salt", ["", "x" * 257, "x" * 1_000_000, "a\0b", "a\nb", 5, ["a"]])
def test_a_salt_that_is_no_short_text_is_refused(http: httpx.Client, salt: object) -> None:
    body = {"model": MODEL, "prompt": [5], "cache_salt": salt}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "cache_salt"


def test_usage_tells_how_many_tokens_of_each_prompt_were_cached(client: openai.OpenAI, cluster: FakeCluster) -> None:
    cluster.cached_tokens = 2
    answer = client.completions.create(model=MODEL, prompt=[[5, 6, 7], [8, 9, 10]], max_tokens=2, n=3)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4, "a prompt counts once"
    stream = client.completions.create(
        model=MODEL, prompt=[5, 6, 7], max_tokens=2, stream=True, stream_options={"include_usage": True}
    )
    usage = [chunk.usage for chunk in stream][-1]
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 2

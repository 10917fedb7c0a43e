"""Promise: what OpenAI's own client sends is answered as OpenAI's API answers it."""

import openai

from gateway.tokenization import Tokenizer
from messages.codec import unpack_tokens
from messages.gateway_to_router import Finished, Prefilled
from messages.gateway_to_worker import EndAck, Prefill
from tests.gateway.conftest import MODEL
from tests.gateway.fake_cluster import FakeCluster, counting


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

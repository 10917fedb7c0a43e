"""Promise: `langchain-openai` talks, streams and completes with Baton as with OpenAI."""

import json
from pathlib import Path

from tests.peers.conftest import program, run

SCRIPT = Path(__file__).with_name("langchain_client.py")


def test_langchain_talks_streams_and_completes(url: str) -> None:
    said = json.loads(run(program("langchain", "python"), SCRIPT, url + "/v1").splitlines()[-1])
    assert said["invoked"] and said["invoked"] == said["streamed"] == said["asynchronous"]
    assert said["usage"]["output_tokens"] == said["streamed_usage"]["output_tokens"] == 12
    assert said["finish"] == "length"
    assert len(said["batch"]) == 3 and all(said["batch"])
    assert said["completion"] and said["logprobs"] == 12

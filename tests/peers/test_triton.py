"""Promise: Triton's own client asks, streams and hears of errors as it does at a Triton with a vLLM backend."""

import json
from pathlib import Path

import httpx

from tests.peers.conftest import program, run

SCRIPT = Path(__file__).with_name("triton_client.py")


def test_tritonclient_asks_and_streams(url: str, grpc_address: str) -> None:
    said = json.loads(run(program("triton", "python"), SCRIPT, grpc_address).splitlines()[-1])
    body = {"model": "tiny-llama", "prompt": "Once upon a time", "max_tokens": 30, "temperature": 0}
    text = httpx.post(url + "/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    assert said["live"] and said["ready"] and said["server"] == "baton"
    assert {"text_input", "stream", "sampling_parameters"} <= set(said["inputs"])
    assert (said["whole"], said["id"], said["count"]) == ("Once upon a time" + text, "mine", 30)
    assert "".join(said["parts"]) == text and len(said["parts"]) > 5
    assert said["asynchronous"] == [text] * 3
    assert "no_such_thing" in said["error"]
    assert "NOT_FOUND" in said["refused"]

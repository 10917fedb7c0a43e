"""Runs in the environment of tritonclient: prints what it got, as JSON."""

import asyncio
import json
import queue
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

ADDRESS, MODEL, PROMPT = sys.argv[1], "tiny-llama", "Once upon a time"
FINAL = "triton_final_response"


def tensor(name: str, value: Any, datatype: str) -> triton.InferInput:
    made = triton.InferInput(name, [1], datatype)
    made.set_data_from_numpy(np.array([value], dtype={"BYTES": np.object_, "BOOL": bool, "INT32": np.int32}[datatype]))
    return made


def inputs(stream: bool, **sampling: Any) -> list[triton.InferInput]:
    """As the client of Triton's vLLM backend makes them."""
    return [
        tensor("text_input", PROMPT.encode(), "BYTES"),
        tensor("stream", stream, "BOOL"),
        tensor("sampling_parameters", json.dumps({"temperature": "0"} | sampling).encode(), "BYTES"),
    ]


def text(result: Any) -> str:
    return "".join(part.decode() for part in result.as_numpy("text_output"))


client = triton.InferenceServerClient(ADDRESS)
said: dict[str, Any] = {
    "live": client.is_server_live(),
    "ready": client.is_server_ready() and client.is_model_ready(MODEL),
    "server": client.get_server_metadata(as_json=True)["name"],
    "inputs": [each["name"] for each in client.get_model_metadata(MODEL, as_json=True)["inputs"]],
}
one_piece = [*inputs(False, max_tokens="30"), tensor("return_num_output_tokens", True, "BOOL")]
whole = client.infer(MODEL, one_piece, request_id="mine")
said |= {"whole": text(whole), "id": whole.get_response().id, "count": int(whole.as_numpy("num_output_tokens")[0])}

arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
client.start_stream(lambda result, error: arrived.put((result, error)))
client.async_stream_infer(
    MODEL, inputs(True), request_id="7", enable_empty_final_response=True, parameters={"max_tokens": 30}
)
parts, final = [], False
while not final:
    result, error = arrived.get(timeout=30)
    assert error is None, error
    parts.append(text(result))
    final = result.get_response().parameters[FINAL].bool_param
client.async_stream_infer(MODEL, inputs(True, no_such_thing=1))
_, error = arrived.get(timeout=30)
said |= {"parts": parts, "error": str(error)}
client.stop_stream()
try:
    client.infer("no-such-model", inputs(False))
except InferenceServerException as refused:
    said["refused"] = refused.status()
client.close()


async def alone() -> list[str]:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for number in range(3):
            yield {"model_name": MODEL, "inputs": inputs(True, max_tokens=30), "request_id": str(number)}

    texts = ["", "", ""]
    async with triton_aio.InferenceServerClient(ADDRESS) as aio:
        async for result, error in aio.stream_infer(requests()):
            assert error is None, error
            texts[int(result.get_response().id)] += text(result)
    return texts


said["asynchronous"] = asyncio.run(alone())
print(json.dumps(said))

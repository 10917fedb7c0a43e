"""Promise: clients of Triton and KServe get text for text, and may stream it, with the parameters that they know."""

import json
import queue
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from gateway.protos import open_inference_pb2 as pb
from gateway.tokenization import Tokenizer
from messages.gateway_to_router import Finished, PlacementWanted
from messages.gateway_to_worker import Prefill
from tests.gateway.conftest import MODEL
from tests.gateway.fake_cluster import FakeCluster
from tests.gateway.grpc.test_engine import idle, refused

KINDS = {bool: ("BOOL", "bool_contents"), int: ("INT32", "int_contents"), float: ("FP32", "fp32_contents")}
PROMPT = "Once upon a time"


def parameter(value: Any) -> pb.InferParameter:
    name = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
    return pb.InferParameter(**{name: value})


def infer(
    *prompts: str, id: str = "", outputs: tuple[str, ...] = (), parameters: dict[str, Any] | None = None, **tensors: Any
) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=MODEL, id=id, parameters={
        name: parameter(value) for name, value in ({"max_tokens": 8} | (parameters or {})).items()
    })  # fmt: skip
    texts = [prompt.encode() for prompt in prompts or (PROMPT,)]
    for name, values in ({"text_input": texts} | tensors).items():
        elements = values if isinstance(values, list) else [values]
        datatype, field = KINDS.get(type(elements[0]), ("BYTES", "bytes_contents"))
        tensor = request.inputs.add(name=name, datatype=datatype, shape=[len(elements)])
        getattr(tensor.contents, field).extend(elements)
    for name in outputs:
        request.outputs.add(name=name)
    return request


def contents(response: pb.ModelInferResponse) -> dict[str, list[Any]]:
    fields = {"BYTES": "bytes_contents", "UINT32": "uint_contents"}
    read = {output.name: list(getattr(output.contents, fields[output.datatype])) for output in response.outputs}
    assert all(list(output.shape) == [len(read[output.name])] for output in response.outputs)
    return read


@pytest.fixture
def speaking(cluster: FakeCluster) -> FakeCluster:
    cluster.script = lambda _, most: [600 + i for i in range(most)]
    return cluster


def text(tokenizer: Tokenizer, count: int) -> str:
    return tokenizer.decode([600 + i for i in range(count)])


def test_an_answer_in_one_piece_begins_with_its_prompt(inference: Any, speaking: Any, tokenizer: Tokenizer) -> None:
    response = inference.ModelInfer(infer(id="mine"), timeout=10)
    assert (response.model_name, response.model_version, response.id) == (MODEL, "1", "mine")
    assert contents(response) == {"text_output": [(PROMPT + text(tokenizer, 8)).encode()]}
    assert response.parameters["triton_final_response"].bool_param
    response = inference.ModelInfer(infer(exclude_input_in_output=True), timeout=10)
    assert contents(response) == {"text_output": [text(tokenizer, 8).encode()]}


def test_several_prompts_and_choices_and_all_outputs(inference: Any, speaking: Any, tokenizer: Tokenizer) -> None:
    request = infer(
        "One", "Two and more", n=2, return_finish_reason=True, return_num_input_tokens=True,
        return_num_output_tokens=True, exclude_input_in_output=True,
    )  # fmt: skip
    read = contents(inference.ModelInfer(request, timeout=10))
    lengths = [len(tokenizer.encode(prompt, add_special_tokens=True)) for prompt in ("One", "Two and more")]
    assert read == {
        "text_output": [text(tokenizer, 8).encode()] * 4,
        "finish_reason": [b"length"] * 4,
        "num_input_tokens": lengths,
        "num_output_tokens": [8] * 4,
    }
    named = inference.ModelInfer(infer(outputs=("num_output_tokens",)), timeout=10)
    assert contents(named) == {"num_output_tokens": [8]}


def test_raw_contents_are_answered_in_raw(inference: Any, speaking: Any, tokenizer: Tokenizer) -> None:
    request = pb.ModelInferRequest(model_name=MODEL, outputs=[{"name": "text_output"}, {"name": "num_output_tokens"}])
    for name, datatype, raw in (
        ("text_input", "BYTES", struct.pack("<I", len(PROMPT)) + PROMPT.encode()),
        ("max_tokens", "UINT16", struct.pack("<H", 5)),
        ("exclude_input_in_output", "BOOL", b"\x01"),
        ("temperature", "FP64", struct.pack("<d", 0.25)),
    ):
        request.inputs.add(name=name, datatype=datatype, shape=[1] * 8)
        request.raw_input_contents.append(raw)
    response = inference.ModelInfer(request, timeout=10)
    said = text(tokenizer, 5).encode()
    assert list(response.raw_output_contents) == [struct.pack("<I", len(said)) + said, struct.pack("<I", 5)]
    assert not any(output.HasField("contents") for output in response.outputs)
    assert speaking.of(Prefill)[0].generation.sampling.temperature == 0.25


def test_parameters_may_stand_in_three_places(inference: Any, speaking: FakeCluster) -> None:
    inference.ModelInfer(
        infer(
            parameters={"temperature": 0.5, "top_k": 5, "seed": 7, "ignore_eos": "true", "top_p": "0.5"},
            sampling_parameters=json.dumps(
                {"top_k": "6", "seed": 8, "stop_token_ids": [9], "max_tokens": "4"}
            ).encode(),
            seed=9,
        ),
        timeout=10,
    )
    sampling = speaking.of(Prefill)[0].generation.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.5, 6, 9)
    assert (sampling.ignore_eos, sampling.stop_token_ids, sampling.max_tokens) == (True, (9,), 4)


def test_stop_strings_end_the_text(inference: Any, speaking: FakeCluster, tokenizer: Tokenizer) -> None:
    whole = text(tokenizer, 8)
    stop = whole[5:8]
    request = infer(stop=[b"never seen", stop.encode()], exclude_input_in_output=True, return_finish_reason=True)
    read = contents(inference.ModelInfer(request, timeout=10))
    assert read == {"text_output": [whole[: whole.index(stop)].encode()], "finish_reason": [b"stop"]}


def test_a_stream_says_what_has_come_and_when_it_is_over(
    inference: Any, speaking: FakeCluster, tokenizer: Tokenizer
) -> None:
    speaking.hold_after = 2
    request = infer(stream=True, return_num_output_tokens=True, parameters={"triton_enable_empty_final_response": True})
    responses = inference.ModelStreamInfer(iter([request]), timeout=10)
    first = next(responses).infer_response
    assert contents(first)["text_output"][0] and not first.parameters["triton_final_response"].bool_param
    speaking.release()
    rest = [answer.infer_response for answer in responses]
    read = [contents(response) for response in (first, *rest)]
    assert b"".join(each["text_output"][0] for each in read).decode() == text(tokenizer, 8)
    assert sum(each["num_output_tokens"][0] for each in read) == 8
    assert [r.parameters["triton_final_response"].bool_param for r in rest] == [False] * (len(rest) - 1) + [True]


def test_requests_of_one_stream_do_not_wait_for_each_other(inference: Any, speaking: FakeCluster) -> None:
    asked: queue.Queue[pb.ModelInferRequest | None] = queue.Queue()
    responses = inference.ModelStreamInfer(iter(asked.get, None), timeout=10)
    speaking.hold_after = 2
    asked.put(infer(id="slow", stream=True))
    assert next(responses).infer_response.id == "slow"
    asked.put(infer(id="short", parameters={"max_tokens": 1}))
    assert next(responses).infer_response.id == "short"
    asked.put(infer(id="wrong", parameters={"max_tokens": -1}))
    wrong = next(responses)
    assert "max_tokens" in wrong.error_message and wrong.infer_response.id == "wrong"
    assert wrong.infer_response.parameters["triton_final_response"].bool_param
    asked.put(None)
    speaking.release()
    assert {answer.infer_response.id for answer in responses} == {"slow"}


def test_a_client_that_leaves_a_stream_frees_all_of_it(
    inference: Any, speaking: FakeCluster, http: httpx.Client
) -> None:
    speaking.hold_after = 2

    def requests() -> Iterator[pb.ModelInferRequest]:
        yield infer(stream=True, n=2)
        yield infer(stream=False)

    responses = inference.ModelStreamInfer(requests(), timeout=10)
    next(responses)
    speaking.wait_for(Prefill, 3)
    responses.cancel()
    speaking.wait_for(Finished, 3)
    idle(http)


def test_a_client_that_leaves_an_answer_in_one_piece_frees_it(
    inference: Any, speaking: FakeCluster, http: httpx.Client
) -> None:
    speaking.hold_after = 2
    asked = inference.ModelInfer.future(infer(), timeout=10)
    speaking.wait_for(Prefill)
    asked.cancel()
    speaking.wait_for(Finished)
    idle(http)


def wrong(change: Any) -> pb.ModelInferRequest:
    request = infer()
    change(request)
    return request


def raw(*contents_: bytes) -> Any:
    def change(request: pb.ModelInferRequest) -> None:
        request.inputs[0].ClearField("contents")
        request.raw_input_contents.extend(contents_)

    return change


REFUSED = {
    "text_input": wrong(lambda request: request.inputs.pop()),
    "its shape": wrong(lambda request: request.inputs[0].shape.append(2)),
    "shape says otherwise": wrong(lambda request: request.inputs[0].shape.__setitem__(slice(None), [-1, -1])),
    "more than 8 dimensions": wrong(lambda request: request.inputs[0].shape.extend([1 << 62] * 100_000)),
    "is there twice": wrong(lambda request: request.inputs.add().CopyFrom(request.inputs[0])),
    "data type": wrong(lambda request: setattr(request.inputs[0], "datatype", "FP16")),
    "beside raw_input_contents": wrong(lambda request: request.raw_input_contents.append(b"")),
    "2 entries for 1": wrong(raw(b"", b"")),
    "within the length": wrong(raw(b"\x01\x00")),
    "within an element": wrong(raw(b"\xff\xff\xff\xff" + b"x")),
    "not UTF-8": infer(text_input=[b"\xff\xfe"]),
    "of type BYTES": infer(text_input=[1]),
    "'image'": infer(image=[b"file:///etc/passwd"]),
    "'audio'": wrong(lambda request: request.inputs.add(name="audio", datatype="FP16")),  # before it is looked at
    "'lora_name'": infer(parameters={"lora_name": "x"}),
    "'sequence_id'": infer(parameters={"sequence_id": 1}),
    "'min_tokens'": infer(sampling_parameters=b'{"min_tokens": 1}'),
    "JSON object": infer(sampling_parameters=b"[1]"),
    "sampling_parameters must": infer(sampling_parameters=b"[" * 100_000),
    "no output 'logits'": infer(outputs=("logits",)),
    "max_tokens": infer(parameters={"max_tokens": "many"}),
    "temperature": infer(parameters={"temperature": float("nan")}),
    "one element": infer(seed=[1, 2]),
    "true or false": infer(exclude_input_in_output=b"perhaps"),
    "ModelStreamInfer": infer(stream=True),
    "exclude_input_in_output": infer(stream=True, exclude_input_in_output=False),
    "id is too long": infer(id="x" * 300),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(what: str, inference: Any, cluster: FakeCluster) -> None:
    error = refused(lambda request, timeout: [inference.ModelInfer(request, timeout=timeout)], REFUSED[what])
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and what in error.details(), error.details()
    assert not cluster.of(PlacementWanted)


@pytest.mark.parametrize("model", [("gpt", ""), (MODEL, "2")])
def test_other_models_and_versions_are_not_there(model: tuple[str, str], inference: Any) -> None:
    request = infer()
    request.model_name, request.model_version = model
    for call in (
        lambda: inference.ModelInfer(request, timeout=10),
        lambda: inference.ModelReady(pb.ModelReadyRequest(name=model[0], version=model[1]), timeout=10),
        lambda: inference.ModelMetadata(pb.ModelMetadataRequest(name=model[0], version=model[1]), timeout=10),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_it_tells_what_there_is(inference: Any) -> None:
    assert inference.ServerLive(pb.ServerLiveRequest(), timeout=10).live
    assert inference.ServerReady(pb.ServerReadyRequest(), timeout=10).ready
    assert inference.ModelReady(pb.ModelReadyRequest(name=MODEL, version="1"), timeout=10).ready
    assert inference.ServerMetadata(pb.ServerMetadataRequest(), timeout=10).name == "baton"
    described = inference.ModelMetadata(pb.ModelMetadataRequest(name=MODEL), timeout=10)
    inputs = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in described.inputs}
    assert inputs["text_input"] == ("BYTES", [-1]) and inputs["max_tokens"] == ("INT32", [1])
    assert {tensor.name for tensor in described.outputs} >= {"text_output", "finish_reason"}
    for name in inputs.keys() - {"text_input", "sampling_parameters", "logit_bias"}:  # what is told is taken
        value = {"BOOL": False, "INT32": 1, "INT64": 1, "FP32": 0.5, "BYTES": b"x"}[inputs[name][0]]
        exclude = {"exclude_input_in_output": True} if name == "stream" else {}
        inference.ModelInfer(infer(**({name: [value]} | exclude), parameters={"max_tokens": 1}), timeout=10)

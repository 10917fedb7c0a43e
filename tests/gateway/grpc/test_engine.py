"""Promise: a gateway of others that speaks to engines can stand in front; what it asks for is done, or refused."""

import hashlib
import io
import math
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.message import Message
from tokenizers import Tokenizer as Backend

from gateway.protos import smg_common_pb2 as common
from gateway.protos import vllm_engine_pb2 as pb
from gateway.protos.vllm_engine_pb2_grpc import VllmEngineStub
from gateway.server import GatewayServer
from gateway.tokenization import Tokenizer
from messages.gateway_to_router import Finished, PlacementWanted
from messages.gateway_to_worker import Abort, Prefill
from messages.sampling import SamplingParams
from tests.gateway.conftest import serving
from tests.gateway.fake_cluster import FakeCluster, counting
from tests.gateway.raw import until

PROMPT = [7, 8, 9]
AT_ONCE = 0.1
"""Seconds."""


def generate(stream: bool = False, prompt: list[int] = PROMPT, request_id: str = "r", **params: Any) -> Any:
    return pb.GenerateRequest(
        request_id=request_id,
        tokenized=pb.TokenizedInput(original_text="as the client has it", input_ids=prompt),
        sampling_params=pb.SamplingParams(**{"max_tokens": 6} | params),
        stream=stream,
    )


def whole(engine: Any, request: Any) -> list[Any]:
    """All choices, which come in one message each."""
    answers = list(engine.Generate(request, timeout=10))
    assert all(answer.HasField("complete") for answer in answers)
    return [answer.complete for answer in answers]


def refused(call: Any, request: Message) -> grpc.RpcError:
    """The error, which must come at once."""
    fastest = math.inf
    for _ in range(3):
        began = time.perf_counter()
        with pytest.raises(grpc.RpcError) as caught:
            list(call(request, timeout=10))
        fastest = min(fastest, time.perf_counter() - began)
    assert fastest < AT_ONCE
    return caught.value


def idle(http: httpx.Client) -> None:
    until(lambda: http.get("/status").json()["sequences_in_flight"] == 0, "nothing is in flight")


def test_tokens_are_streamed_as_they_come(engine: Any, cluster: FakeCluster) -> None:
    cluster.hold_after = 4
    stream = engine.Generate(generate(stream=True, max_tokens=20), timeout=10)
    first = next(stream)
    cluster.release()
    *more, last = stream
    chunks = [first, *more]
    assert len(chunks) > 1 and all(chunk.HasField("chunk") for chunk in chunks)
    tokens = [token for chunk in chunks for token in chunk.chunk.token_ids]
    assert tokens == counting(PROMPT, 20)
    assert sum(chunk.chunk.completion_tokens for chunk in chunks) == 20
    assert {chunk.chunk.prompt_tokens for chunk in chunks} == {3}
    assert last.complete.finish_reason == "length"
    assert (last.complete.prompt_tokens, last.complete.completion_tokens) == (3, 20)


def test_an_answer_in_one_piece(engine: Any, cluster: FakeCluster) -> None:
    cluster.cached_tokens = 2
    cluster.script = lambda prompt, _: counting(prompt, 4)
    (complete,) = whole(engine, generate())
    assert list(complete.output_ids) == counting(PROMPT, 4)
    assert (complete.finish_reason, complete.cached_tokens) == ("stop", 2)
    assert complete.WhichOneof("matched_stop") is None


def test_several_choices_come_with_their_index(engine: Any, cluster: FakeCluster) -> None:
    completes = whole(engine, generate(n=3, seed=5))
    assert [complete.index for complete in completes] == [0, 1, 2]
    assert all(list(complete.output_ids) == counting(PROMPT, 6) for complete in completes)
    assert [order.generation.sampling.seed for order in cluster.of(Prefill)] == [5, 6, 7]
    streamed = list(engine.Generate(generate(stream=True, n=3), timeout=10))
    ends = [answer.complete.index for answer in streamed if answer.HasField("complete")]
    assert sorted(ends) == [0, 1, 2]
    for index in ends:
        of_one = [answer.chunk for answer in streamed if answer.HasField("chunk") and answer.chunk.index == index]
        assert [token for chunk in of_one for token in chunk.token_ids] == counting(PROMPT, 6)


def test_all_that_an_engine_can_do_is_asked_of_it(engine: Any, cluster: FakeCluster) -> None:
    whole(engine, generate(
        temperature=0.5, top_p=0.25, top_k=12, min_p=0.125, frequency_penalty=0.5, presence_penalty=-0.5,
        repetition_penalty=1.5, max_tokens=9, stop_token_ids=[3, 4], ignore_eos=True, logprobs=2, prompt_logprobs=1,
        seed=-1, logit_bias={5: -100.0, 6: 1.5}, skip_special_tokens=True, spaces_between_special_tokens=True,
    ))  # fmt: skip
    (order,) = cluster.of(Prefill)
    assert order.generation.sampling == SamplingParams(
        temperature=0.5, top_p=0.25, top_k=12, min_p=0.125, frequency_penalty=0.5, presence_penalty=-0.5,
        repetition_penalty=1.5, max_tokens=9, stop_token_ids=(3, 4), ignore_eos=True, logprobs=2, prompt_logprobs=1,
        seed=(1 << 63) - 1, logit_bias={5: -100.0, 6: 1.5},
    )  # fmt: skip


def test_what_is_not_set_has_vllms_defaults(engine: Any, cluster: FakeCluster) -> None:
    cluster.script = lambda prompt, _: counting(prompt, 2)
    request = pb.GenerateRequest(text="Once upon a time")
    (complete,) = whole(engine, request)
    (order,) = cluster.of(Prefill)
    sampling = order.generation.sampling
    context = 4096
    assert sampling == SamplingParams(max_tokens=context - complete.prompt_tokens, seed=sampling.seed)
    whole(engine, pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(temperature=0.0, max_tokens=2)))
    assert cluster.of(Prefill)[1].generation.sampling.temperature == 0.0


def test_stop_strings_and_stop_tokens_are_named(engine: Any, cluster: FakeCluster, tokenizer: Tokenizer) -> None:
    tokens = counting(PROMPT, 20)
    text = tokenizer.decode(tokens)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    (complete,) = whole(engine, generate(max_tokens=20, stop=["never to be seen", stop], skip_special_tokens=True))
    assert (complete.finish_reason, complete.matched_stop_str) == ("stop", stop)
    assert list(complete.output_ids) == tokens[: len(complete.output_ids)]
    assert stop in tokenizer.decode(complete.output_ids) and stop not in tokenizer.decode(complete.output_ids[:-1])
    cluster.script = lambda prompt, _: counting(prompt, 4)
    (complete,) = whole(engine, generate(stop_token_ids=[tokens[3]]))
    assert (complete.finish_reason, complete.matched_token_id) == ("stop", tokens[3])


def test_special_tokens_stop_if_they_have_text(engine: Any, cluster: FakeCluster, tokenizer: Tokenizer) -> None:
    (special,) = tokenizer.encode("<|im_start|>", add_special_tokens=False)
    cluster.script = lambda _, most: [200, special, 201, 202, 203, 204][:most]
    (complete,) = whole(engine, generate(stop=["<|im_start|>"]))
    assert list(complete.output_ids) == [200, special]
    (complete,) = whole(engine, generate(stop=["<|im_start|>"], skip_special_tokens=True))
    assert (len(complete.output_ids), complete.finish_reason) == (6, "length")


@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities_of_output_and_prompt(engine: Any, stream: bool) -> None:
    answers = list(engine.Generate(generate(stream=stream, logprobs=2, prompt_logprobs=1), timeout=10))
    parts = [getattr(answer, answer.WhichOneof("response")) for answer in answers]
    tokens = counting(PROMPT, 6)
    assert [token for part in parts for token in part.output_logprobs.token_ids] == tokens
    values = [value for part in parts for value in part.output_logprobs.token_logprobs]
    assert values == pytest.approx([-token / 1000 for token in tokens])
    top = parts[0].output_logprobs.top_logprobs[0]
    assert list(top.token_ids) == [tokens[0], tokens[0] + 1]
    scored = parts[0].input_logprobs
    assert not any(part.HasField("input_logprobs") for part in parts[1:])
    assert list(scored.token_ids) == PROMPT and not scored.token_logprobs[0].HasField("value")
    assert [entry.value for entry in scored.token_logprobs[1:]] == pytest.approx([-0.008, -0.009])
    assert list(scored.top_logprobs[1].token_ids) == [8]


NAN = float("nan")
UNSUPPORTED = {
    "min_tokens": generate(min_tokens=1),
    "truncate_prompt_tokens": generate(truncate_prompt_tokens=-1),
    "json_schema": generate(json_schema="{}"),
    "regex": generate(regex="(a+)+b"),
    "grammar": generate(grammar="root ::= 'x'"),
    "structural_tag": generate(structural_tag="{}"),
    "json_object": generate(json_object=False),
    "choice": generate(choice=pb.ChoiceConstraint(choices=["a"])),
    "grammar_from_first_token": generate(grammar_from_first_token=True),
    "temperature": generate(temperature=NAN),
    "top_p": generate(top_p=1.5),
    "min_p": generate(min_p=-1.0),
    "repetition_penalty": generate(repetition_penalty=-1.0),
    "presence_penalty": generate(presence_penalty=math.inf),
    "frequency_penalty": generate(frequency_penalty=3.0),
    "max_tokens": generate(max_tokens=0),
    "exceed the context": generate(max_tokens=100_000),
    "n must": generate(n=1 << 31),
    "logprobs": generate(logprobs=-1),
    "prompt_logprobs": generate(prompt_logprobs=21),
    "stop_token_ids": generate(stop_token_ids=[5000]),
    "stop string": generate(stop=[""]),
    "logit_bias": generate(logit_bias={-1: 0.0}),
    "token ids": generate(prompt=[2048]),
    "the prompt is empty": generate(prompt=[]),
    "no input": pb.GenerateRequest(request_id="r"),
    "request_id": generate(request_id="x" * 300),
    "kv_transfer_params": pb.GenerateRequest(text="x", kv_transfer_params=pb.KvTransferParams(remote_host="::1")),
    "kv_transfer_params_json": pb.GenerateRequest(text="x", kv_transfer_params_json='{"do_remote_decode": true}'),
    "data_parallel_rank": pb.GenerateRequest(text="x", data_parallel_rank=1),
    "mm_inputs": pb.GenerateRequest(text="x", mm_inputs=pb.MultimodalInputs(im_token_id=1)),
    "media_refs": pb.GenerateRequest(text="x", media_refs=pb.MediaRefs(items=[pb.MediaRef(url="file:///etc")])),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_cannot_be_done_is_refused_by_name(what: str, engine: Any, cluster: FakeCluster) -> None:
    error = refused(engine.Generate, UNSUPPORTED[what])
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and what in error.details()
    assert not cluster.of(PlacementWanted)


@pytest.mark.parametrize("where", ["the request", "sampling_params"])
def test_fields_of_a_later_version_are_refused(where: str, engine: Any, cluster: FakeCluster) -> None:
    request = generate()
    (request if where == "the request" else request.sampling_params).MergeFromString(b"\xa8\x06\x01")  # 101: 1
    error = refused(engine.Generate, request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert where in error.details() and "101" in error.details()


def test_abort_ends_the_request_of_that_name(engine: Any, cluster: FakeCluster, http: httpx.Client) -> None:
    cluster.hold_after = 2
    streams = [engine.Generate(generate(stream=True, n=2, request_id=id), timeout=10) for id in ("mine", "other")]
    for stream in streams:
        next(stream)
    engine.Abort(pb.AbortRequest(request_ids=["nobody's", "mine"]), timeout=10)
    *_, last, end = streams[0]
    assert [last.complete.finish_reason, end.complete.finish_reason] == ["abort", "abort"]
    assert len(cluster.wait_for(Finished, 2)) == 2 and cluster.wait_for(Abort, 2)
    cluster.release()
    *_, end = streams[1]
    assert end.complete.finish_reason == "length"
    idle(http)


def test_what_is_aborted_before_its_first_token_says_so_too(engine: Any, cluster: FakeCluster) -> None:
    cluster.hold_after = 0
    stream = engine.Generate(generate(stream=True, n=2, prompt_logprobs=1, logprobs=1), timeout=10)
    cluster.wait_for(Prefill, 2)
    engine.Abort(pb.AbortRequest(request_ids=["r"]), timeout=10)
    assert [answer.complete.finish_reason for answer in stream] == ["abort", "abort"]


def test_a_stream_goes_on_when_its_worker_fails(engine: Any, cluster: FakeCluster) -> None:
    cluster.hold_after = 4
    stream = engine.Generate(generate(stream=True, max_tokens=20), timeout=10)
    tokens = list(next(stream).chunk.token_ids)
    (order,) = cluster.of(Prefill)
    cluster.hold_after = None
    cluster.fail(order.request)
    *chunks, end = stream
    assert tokens + [token for chunk in chunks for token in chunk.chunk.token_ids] == counting(PROMPT, 20)
    assert end.complete.finish_reason == "length"
    assert {wanted.attempt for wanted in cluster.of(PlacementWanted)} == {1, 2}


def cancel(stream: Any) -> None:
    stream.cancel()


def wait_for_the_deadline(stream: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("leave", [cancel, wait_for_the_deadline])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_everything(
    leave: Any, stream: bool, engine: Any, cluster: FakeCluster, http: httpx.Client
) -> None:
    cluster.hold_after = 2
    call = engine.Generate(generate(stream=stream, n=2), timeout=0.5)
    cluster.wait_for(Prefill, 2)
    leave(call)
    assert len(cluster.wait_for(Finished, 2)) == 2
    assert {abort.request for abort in cluster.wait_for(Abort, 2)} == {o.request for o in cluster.of(Prefill)}
    idle(http)


def test_a_connection_that_breaks_frees_everything(
    server: GatewayServer, cluster: FakeCluster, http: httpx.Client
) -> None:
    from gateway.protos.vllm_engine_pb2_grpc import VllmEngineStub

    cluster.hold_after = 2
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        next(VllmEngineStub(channel).Generate(generate(stream=True), timeout=10))
    cluster.wait_for(Finished)
    idle(http)


def test_it_tells_what_it_serves(engine: Any, cluster: FakeCluster) -> None:
    info = engine.GetModelInfo(pb.GetModelInfoRequest(), timeout=10)
    assert (info.served_model_name, info.model_path, info.tokenizer_path) == ("tiny-llama", "tiny-llama", "")
    assert (info.vocab_size, info.max_context_length, info.model_type) == (2048, 4096, "llama")
    assert (list(info.architectures), list(info.eos_token_ids)) == (["LlamaForCausalLM"], [2, 0])
    assert info.is_generation and not info.supports_vision
    assert engine.HealthCheck(pb.HealthCheckRequest(), timeout=10).healthy
    server = engine.GetServerInfo(pb.GetServerInfoRequest(), timeout=10)
    assert (server.server_type, server.kv_connector, server.data_parallel_size) == ("baton", "", 1)
    assert server.uptime_seconds > 0 and server.active_requests == 0
    (load,) = engine.GetLoads(pb.GetLoadsRequest(), timeout=10).loads
    assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (2, 4, 6)
    assert load.token_usage == pytest.approx(0.08)


def test_the_tokenizer_can_be_had(engine: Any, tiny_llama: Path) -> None:
    chunks = list(engine.GetTokenizer(common.GetTokenizerRequest(), timeout=10))
    archive = b"".join(chunk.data for chunk in chunks)
    assert [chunk.sha256 for chunk in chunks[:-1]] == [""] * (len(chunks) - 1)
    assert chunks[-1].sha256 == hashlib.sha256(archive).hexdigest()
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        assert not [name for name in files.namelist() if "safetensors" in name]
        theirs = Backend.from_str(files.read("tokenizer.json").decode())
        assert files.read("tokenizer_config.json") == (tiny_llama / "tokenizer_config.json").read_bytes()
    assert (
        theirs.encode("Once upon a time").ids
        == Backend.from_file(str(tiny_llama / "tokenizer.json")).encode("Once upon a time").ids
    )


def test_the_tokenizer_is_packed_once(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with (
        serving(folder, grpc_port=0) as (_, server),
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        asked = common.GetTokenizerRequest()
        several = [VllmEngineStub(channel).GetTokenizer(asked, timeout=10) for _ in range(3)]
        first, *others = [list(chunks) for chunks in several]
        shutil.rmtree(folder)
        again = list(VllmEngineStub(channel).GetTokenizer(asked, timeout=10))
    assert first[-1].sha256
    assert [*others, again] == [first] * 3


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Embed", pb.EmbedRequest()),
        ("FlushCache", common.FlushCacheRequest()),
        ("StartProfile", common.StartProfileRequest()),
        ("StopProfile", common.StopProfileRequest()),
        ("SubscribeKvEvents", common.SubscribeKvEventsRequest()),
    ],
)
def test_what_is_not_offered_says_so(method: str, request_: Message, engine: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        answer = getattr(engine, method)(request_, timeout=10)
        list(answer)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED and caught.value.details()

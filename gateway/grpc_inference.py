"""``inference.GRPCInferenceService``: the Open Inference Protocol, for text generation.

``ModelInfer`` answers in one piece; so does ``ModelStreamInfer``, but for requests with ``stream``, whose responses
have what came since the last one. Each response says by ``triton_final_response`` whether it is its request's last.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, NamedTuple

from gateway.answers import Exchange
from gateway.core.errors import GatewayError, InvalidRequest, ModelNotFound
from gateway.grpc_calls import Context, details_of, metadata_of
from gateway.grpc_generation import Generator, News
from gateway.grpc_inference_requests import (
    LISTS,
    OUTPUTS,
    SAMPLING_PARAMETERS,
    SCALARS,
    SWITCHES,
    TEXT_INPUT,
    Wanted,
    wanted_of,
)
from gateway.grpc_tensors import add_output
from gateway.openai_api import version
from gateway.orders import Plan
from gateway.protos import open_inference_pb2 as pb
from gateway.protos.open_inference_pb2_grpc import GRPCInferenceServiceServicer

MODEL_VERSION = "1"
FINAL = "triton_final_response"
AT_ONCE = 256
"""Requests of one stream that are answered at a time; further ones are read when one of them is through."""

Answers = asyncio.Queue[pb.ModelStreamInferResponse | None]


class Inference(GRPCInferenceServiceServicer):
    """One gateway's; lives on its event loop."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._api = generator.api
        self._name = self._api.config.served_model_name

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._api.hub.ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        self._check_model(request.name, request.version)
        return pb.ModelReadyResponse(ready=self._api.hub.ready)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="baton", version=version())

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        self._check_model(request.name, request.version)
        described = pb.ModelMetadataResponse(name=self._name, versions=[MODEL_VERSION], platform="baton")
        described.inputs.add(name=TEXT_INPUT, datatype="BYTES", shape=[-1])
        for name, datatype in ({SAMPLING_PARAMETERS: "BYTES"} | dict.fromkeys(SWITCHES, "BOOL") | SCALARS).items():
            described.inputs.add(name=name, datatype=datatype, shape=[1])
        for name, datatype in LISTS.items():
            described.inputs.add(name=name, datatype=datatype, shape=[-1])
        for name, datatype in OUTPUTS.items():
            described.outputs.add(name=name, datatype=datatype, shape=[-1])
        return described

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        async with aclosing(self._responses(request, streams=False)) as responses:
            async for response in responses:
                return response
        raise AssertionError("there is one response")

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        answers: Answers = asyncio.Queue(1)
        serving = asyncio.create_task(self._serve(requests, answers))
        try:
            while (answer := await answers.get()) is not None:
                yield answer
            await serving
        finally:
            serving.cancel()
            await asyncio.wait([serving])

    async def _serve(self, requests: AsyncIterator[pb.ModelInferRequest], answers: Answers) -> None:
        """Answer each request beside the others, until there are no more."""
        room = asyncio.Semaphore(AT_ONCE)
        try:
            async with asyncio.TaskGroup() as tasks:
                async for request in requests:
                    await room.acquire()
                    task = tasks.create_task(self._answer(request, answers))
                    task.add_done_callback(lambda _: room.release())
        except Exception:
            await answers.put(None)
            raise
        await answers.put(None)

    async def _answer(self, request: pb.ModelInferRequest, answers: Answers) -> None:
        """An error is an answer like any other: the stream's other requests go on."""
        try:
            async with aclosing(self._responses(request, streams=True)) as responses:
                async for response in responses:
                    await answers.put(pb.ModelStreamInferResponse(infer_response=response))
        except GatewayError as error:
            response = self._response(request, final=True)
            for name, value in metadata_of(error):
                response.parameters[name].string_param = value
            await answers.put(pb.ModelStreamInferResponse(error_message=details_of(error), infer_response=response))

    async def _responses(
        self, request: pb.ModelInferRequest, *, streams: bool
    ) -> AsyncGenerator[pb.ModelInferResponse]:
        """``streams``: there may be several. Raises ``GatewayError``."""
        arrived = asyncio.get_running_loop().time()
        self._check_model(request.model_name, request.model_version)
        wanted, plan = await self._generator.plan(request.ByteSize(), partial(self._understood, request))
        if wanted.stream and not streams:
            raise InvalidRequest("stream needs ModelStreamInfer", param="stream")
        with self._generator.exchange() as exchange:
            detokenizer = self._api.tokenizer.detokenizer
            self._generator.open(exchange, plan, arrived=arrived, detokenizer=detokenizer)
            if not wanted.stream:
                said = _Said(request, wanted, plan)
                yield said.fill(self._response(request, final=True), await self._generator.whole(exchange))
                return
            async for response in self._stream(request, wanted, plan, exchange):
                yield response

    async def _stream(
        self, request: pb.ModelInferRequest, wanted: Wanted, plan: Plan, exchange: Exchange
    ) -> AsyncIterator[pb.ModelInferResponse]:
        said, left = _Said(request, wanted, plan), len(plan.sampling)
        async with aclosing(self._generator.news(exchange, even_without_text=False)) as coming:
            async for news in coming:
                left -= sum(piece.finish is not None for _, piece in news)
                yield said.fill(self._response(request, final=left == 0), news)

    def _understood(self, request: pb.ModelInferRequest) -> tuple[Wanted, Plan]:
        wanted = wanted_of(request, self._api.config.limits)
        return wanted, self._api.planner.completion(wanted.completion)

    def _response(self, request: pb.ModelInferRequest, *, final: bool) -> pb.ModelInferResponse:
        response = pb.ModelInferResponse(model_name=self._name, model_version=MODEL_VERSION, id=request.id)
        response.parameters[FINAL].bool_param = final
        return response

    def _check_model(self, name: str, model_version: str) -> None:
        if name != self._name:
            raise ModelNotFound(f"the model {name[:100]!r} does not exist", param="model_name")
        if model_version not in ("", MODEL_VERSION):
            raise ModelNotFound(f"the model has the version {MODEL_VERSION!r} only", param="model_version")


class _Said(NamedTuple):
    """What pieces look like in the responses of one request."""

    request: pb.ModelInferRequest
    wanted: Wanted
    plan: Plan

    def fill(self, response: pb.ModelInferResponse, news: News) -> pb.ModelInferResponse:
        """One element a choice in each output; of choices without news nothing, or 0."""
        plan = self.plan
        texts, reasons = [b""] * len(plan.sampling), [b""] * len(plan.sampling)
        tokens = [0] * len(plan.sampling)
        for choice, piece in news:
            prompt = plan.prompts[choice.index // plan.n]
            texts[choice.index] = ((prompt.text or "") if self.wanted.prepend else "").encode() + piece.text.encode()
            reasons[choice.index] = b"" if piece.finish is None else piece.finish.value.encode()
            tokens[choice.index] = len(piece.tokens)
        values: dict[str, Sequence[Any]] = {
            "text_output": texts,
            "finish_reason": reasons,
            "num_input_tokens": [len(prompt.tokens) for prompt in plan.prompts],
            "num_output_tokens": tokens,
        }
        raw = bool(self.request.raw_input_contents)
        for name in self.wanted.outputs:
            add_output(response, name, OUTPUTS[name], values[name], raw=raw)
        return response

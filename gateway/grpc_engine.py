"""``vllm.grpc.engine.VllmEngine``: token ids in, token ids out, for gateways that stand in front of engines.

A client's ``request_id`` is a label, for ``Abort`` and of its tenant only; in the cluster a request has an id of ours.
"""

import asyncio
import hashlib
import io
import json
import time
import zipfile
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gateway.answers import Exchange
from gateway.choice import Choice, Piece, TokenLogprob
from gateway.core.errors import NotOffered
from gateway.detokenizer import Detokenizer
from gateway.grpc_calls import Context
from gateway.grpc_engine_requests import completion_of, prompt_logprobs_of
from gateway.grpc_generation import Generator, Silent
from gateway.grpc_guard import CALLER
from gateway.openai_api import version
from gateway.orders import Plan
from gateway.protos import smg_common_pb2 as common
from gateway.protos import vllm_engine_pb2 as pb
from gateway.protos.vllm_engine_pb2_grpc import VllmEngineServicer
from gateway.tokenization import Tokenizer
from messages.common import Role
from messages.sampling import FinishReason

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.json",
    "chat_template.jinja",
)
CHUNK_BYTES = 64 << 10
"""Of the tokenizer, in one message."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""Of the files in the archive: the same tokenizer is the same bytes."""


class Packed(NamedTuple):
    """A tokenizer as it is sent."""

    archive: bytes
    """Zip."""
    digest: str
    """The archive's SHA-256, in hexadecimal."""


@dataclass(eq=False, slots=True)
class Running:
    """One ``Generate``."""

    exchange: Exchange
    aborted: bool = field(default=False)


class VllmEngine(VllmEngineServicer):
    """One gateway's; lives on its event loop."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._api = generator.api
        self._started = time.monotonic()
        self._running: defaultdict[tuple[str, str], list[Running]] = defaultdict(list)
        self._packing = asyncio.Lock()
        self._packed: Packed | None = None
        config = self._api.config
        self._model_info = _model_info(self._api.tokenizer, Path(config.model), config.served_model_name)
        self._model_info.max_context_length = self._model_info.max_req_input_len = self._api.max_model_len

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        arrived = asyncio.get_running_loop().time()
        label = (CALLER.get().name, request.request_id)
        with self._generator.exchange() as exchange:
            running = Running(exchange)
            self._running[label].append(running)
            try:
                plan = await self._generator.plan(request.ByteSize(), partial(self._plan, request))
                scored = prompt_logprobs_of(request) is not None
                detokenizer = partial(_detokenizer, self._api.tokenizer, request.sampling_params)
                self._generator.open(exchange, plan, arrived=arrived, detokenizer=detokenizer, scored=scored)
                if running.aborted:
                    self._api.hub.cancel_all(exchange.relays)
                answer = _Answer(plan, scored)
                if not request.stream:
                    for choice, piece in await self._generator.whole(exchange):
                        yield pb.GenerateResponse(complete=answer.complete(choice, piece))
                    return
                async with aclosing(self._generator.news(exchange, even_without_text=True)) as coming:
                    async for news in coming:
                        for choice, piece in news:
                            if piece.tokens:
                                yield pb.GenerateResponse(chunk=answer.chunk(choice, piece))
                            if piece.finish is not None:
                                yield pb.GenerateResponse(complete=answer.end(choice, piece))
            finally:
                self._running[label].remove(running)
                if not self._running[label]:
                    del self._running[label]

    def _plan(self, request: pb.GenerateRequest) -> Plan:
        config = self._api.config
        return self._api.planner.completion(
            completion_of(request, config.served_model_name, config.limits),
            default=None,
            prompt_logprobs=prompt_logprobs_of(request),
        )

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """What runs ends with ``finish_reason`` "abort"; ids that nobody has are as good as aborted."""
        tenant = CALLER.get().name
        for request_id in request.request_ids:
            for running in self._running.get((tenant, request_id), ()):
                running.aborted = True
                self._api.hub.cancel_all(running.exchange.relays)
        return pb.AbortResponse()

    async def HealthCheck(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        healthy = self._api.hub.ready
        return pb.HealthCheckResponse(healthy=healthy, message="ready" if healthy else "a role has no live worker")

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        return self._model_info

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        """No KV connector is named: who hands over KV, and to whom, is decided behind this endpoint."""
        tenant = CALLER.get().name
        return pb.GetServerInfoResponse(
            active_requests=sum(len(running) for (whose, _), running in self._running.items() if whose == tenant),
            uptime_seconds=time.monotonic() - self._started,
            server_type="baton",
            data_parallel_size=1,
            max_num_seqs=self._api.config.limits.max_sequences,
        )

    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:
        """Of the whole cluster, as one rank; nothing is said of it while the router has not spoken."""
        cluster = self._api.hub.cluster
        loads = []
        if cluster is not None and not request.dp_rank:
            alive = [worker for worker in cluster.workers if worker.alive]
            running = sum(worker.running for worker in alive)
            waiting = cluster.queued + sum(worker.waiting for worker in alive)
            decoding = [worker.blocks for worker in alive if worker.role is not Role.PREFILL]
            total = sum(blocks.total for blocks in decoding)
            load = pb.SchedulerLoad(num_running_reqs=running, num_waiting_reqs=waiting)
            load.num_total_reqs = running + waiting
            load.token_usage = sum(blocks.held for blocks in decoding) / total if total else 0.0
            loads.append(load)
        now = datetime.now(UTC).isoformat()
        return pb.GetLoadsResponse(timestamp=now, version=version(), dp_rank_count=1, loads=loads)

    async def GetTokenizer(
        self, request: common.GetTokenizerRequest, context: Context
    ) -> AsyncIterator[common.GetTokenizerChunk]:
        """A zip archive of the model folder's files that make the tokenizer."""
        archive, digest = await self._tokenizer()
        for start in range(0, len(archive), CHUNK_BYTES):
            end = start + CHUNK_BYTES
            yield common.GetTokenizerChunk(data=archive[start:end], sha256=digest if end >= len(archive) else "")

    async def _tokenizer(self) -> Packed:
        """Made once."""
        async with self._packing:
            if self._packed is None:
                loop = asyncio.get_running_loop()
                self._packed = await loop.run_in_executor(self._api.executor, packed, Path(self._api.config.model))
            return self._packed

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        raise NotOffered("embeddings are not served")

    async def FlushCache(self, request: common.FlushCacheRequest, context: Context) -> common.FlushCacheResponse:
        raise NotOffered("prefix caches are not emptied from outside")

    async def StartProfile(self, request: common.StartProfileRequest, context: Context) -> common.ProfileResponse:
        raise NotOffered("there is no profiler to start")

    async def StopProfile(self, request: common.StopProfileRequest, context: Context) -> common.ProfileResponse:
        raise NotOffered("there is no profiler to stop")

    def SubscribeKvEvents(
        self, request: common.SubscribeKvEventsRequest, context: Context
    ) -> AsyncIterator[common.KvEventBatch]:
        raise NotOffered("KV events are not published: who computes what is decided behind this endpoint")


@dataclass(frozen=True, slots=True)
class _Answer:
    """Pieces as messages."""

    plan: Plan
    scored: bool

    def chunk(self, choice: Choice, piece: Piece) -> pb.GenerateStreamChunk:
        scores, logprobs = self._split(piece)
        return pb.GenerateStreamChunk(
            token_ids=piece.tokens,
            prompt_tokens=self.plan.num_prompt_tokens,
            completion_tokens=len(piece.tokens),  # as in vLLM, whose clients add them up
            cached_tokens=choice.cached_tokens,
            output_logprobs=_output_logprobs(logprobs) if self.plan.logprobs else None,
            input_logprobs=_input_logprobs(scores) if scores else None,
            index=choice.index,
        )

    def complete(self, choice: Choice, piece: Piece) -> pb.GenerateComplete:
        """All of a choice."""
        scores, logprobs = self._split(piece)
        end = self.end(choice, piece)
        if self.plan.logprobs:
            end.output_logprobs.CopyFrom(_output_logprobs(logprobs))
        if scores:
            end.input_logprobs.CopyFrom(_input_logprobs(scores))
        return end

    def end(self, choice: Choice, piece: Piece) -> pb.GenerateComplete:
        """After the chunks of a choice: its last tokens again."""
        assert piece.finish is not None
        return pb.GenerateComplete(
            output_ids=piece.tokens,
            finish_reason=piece.finish.value,
            prompt_tokens=self.plan.num_prompt_tokens,
            completion_tokens=choice.num_tokens,
            cached_tokens=choice.cached_tokens,
            index=choice.index,
            **self._matched(choice, piece),
        )

    def _matched(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """What has stopped it, if the client has asked for that."""
        if choice.stop_string:
            return {"matched_stop_str": choice.stop_string}
        stops = self.plan.sampling[choice.index].stop_token_ids
        if piece.finish is FinishReason.STOP and piece.tokens and piece.tokens[-1] in stops:
            return {"matched_token_id": piece.tokens[-1]}
        return {}

    def _split(self, piece: Piece) -> tuple[list[TokenLogprob], list[TokenLogprob]]:
        """The prompt's log-probabilities, and the output's."""
        prompt = len(self.plan.prompts[0].tokens) if self.scored and piece.first else 0
        return piece.logprobs[:prompt], piece.logprobs[prompt:]


def _output_logprobs(entries: Sequence[TokenLogprob]) -> pb.OutputLogProbs:
    return pb.OutputLogProbs(
        token_logprobs=[entry.logprob or 0.0 for entry in entries],  # None is a prompt's first token only
        token_ids=[entry.token for entry in entries],
        top_logprobs=[_top(entry) for entry in entries],
    )


def _input_logprobs(entries: Sequence[TokenLogprob]) -> pb.InputLogProbs:
    return pb.InputLogProbs(
        token_logprobs=[pb.InputTokenLogProb(value=entry.logprob) for entry in entries],
        token_ids=[entry.token for entry in entries],
        top_logprobs=[_top(entry) for entry in entries],
    )


def _top(entry: TokenLogprob) -> pb.TopLogProbs:
    return pb.TopLogProbs(values=[value for _, value in entry.top], token_ids=[token for token, _ in entry.top])


def _detokenizer(tokenizer: Tokenizer, params: pb.SamplingParams, prompt: Sequence[int]) -> Detokenizer:
    """Text is made only to find stop strings in it."""
    return tokenizer.detokenizer(prompt, special=not params.skip_special_tokens) if params.stop else Silent()


def _model_info(tokenizer: Tokenizer, folder: Path, name: str) -> pb.GetModelInfoResponse:
    """The model is called by its name: where it is on this machine is nobody's business."""
    config, generation = tokenizer.config, folder / "generation_config.json"
    generating = json.loads(generation.read_text()) if generation.is_file() else {}
    return pb.GetModelInfoResponse(
        model_path=name,
        is_generation=True,
        vocab_size=tokenizer.vocab_size,
        served_model_name=name,
        model_type=config.get("model_type") or "",
        architectures=config.get("architectures") or [],
        eos_token_ids=_ids(generating.get("eos_token_id", config.get("eos_token_id"))),
        pad_token_id=next(iter(_ids(config.get("pad_token_id"))), 0),
        bos_token_id=next(iter(_ids(config.get("bos_token_id"))), 0),
    )


def _ids(written: int | list[int] | None) -> list[int]:
    if written is None:
        return []
    return written if isinstance(written, list) else [written]


def packed(folder: Path) -> Packed:
    """The files of ``TOKENIZER_FILES`` that there are."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                files.writestr(zipfile.ZipInfo(name, EPOCH), (folder / name).read_bytes(), zipfile.ZIP_DEFLATED)
    written = archive.getvalue()
    return Packed(written, hashlib.sha256(written).hexdigest())

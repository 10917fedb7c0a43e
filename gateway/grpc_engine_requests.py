"""Requests of ``vllm.grpc.engine.VllmEngine`` as our own: what we cannot do is refused by its name, never ignored."""

from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from gateway.core.errors import InvalidRequest
from gateway.core.limits import Limits
from gateway.protos import vllm_engine_pb2 as pb
from gateway.request_models import CompletionRequest

INPUTS_OF_OTHERS = ("mm_inputs", "extra_mm_inputs", "media_refs")
HANDOVERS_OF_OTHERS = ("kv_transfer_params", "kv_transfer_params_json")
PLAIN = ("temperature", "min_p", "frequency_penalty", "presence_penalty", "ignore_eos", "include_stop_str_in_output")
"""Named and meant as ours are; not being set is as good as their default, but for ``temperature``, which can be set."""


def completion_of(request: pb.GenerateRequest, model: str, limits: Limits) -> CompletionRequest:
    """Raises ``InvalidRequest``."""
    _check(request, limits)
    params = request.sampling_params
    fields: dict[str, Any] = {name: getattr(params, name) for name in PLAIN if _is_set(params, name)}
    # Of these vLLM takes 0, which is what is not set, for the default.
    fields |= {name: getattr(params, name) or None for name in ("top_p", "repetition_penalty", "n")}
    fields |= {name: getattr(params, name) for name in ("max_tokens", "logprobs", "seed") if _is_set(params, name)}
    return CompletionRequest(
        model=model,
        prompt=_prompt(request),
        top_k=params.top_k,
        stop=list(params.stop),
        stop_token_ids=list(params.stop_token_ids),
        logit_bias={str(token): bias for token, bias in params.logit_bias.items()},
        **fields,
    )


def prompt_logprobs_of(request: pb.GenerateRequest) -> int | None:
    params = request.sampling_params
    return params.prompt_logprobs if params.HasField("prompt_logprobs") else None


def _prompt(request: pb.GenerateRequest) -> str | list[str | int | list[int]]:
    match request.WhichOneof("input"):
        case "tokenized":
            return list(request.tokenized.input_ids)
        case "text":
            return request.text
    raise InvalidRequest("there is no input; send tokenized.input_ids, or text", param="input")


def _check(request: pb.GenerateRequest, limits: Limits) -> None:
    if len(request.request_id) > limits.max_label_chars:
        raise InvalidRequest("request_id is too long", param="request_id")
    for name in INPUTS_OF_OTHERS:
        if _is_set(request, name):
            raise InvalidRequest(f"{name} is not supported: prompts are text or token ids", param=name)
    for name in HANDOVERS_OF_OTHERS:
        if _is_set(request, name):
            raise InvalidRequest(
                f"{name} is not taken from clients: prefill and decode are behind this endpoint", param=name
            )
    if request.data_parallel_rank != 0:
        raise InvalidRequest("data_parallel_rank: there is rank 0 only", param="data_parallel_rank")
    params = request.sampling_params
    unsupported = [params.WhichOneof("constraint"), *_set(params, "min_tokens", "truncate_prompt_tokens")]
    unsupported += _set(params, "grammar_from_first_token")
    for unsupported_name in unsupported:
        if unsupported_name is not None:
            raise InvalidRequest(f"{unsupported_name} is not supported", param=unsupported_name)
    for message, what in ((request, "the request"), (params, "sampling_params")):
        unknown = UnknownFieldSet(message)
        if len(unknown):
            raise InvalidRequest(f"{what} has a field with the number {unknown[0].field_number}, which is not known")


def _set(message: Message, *names: str) -> list[str]:
    return [name for name in names if _is_set(message, name)]


def _is_set(message: Message, name: str) -> bool:
    return any(field.name == name for field, _ in message.ListFields())

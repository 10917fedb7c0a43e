"""The bodies of requests, as OpenAI and vLLM name their fields. Types are strict ("5" is no integer, NaN no number),
unknown fields are refused, and decoding stops at the first fault, so a wrong body costs no more than a right one.

Fields of type ``Inert`` are known but not supported: they may be absent, or have a value that asks for nothing.
"""

import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from gateway.core.errors import InvalidRequest

Inert = Any
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Index = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]

ASKS_FOR_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
ALSO_INERT: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted, since padding is optional for a server."""
    resumable: bool = False
    """Whether the request goes on for a while without its client, which may read on: ``GET /v1/streams/{id}``."""


class SamplingRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """What completions and chat completions share."""

    model: str
    n: Index | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Index | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Index | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int64] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    return_token_ids: bool | None = None
    user: str | None = None
    cache_salt: str | None = None

    service_tier: Inert = None


class CompletionRequest(SamplingRequest, kw_only=True):
    prompt: str | list[str | int | list[Int64]]
    best_of: Index | None = None
    echo: bool | None = None
    logprobs: Index | None = None
    add_special_tokens: bool | None = None

    suffix: Inert = None


class ChatMessage(Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None

    refusal: Inert = None
    audio: Inert = None
    tool_calls: Inert = None
    function_call: Inert = None
    tool_call_id: Inert = None
    annotations: Inert = None


class ChatRequest(SamplingRequest, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: Index | None = None
    logprobs: bool | None = None
    top_logprobs: Index | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    """A label, as the next two."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    store: Inert = None
    tools: Inert = None
    tool_choice: Inert = None
    parallel_tool_calls: Inert = None
    functions: Inert = None
    function_call: Inert = None
    response_format: Inert = None
    modalities: Inert = None
    audio: Inert = None
    prediction: Inert = None
    prompt_cache_retention: Inert = None
    reasoning_effort: Inert = None
    verbosity: Inert = None
    web_search_options: Inert = None
    chat_template: Inert = None


INERT: dict[type[Struct], tuple[str, ...]] = {
    kind: tuple(name for name, hint in kind.__annotations__.items() if hint is Any and name != "content")
    for kind in (SamplingRequest, CompletionRequest, ChatMessage, ChatRequest)
}
"""The fields of each type, without those that it inherits, that are not supported."""
_completion_decoder = msgspec.json.Decoder(CompletionRequest)
_chat_decoder = msgspec.json.Decoder(ChatRequest)
_PATH = re.compile(r" - at `\$\.?(.*)`$")


def completion_request(body: bytes) -> CompletionRequest:
    """Raises ``InvalidRequest``."""
    request: CompletionRequest = _decoded(_completion_decoder, body)
    _refuse_unsupported(request, INERT[SamplingRequest] + INERT[CompletionRequest], "")
    return request


def chat_request(body: bytes) -> ChatRequest:
    """Raises ``InvalidRequest``."""
    request: ChatRequest = _decoded(_chat_decoder, body)
    _refuse_unsupported(request, INERT[SamplingRequest] + INERT[ChatRequest], "")
    return request


def completion_of(fields: dict[str, Any]) -> CompletionRequest:
    """From values that may be written as strings: "5" is an integer here. Raises ``InvalidRequest``."""
    try:
        request = msgspec.convert(fields, CompletionRequest, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(error) from error
    _refuse_unsupported(request, INERT[SamplingRequest] + INERT[CompletionRequest], "")
    return request


def check_message(message: ChatMessage, where: str) -> None:
    """Raises ``InvalidRequest`` for fields that are not supported. Not done while decoding: there may be far more
    messages than a request can have."""
    _refuse_unsupported(message, INERT[ChatMessage], where + ".")


def _decoded(decoder: "msgspec.json.Decoder[Any]", body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(error) from error
    except RecursionError as error:
        raise InvalidRequest("the JSON body is nested too deeply") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {str(error)[:200]}", code="invalid_json") from error


def _invalid(error: msgspec.ValidationError) -> InvalidRequest:
    message = str(error)
    path = _PATH.search(message)
    param = path.group(1)[:200] if path else None
    return InvalidRequest(_PATH.sub("", message)[:300], param=param or _unknown_field(message))


def _unknown_field(message: str) -> str | None:
    found = re.search(r"(?:unknown|required) field `([^`]{1,100})`", message)
    return found.group(1) if found else None


def _refuse_unsupported(request: Struct, names: tuple[str, ...], where: str) -> None:
    for name in names:
        value = getattr(request, name)
        if not _inert(value, (*ASKS_FOR_NOTHING, *ALSO_INERT.get(name, ()))):
            raise InvalidRequest(f"{where}{name} is not supported", param=where + name, code="unsupported_parameter")


def _inert(value: Any, inert: tuple[Any, ...]) -> bool:
    return any(type(value) is type(nothing) and value == nothing for nothing in inert)

"""The OpenAPI document at /openapi.json: every route, what it takes, every status that it may answer with.

Request bodies are described from the types that decode them (``request_models.py``), with the bounds that planning
checks afterwards. What no JSON schema can say, such as that a prompt and its answer fit into the context together, is
a 400 of a body that matches its schema.
"""

import copy
import json
from typing import Any

import msgspec

from gateway.core.limits import Limits
from gateway.orders import CHAT_ROLES, TEMPLATE_SWITCHES
from gateway.request_models import (
    ALSO_INERT,
    ASKS_FOR_NOTHING,
    INERT,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    SamplingRequest,
)
from messages.sampling import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}

ERRORS = {
    400: "The request is not valid.",
    401: "The API key is missing, or none of the cluster's.",
    403: "This path is for an admin's key.",
    404: "There is no such thing.",
    405: "This path does not take this method.",
    408: "The request did not arrive in time.",
    409: "Another connection reads the stream now.",
    413: "The body is too large.",
    415: "The content type is not application/json.",
    429: "Too much is asked at once: come again after Retry-After seconds.",
    500: "The request broke something.",
    503: "Nobody can answer now: come again after Retry-After seconds.",
}
COMES_BACK = (429, 503)
OF_POSTS = (400, 401, 404, 408, 413, 415, 429, 500, 503)


def document(*, version: str, model: str, vocab_size: int, max_model_len: int, limits: Limits, keyed: bool) -> Schema:
    """``keyed``: an API key is needed for all but ``/health`` and ``/ready``."""
    schemas = _request_schemas(model, vocab_size, max_model_len, limits) | _answer_schemas()
    document: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "Baton", "version": version},
        "paths": _paths(),
        "components": {"schemas": schemas},
    }
    if keyed:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        for path in ("/health", "/ready"):
            document["paths"][path]["get"]["security"] = []
    return document


def _paths() -> Schema:
    stream = {"text/event-stream": {"schema": _ref("Event")}}
    name = {"name": "name", "in": "path", "required": True, "schema": TEXT}
    stream_id = {"name": "id", "in": "path", "required": True, "schema": TEXT}
    request_id = {"name": "request_id", "in": "path", "required": True, "schema": TEXT}
    after = {"name": "after", "in": "query", "schema": TEXT, "description": "The id of the last event that was read."}
    last = {"name": "last-event-id", "in": "header", "schema": TEXT, "description": "The same, as EventSource says it."}
    return {
        "/v1/completions": _post("CompletionRequest", _json("Completion") | stream, "Continue prompts."),
        "/v1/chat/completions": _post("ChatRequest", _json("ChatCompletion") | stream, "Answer in a conversation."),
        "/v1/models": _get({200: _json("Models")}, "The one model that is served."),
        "/v1/models/{name}": _get({200: _json("Model"), 404: None}, "A model.", name),
        "/v1/streams/{id}": _get(
            {200: stream, 204: {}, 400: None, 404: None, 409: None, 429: None, 500: None, 503: None},
            "Read on in a stream, behind the event that was read last; 204 behind its end.",
            stream_id, after, last,
        ),
        "/traces/{request_id}": _get(
            {200: _json("Trace"), 403: None, 404: None}, "Who did what when for a request, for Perfetto.", request_id
        ),
        "/health": _get({200: _json("Health")}, "Whether this process answers.", open=True),
        "/ready": _get({200: _json("Ready"), 503: _json("Ready")}, "Whether the cluster takes requests.", open=True),
        "/status": _get({200: _json("Status"), 403: None}, "What runs, and how busy it is."),
        "/version": _get({200: _json("Version")}, "Which Baton this is."),
        "/metrics": _get({200: {"text/plain": {"schema": TEXT}}, 403: None}, "For Prometheus."),
        "/openapi.json": _get({200: {"application/json": {"schema": {"type": "object"}}}}, "This document."),
    }  # fmt: skip


def _post(body: str, answer: Schema, summary: str) -> Schema:
    content = {"application/json": {"schema": _ref(body)}}
    responses = {"200": _response("The answer, whole or as events.", answer)} | _errors(OF_POSTS)
    return {"post": {"summary": summary, "requestBody": {"required": True, "content": content}, "responses": responses}}


def _get(answers: dict[int, Schema | None], summary: str, *parameters: Schema, open: bool = False) -> Schema:
    """``answers``: content by status; None for an error. ``open``: it never needs a key."""
    errors = [status for status, content in answers.items() if content is None]
    responses = {
        str(status): _response("Its answer." if content else "Nothing more.", content)
        for status, content in answers.items()
        if content is not None
    } | _errors([*errors, *([] if open else [401])])
    operation: Schema = {"summary": summary, "responses": dict(sorted(responses.items()))}
    if parameters:
        operation["parameters"] = list(parameters)
    return {"get": operation}


def _errors(statuses: Any) -> Schema:
    found = {}
    for status in statuses:
        found[str(status)] = _response(ERRORS[status], _json("Error"))
        if status in COMES_BACK:
            wait = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
            found[str(status)]["headers"]["retry-after"] = wait
    return found


def _response(description: str, content: Schema) -> Schema:
    request_id = {"description": "The server's id of this request.", "schema": TEXT, "required": True}
    response: Schema = {"description": description, "headers": {"x-request-id": request_id}}
    return response | ({"content": content} if content else {})


def _json(name: str) -> Schema:
    return {"application/json": {"schema": _ref(name)}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


# What is asked


def _request_schemas(model: str, vocab_size: int, max_model_len: int, limits: Limits) -> Schema:
    types: tuple[type[msgspec.Struct], ...] = (CompletionRequest, ChatRequest)
    _, found = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schemas: Schema = json.loads(json.dumps(found))
    token = {"minimum": 0, "maximum": vocab_size - 1}
    label = {"maxLength": limits.max_label_chars}
    bounds: dict[str, Schema] = {
        "n": {"minimum": 1, "maximum": limits.max_n},
        "max_tokens": {"minimum": 0, "maximum": max_model_len},
        "max_completion_tokens": {"minimum": 1, "maximum": max_model_len},
        "temperature": {"minimum": 0, "maximum": 100},
        "top_p": {"exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"minimum": -1},
        "min_p": {"minimum": 0, "maximum": 1},
        "repetition_penalty": {"minimum": 0.01, "maximum": 100},
        "presence_penalty": {"minimum": -2, "maximum": 2},
        "frequency_penalty": {"minimum": -2, "maximum": 2},
        "top_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
        "user": label,
        "cache_salt": label | {"minLength": 1},
    }
    for kind in types:
        properties = schemas[kind.__name__]["properties"]
        for name, bound in bounds.items():
            if name in properties:
                _narrow(properties[name], bound)
        properties["model"] = {"type": "string", "enum": [model]}
        stop = {"type": "string", "minLength": 1, "maxLength": limits.max_stop_chars}
        stops = {"type": "array", "items": stop, "maxItems": limits.max_stop_strings}
        properties["stop"] = {"anyOf": [stop, stops, NULL], "default": None}
        ids = {"type": "array", "items": {"type": "integer"} | token, "maxItems": MAX_STOP_TOKEN_IDS}
        properties["stop_token_ids"] = {"anyOf": [ids, NULL], "default": None}
        bias = {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_LOGIT_BIAS,
        }
        properties["logit_bias"] = {"anyOf": [bias, NULL], "default": None}
        _describe_inert(properties, (*INERT[SamplingRequest], *INERT[kind]))
    _narrow(schemas["CompletionRequest"]["properties"]["logprobs"], {"minimum": 0, "maximum": MAX_LOGPROBS})
    one = {"type": "array", "items": {"type": "integer"} | token, "minItems": 1, "maxItems": max_model_len}
    text = {"type": "string", "minLength": 1}
    several = {"type": "array", "items": {"anyOf": [text, one]}, "minItems": 1}
    several["maxItems"] = limits.max_sequences_per_request
    schemas["CompletionRequest"]["properties"]["prompt"] = {"anyOf": [text, one, several]}
    _chat_schemas(schemas, limits)
    return schemas


def _chat_schemas(schemas: Schema, limits: Limits) -> None:
    chat = schemas["ChatRequest"]["properties"]
    chat["messages"] |= {"minItems": 1, "maxItems": limits.max_messages}
    switches = {name: FLAG for name in TEMPLATE_SWITCHES}
    kwargs = {"type": "object", "properties": switches, "additionalProperties": False}
    chat["chat_template_kwargs"] = {"anyOf": [kwargs, NULL], "default": None}
    message = schemas["ChatMessage"]["properties"]
    message["role"] = {"type": "string", "enum": list(CHAT_ROLES)}
    part = {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": TEXT},
        "required": ["type", "text"],
        "additionalProperties": False,
    }
    message["content"] = {"anyOf": [TEXT, {"type": "array", "items": part}]}
    schemas["ChatMessage"]["required"] = ["role", "content"]
    _narrow(message["name"], {"maxLength": limits.max_label_chars})
    _describe_inert(message, INERT[ChatMessage])


def _narrow(schema: Schema, bound: Schema) -> None:
    """Set bounds, also where null is possible too."""
    for branch in schema.get("anyOf", [schema]):
        if branch.get("type") != "null":
            branch.update(bound)


def _describe_inert(properties: Schema, names: tuple[str, ...]) -> None:
    """Fields that may only ask for nothing."""
    for name in names:
        values = [*ASKS_FOR_NOTHING, *ALSO_INERT.get(name, ())]
        properties[name] = {"enum": copy.deepcopy(values), "description": "Not supported."}


# What is answered


def _answer_schemas() -> Schema:
    finish = {"enum": ["stop", "length", None]}
    ids = {"type": "array", "items": COUNT}
    head = {"id": TEXT, "object": TEXT, "created": COUNT, "model": TEXT, "usage": _ref("Usage")}
    token = _object({"token": TEXT, "logprob": NUMBER, "bytes": {"type": "array", "items": COUNT}})
    chat_logprobs = _object({"content": {"type": "array", "items": _ref("TokenLogprob")}, "refusal": NULL})
    several = {"type": "array", "items": {"anyOf": [NUMBER, NULL]}}
    tops = {"type": "array", "items": {"anyOf": [{"type": "object", "additionalProperties": NUMBER}, NULL]}}
    logprobs = _object(
        {
            "tokens": {"type": "array", "items": TEXT},
            "token_logprobs": several,
            "top_logprobs": tops,
            "text_offset": ids,
        }
    )
    choice = {"index": COUNT, "finish_reason": finish}
    more = {"token_ids": ids, "prompt_token_ids": ids, "baton": {"type": "object"}}
    message = _object({"role": {"const": "assistant"}, "content": TEXT, "refusal": NULL})
    completion = choice | {"text": TEXT, "logprobs": {"anyOf": [logprobs, NULL]}}
    chat = choice | {"message": message, "logprobs": {"anyOf": [chat_logprobs, NULL]}}
    what = {"message": TEXT, "type": TEXT, "param": {"anyOf": [TEXT, NULL]}, "code": {"anyOf": [TEXT, NULL]}}
    cluster = {"anyOf": [{"type": "object"}, NULL]}
    card = {"id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT, "max_model_len": COUNT}
    usage = {
        "prompt_tokens": COUNT,
        "completion_tokens": COUNT,
        "total_tokens": COUNT,
        "prompt_tokens_details": _object({"cached_tokens": COUNT}),
    }
    return {
        "Completion": _object(head | {"choices": _array(_object(completion, more))}),
        "ChatCompletion": _object(head | {"choices": _array(_object(chat, more))}, {"prompt_token_ids": ids}),
        "TokenLogprob": _object(
            token["properties"] | {"top_logprobs": _array(token)},
        ),
        "Usage": _object(usage),
        "Model": _object(card),
        "Models": _object({"object": {"const": "list"}, "data": _array(_ref("Model"))}),
        "Error": _object({"error": _object(what)}),
        "Health": _object({"status": {"const": "ok"}}),
        "Ready": _object({"ready": FLAG}),
        "Status": _object({"ready": FLAG, "sequences_in_flight": COUNT, "cluster": cluster}),
        "Version": _object({"version": TEXT}),
        "Trace": {"type": "object"},
        "Event": {
            "type": "object",
            "description": "Each event: a chunk of the answer or an Error, as JSON, or at the end [DONE]. "
            "Its id can be given to /v1/streams/{id} as `after`.",
            "properties": {"id": TEXT, "data": TEXT},
            "required": ["id", "data"],
        },
    }


def _object(required: Schema, possible: Schema | None = None) -> Schema:
    properties = required | (possible or {})
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}

"""``ModelInferRequest`` as a completion of ours: text in, text out, by the names of Triton's vLLM backend.

A parameter may stand in the request's ``parameters``, in the JSON object of the tensor ``sampling_parameters``, or be a
tensor of its own name; what comes later in this list counts. What we do not know is refused by its name.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.core.errors import InvalidRequest
from gateway.core.limits import Limits
from gateway.grpc_tensors import Tensors, tensors_of
from gateway.protos import open_inference_pb2 as pb
from gateway.request_models import CompletionRequest, completion_of

TEXT_INPUT, SAMPLING_PARAMETERS = "text_input", "sampling_parameters"
SWITCHES = (
    "stream",
    "exclude_input_in_output",
    "return_finish_reason",
    "return_num_input_tokens",
    "return_num_output_tokens",
)
SCALARS = {
    "n": "INT32",
    "max_tokens": "INT32",
    "temperature": "FP32",
    "top_p": "FP32",
    "top_k": "INT32",
    "min_p": "FP32",
    "repetition_penalty": "FP32",
    "presence_penalty": "FP32",
    "frequency_penalty": "FP32",
    "seed": "INT64",
    "include_stop_str_in_output": "BOOL",
    "ignore_eos": "BOOL",
    "add_special_tokens": "BOOL",
    "cache_salt": "BYTES",
    "user": "BYTES",
}
"""Parameters of one element, with the data type that the metadata names; any that can be converted is taken."""
LISTS = {"stop": "BYTES", "stop_token_ids": "INT32"}
SAMPLING = (*SCALARS, *LISTS, "logit_bias")
INPUTS = frozenset({TEXT_INPUT, SAMPLING_PARAMETERS, *SCALARS, *LISTS, *SWITCHES})
FINAL_WANTED = "triton_enable_empty_final_response"
"""Whether the last response may say nothing else; ours says with the last tokens that it is the last."""
OUTPUTS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What one request asks for."""

    completion: CompletionRequest
    prepend: bool
    """Whether each text begins with its prompt."""
    outputs: tuple[str, ...]
    """Of ``OUTPUTS``."""

    @property
    def stream(self) -> bool:
        return bool(self.completion.stream)


def wanted_of(request: pb.ModelInferRequest, limits: Limits) -> Wanted:
    """Raises ``InvalidRequest``."""
    if len(request.id) > limits.max_label_chars:
        raise InvalidRequest("id is too long", param="id")
    for tensor in request.inputs:  # before anything is made of their contents
        _check_name(tensor.name, INPUTS)
    tensors = tensors_of(request)
    fields = _parameters(request) | _sampling_parameters(tensors) | _own_tensors(tensors)
    switches = {name: _switch(name, fields.pop(name, False if name != "exclude_input_in_output" else None))
                for name in SWITCHES}  # fmt: skip
    stream = bool(switches["stream"])
    excluded = switches["exclude_input_in_output"]
    if stream and excluded is False:
        raise InvalidRequest("exclude_input_in_output cannot be false for a stream", param="exclude_input_in_output")
    completion = completion_of({"model": request.model_name, "prompt": _texts(tensors), "stream": stream} | fields)
    return Wanted(
        completion=completion,
        prepend=not (stream or excluded),
        outputs=_outputs(request, switches),
    )


def _parameters(request: pb.ModelInferRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, parameter in request.parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise InvalidRequest(f"the parameter {name[:100]!r} has no value", param=name[:100])
        if name == FINAL_WANTED:
            continue
        _check_name(name, (*SAMPLING, *SWITCHES))
        fields[name] = getattr(parameter, choice)
    return fields


def _sampling_parameters(tensors: Tensors) -> dict[str, Any]:
    if SAMPLING_PARAMETERS not in tensors:
        return {}
    try:
        fields = msgspec.json.decode(_only(SAMPLING_PARAMETERS, tensors), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, TypeError, RecursionError) as error:
        raise InvalidRequest(
            f"{SAMPLING_PARAMETERS} must be a JSON object: {str(error)[:200]}", param=SAMPLING_PARAMETERS
        ) from error
    for name in fields:
        _check_name(name, SAMPLING)
    return fields


def _own_tensors(tensors: Tensors) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, values in tensors.items():
        if name in (TEXT_INPUT, SAMPLING_PARAMETERS):
            continue
        texts = [_text(name, value) if isinstance(value, bytes) else value for value in values]
        fields[name] = texts if name in LISTS else _only(name, {name: texts})
    return fields


def _outputs(request: pb.ModelInferRequest, switches: dict[str, bool | None]) -> tuple[str, ...]:
    """Those that are named; else the text, and what a switch asks for."""
    for output in request.outputs:
        if output.name not in OUTPUTS:
            names = ", ".join(OUTPUTS)
            raise InvalidRequest(f"there is no output {output.name[:100]!r}; there are {names}", param="outputs")
    named = {output.name for output in request.outputs} or {"text_output"}
    return tuple(name for name in OUTPUTS if name in named or switches.get(f"return_{name}"))


def _check_name(name: str, known: Collection[str]) -> None:
    if name not in known:
        raise InvalidRequest(f"{name[:100]!r} is not supported", param=name[:100], code="unsupported_parameter")


def _switch(name: str, value: Any) -> bool | None:
    try:
        return msgspec.convert(value, bool | None, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{name} must be true or false", param=name) from error


def _texts(tensors: Tensors) -> list[str]:
    values = tensors.get(TEXT_INPUT)
    if not values:
        raise InvalidRequest(f"the input {TEXT_INPUT} is missing", param=TEXT_INPUT)
    return [_text(TEXT_INPUT, value) for value in values]


def _text(name: str, value: Any) -> str:
    if not isinstance(value, bytes):
        raise InvalidRequest(f"{name} must be of type BYTES", param=name)
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name} is not UTF-8", param=name) from error


def _only(name: str, tensors: Tensors) -> Any:
    values = tensors[name]
    if len(values) != 1:
        raise InvalidRequest(f"{name} must have one element, it has {len(values)}", param=name)
    return values[0]

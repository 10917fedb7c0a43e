"""Tensors of the Open Inference Protocol: as contents of their type, or as raw bytes in row-major order, little-endian.

In raw bytes an element of type BYTES is its length in 4 bytes, then its bytes.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from gateway.core.errors import InvalidRequest
from gateway.protos import open_inference_pb2 as pb


class Kind(NamedTuple):
    """A data type: the field of ``InferTensorContents`` that has it, and its raw format (``struct``)."""

    contents: str
    raw: str


BYTES = "BYTES"
KINDS = {
    "BOOL": Kind("bool_contents", "?"),
    "INT8": Kind("int_contents", "b"),
    "INT16": Kind("int_contents", "h"),
    "INT32": Kind("int_contents", "i"),
    "INT64": Kind("int64_contents", "q"),
    "UINT8": Kind("uint_contents", "B"),
    "UINT16": Kind("uint_contents", "H"),
    "UINT32": Kind("uint_contents", "I"),
    "UINT64": Kind("uint64_contents", "Q"),
    "FP32": Kind("fp32_contents", "f"),
    "FP64": Kind("fp64_contents", "d"),
    BYTES: Kind("bytes_contents", ""),
}
MOST_DIMENSIONS = 8
"""Of any tensor; the product of very many would be a number that takes minutes to make."""
Tensors = dict[str, list[Any]]


def tensors_of(request: pb.ModelInferRequest) -> Tensors:
    """The elements of each input, by its name. Raises ``InvalidRequest``."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs")
    tensors: Tensors = {}
    for index, tensor in enumerate(request.inputs):
        name = tensor.name[:100]
        if tensor.name in tensors:
            raise InvalidRequest(f"the input {name!r} is there twice", param=name)
        if len(tensor.shape) > MOST_DIMENSIONS:
            raise InvalidRequest(f"{name} has more than {MOST_DIMENSIONS} dimensions", param=name)
        kind = KINDS.get(tensor.datatype)
        if kind is None:
            raise InvalidRequest(f"{name}: the data type must be one of {', '.join(KINDS)}", param=name)
        if raw and tensor.HasField("contents"):
            raise InvalidRequest(f"{name} has contents beside raw_input_contents", param=name)
        values = _raw_values(name, kind, raw[index]) if raw else list(getattr(tensor.contents, kind.contents))
        if min(tensor.shape, default=1) < 0 or math.prod(tensor.shape) != len(values):
            raise InvalidRequest(f"{name} has {len(values)} elements, its shape says otherwise", param=name)
        tensors[tensor.name] = values
    return tensors


def add_output(response: pb.ModelInferResponse, name: str, datatype: str, values: Sequence[Any], *, raw: bool) -> None:
    """One more output tensor, of one dimension."""
    output = response.outputs.add(name=name, datatype=datatype, shape=[len(values)])
    kind = KINDS[datatype]
    if not raw:
        getattr(output.contents, kind.contents).extend(values)
    elif datatype == BYTES:
        response.raw_output_contents.append(b"".join(struct.pack("<I", len(value)) + value for value in values))
    else:
        response.raw_output_contents.append(struct.pack(f"<{len(values)}{kind.raw}", *values))


def _raw_values(name: str, kind: Kind, raw: bytes) -> list[Any]:
    if kind.raw:
        size = struct.calcsize(f"<{kind.raw}")
        if len(raw) % size:
            raise InvalidRequest(f"{name}: {len(raw)} raw bytes are not elements of {size} bytes", param=name)
        return [value for (value,) in struct.iter_unpack(f"<{kind.raw}", raw)]
    values, start = [], 0
    while start < len(raw):
        if start + 4 > len(raw):
            raise InvalidRequest(f"{name}: the raw bytes end within the length of an element", param=name)
        (length,) = struct.unpack_from("<I", raw, start)
        start += 4
        if start + length > len(raw):
            raise InvalidRequest(f"{name}: the raw bytes end within an element", param=name)
        values.append(raw[start : start + length])
        start += length
    return values

"""Plain values (NamedTuples, dataclasses) that hold int32 arrays, as bytes: what a worker's ranks exchange."""

import math
from typing import Annotated, Any, get_origin

import msgspec
import numpy as np
from msgspec import Meta

from messages.codec import BadMessage, pack_tokens, unpack_tokens

_ARRAY: Any = tuple[Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1, max_length=2)], bytes]


class Wire:
    """Packs and unpacks values of the given types, by their names; nothing else goes through."""

    def __init__(self, *types: type) -> None:
        self._decoders: dict[str, Any] = {
            kind.__name__: msgspec.msgpack.Decoder(kind, dec_hook=_decode_array, ext_hook=_no_extension)
            for kind in types
        }
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)

    def pack(self, value: Any) -> tuple[str, bytes]:
        """``value`` -> the name of its type, and its bytes."""
        kind = type(value).__name__
        if kind not in self._decoders:
            raise TypeError(f"{kind} does not go from rank to rank")
        return kind, self._encoder.encode(value)

    def unpack(self, kind: str, body: bytes) -> Any:
        """The value again, its arrays read-only; ``BadMessage`` for anything else."""
        decoder = self._decoders.get(kind)
        if decoder is None:
            raise BadMessage(f"{kind!r} does not go from rank to rank")
        try:
            return decoder.decode(body)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise BadMessage(f"{kind}: {error}") from error


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype == np.int32:
        return value.shape, pack_tokens(value)
    raise NotImplementedError(f"{type(value).__name__} does not go from rank to rank")


def _decode_array(kind: Any, value: Any) -> Any:
    if (get_origin(kind) or kind) is not np.ndarray:
        raise NotImplementedError(f"{kind} does not go from rank to rank")
    shape, packed = msgspec.convert(value, _ARRAY)
    array = unpack_tokens(packed)
    if math.prod(shape) != len(array):
        raise ValueError(f"{len(array)} numbers are no array of {shape}")
    return array.reshape(shape)


def _no_extension(code: int, _data: memoryview) -> Any:
    raise ValueError(f"extension type {code} is not part of the protocol")

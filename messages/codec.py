"""MessagePack into typed, bounded messages, and back.

A decoder is made for the union of messages that one receiver may get; anything else (an unknown tag, a wrong type, a
value out of bounds, bytes left over) raises ``BadMessage``. Extension types are refused, so nothing but data comes in.
"""

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

Tokens = bytes
"""Token ids as packed little-endian int32: no Python object per token on the way."""


class BadMessage(ValueError):
    """Bytes that are no message of the expected kind."""


class Decode(Protocol):
    def __call__(self, frame: bytes | memoryview, /) -> Any: ...


def _refuse_extension(code: int, _data: memoryview) -> NoReturn:
    raise ValueError(f"extension type {code} is not part of the protocol")


_encoder = msgspec.msgpack.Encoder()
encode: Callable[[msgspec.Struct], bytes] = _encoder.encode


def decoder_for(*types: type[msgspec.Struct]) -> Decode:
    """A function from one frame to one of ``types``; it raises ``BadMessage`` for anything else."""
    union: Any = types[0]
    for kind in types[1:]:
        union = union | kind
    decoder = msgspec.msgpack.Decoder(union, ext_hook=_refuse_extension)

    def decode(frame: bytes | memoryview) -> Any:
        try:
            return decoder.decode(frame)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:  # msgspec's errors are ValueErrors
            raise BadMessage(one_line(error)) from error

    return decode


def one_line(error: BaseException) -> str:
    """What it says, for a log: it may quote the name of a field that its sender has made up."""
    return ascii(str(error)[:300])[1:-1]


def pack_tokens(tokens: NDArray[np.int32] | list[int]) -> Tokens:
    """Token ids -> packed little-endian int32."""
    return np.asarray(tokens, dtype="<i4").tobytes()


def unpack_tokens(packed: Tokens) -> NDArray[np.int32]:
    """The ids in ``packed`` as a read-only array; ``BadMessage`` if it is no whole number of them."""
    check_packed(packed)
    return np.frombuffer(packed, dtype="<i4")


def check_packed(packed: Tokens) -> None:
    """``BadMessage`` if ``packed`` is no whole number of int32."""
    if len(packed) % 4:
        raise BadMessage(f"{len(packed)} bytes are no whole number of int32")


def count_tokens(packed: Tokens) -> int:
    return len(packed) // 4

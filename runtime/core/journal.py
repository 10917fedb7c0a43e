"""What a state machine was told and what it answered, as bytes: the log from which a run is replayed.

Whatever goes in has a type whose name stands beside it, so that it comes back as what it was; answers are compared,
byte by byte, with those of the same machine in another process. Nothing but data is read.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, get_origin, get_type_hints

import msgspec
import numpy as np
from msgspec import Raw, Struct

from engine.core.sequence import Sequence
from messages.codec import BadMessage


class Made(Struct, frozen=True, tag=True, array_like=True):
    """A machine was made."""

    core: str
    """What it is: ``worker``, ``router``, ``session``."""
    key: str
    """Which one of them."""
    arguments: dict[str, Raw]
    """Of its maker, by name."""


class Called(Struct, frozen=True, tag=True, array_like=True):
    """A machine was called, and answered."""

    key: str
    method: str
    now: float
    kind: str
    """The type of ``event``; empty for none."""
    event: Raw
    answer: Raw
    """Its actions, as ``pack_answer`` says; or the type of what it raised."""


class Full(Struct, frozen=True, tag=True, array_like=True):
    """The file has reached its size: what came later is not in it."""


Entry = Made | Called | Full
_entries: msgspec.msgpack.Decoder[Entry] = msgspec.msgpack.Decoder(Entry)


def pack(value: Any) -> Raw:
    """``TypeError`` for what is not data."""
    return Raw(_encoder.encode(value))


def pack_answer(answer: Any) -> Raw:
    """Actions, each beside the name of its type; a step's plan with its actions likewise."""
    return pack(_named(answer))


def read_entry(record: bytes) -> Entry:
    try:
        return _entries.decode(record)
    except (ValueError, TypeError) as error:
        raise BadMessage(f"no entry of a journal: {error}") from error


class Types:
    """Values of these types, by their names."""

    def __init__(self, *types: type) -> None:
        self._decoders = {kind.__name__: decoder_of(kind) for kind in types}

    def knows(self, kind: type) -> bool:
        return kind.__name__ in self._decoders

    def unpack(self, kind: str, body: Raw) -> Any:
        decoder = self._decoders.get(kind)
        if decoder is None:
            raise BadMessage(f"a journal holds no {kind}")
        return decoder(body)


@lru_cache(maxsize=256)
def decoder_of(kind: Any) -> Callable[[Raw], Any]:
    """A function from ``pack``ed bytes to a value of that type; ``BadMessage`` for anything else."""
    decoder = msgspec.msgpack.Decoder(kind, dec_hook=_decode_hook)

    def decode(body: Raw) -> Any:
        try:
            return decoder.decode(body)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise BadMessage(f"{kind}: {error}") from error

    return decode


def make(maker: Callable[..., Any], arguments: dict[str, Raw]) -> Any:
    """Call ``maker`` with its recorded arguments, which its type hints say how to read."""
    hints = _hints(maker)
    unknown = arguments.keys() - hints.keys()
    if unknown:
        raise BadMessage(f"{maker.__name__} takes no {', '.join(sorted(unknown))}")
    return maker(**{name: decoder_of(hints[name])(body) for name, body in arguments.items()})


@lru_cache(maxsize=64)
def _hints(maker: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(maker.__init__ if inspect.isclass(maker) else maker)


def plain(body: Raw) -> Any:
    """For eyes: what ``pack`` has packed, without its types."""
    return msgspec.msgpack.decode(body)


def _named(answer: Any) -> Any:
    if isinstance(answer, list):
        return [(type(each).__name__, each) for each in answer]
    if type(answer) is tuple:
        return [_named(each) for each in answer]
    return answer


def _encode_hook(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Sequence):
        return value.seq_id
    if isinstance(value, Exception):
        return type(value).__name__, value.args, vars(value)
    raise NotImplementedError(f"{type(value).__name__} is no data")


_ARRAY: Any = tuple[str, tuple[int, ...], bytes]


def _decode_hook(kind: Any, value: Any) -> Any:
    if (get_origin(kind) or kind) is not np.ndarray:
        raise NotImplementedError(f"{kind} is no data")
    dtype, shape, data = msgspec.convert(value, _ARRAY)
    return np.frombuffer(data, np.dtype(dtype)).reshape(shape).copy()


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_hook)


def first_difference(recorded: Raw, replayed: Raw) -> str:
    """What differs first in two answers that are not equal; for eyes."""
    one, other = plain(recorded), plain(replayed)
    if not isinstance(one, list) or not isinstance(other, list):
        return f"recorded {_short(one)}, replayed {_short(other)}"
    for place, (mine, yours) in enumerate(zip(one, other, strict=False)):
        if mine != yours:
            return f"action {place}: recorded {_short(mine)}, replayed {_short(yours)}"
    rest = _short((one if len(one) > len(other) else other)[min(len(one), len(other)) :])
    return f"{'recorded' if len(one) > len(other) else 'replayed'} besides: {rest}"


def _short(value: Any, longest: int = 1000) -> str:
    text = repr(value)
    return text if len(text) <= longest else text[:longest] + "..."

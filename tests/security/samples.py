"""Messages of every type, drawn at random within the bounds that the type itself tells."""

from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
from msgspec import inspect

from messages import fingerprint
from messages.common import Message
from messages.sampling import SamplingParams

_TEXT = "abc-\N{GREEK SMALL LETTER ALPHA}\N{GRINNING FACE}\n 0"
_ADDRESSES = ("tcp://127.0.0.1:40123", "tcp://[::1]:1", "tcp://10.0.0.7:65535")
_TRIES = 200


def kinds() -> list[type[Message]]:
    """Every message of the protocol between processes."""
    return [
        kind
        for module in fingerprint._DIRECTIONS
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Message) and kind.__module__ == module.__name__ and _tagged(kind)
    ]


def _tagged(kind: type[Message]) -> bool:
    return bool(kind.__struct_config__.tag == kind.__name__)


def sample(kind: Any, rng: Random) -> Any:
    """One that a peer might send: what its type's own checks let through."""
    return _value(inspect.type_info(kind), rng)


def _struct(info: inspect.StructType, rng: Random) -> Any:
    for _ in range(_TRIES):
        fields = {field.name: _value(field.type, rng) for field in info.fields if field.required or rng.random() < 0.7}
        try:
            return info.cls(**fields)
        except ValueError:  # fields that do not go together
            continue
    raise AssertionError(f"no {info.cls.__name__} in {_TRIES} tries")


def _value(info: Any, rng: Random) -> Any:
    return _MAKERS[type(info)](info, rng)


def _sampling(info: inspect.DataclassType, rng: Random) -> Any:
    assert info.cls is SamplingParams, f"no way to make a {info.cls}"
    return SamplingParams(
        max_tokens=rng.randint(1, 2**22),
        temperature=rng.choice((0.0, 1.0, rng.random())),
        top_k=rng.randrange(5),
        seed=rng.getrandbits(63),
        stop_token_ids=tuple(rng.randrange(2**17) for _ in range(rng.randrange(3))),
        logprobs=rng.choice((None, 0, 20)),
        logit_bias={rng.randrange(2**17): rng.uniform(-100, 100) for _ in range(rng.randrange(3))},
    )


def _int(info: inspect.IntType, rng: Random) -> int:
    low = info.ge if info.ge is not None else (-(2**31) if info.gt is None else info.gt + 1)
    high = info.le if info.le is not None else (2**31 if info.lt is None else info.lt - 1)
    return rng.choice((low, min(high, low + rng.randrange(8)), rng.randint(low, high)))


def _float(info: inspect.FloatType, rng: Random) -> float:
    low = info.ge if info.ge is not None else (0.0 if info.gt is None else info.gt + 1e-3)
    return min(low + rng.random(), info.le if info.le is not None else float("inf"))


def _str(info: inspect.StrType, rng: Random) -> str:
    return rng.choice(_ADDRESSES) if info.pattern is not None else "".join(rng.choices(_TEXT, k=_length(info, rng)))


def _bytes(info: inspect.BytesType, rng: Random) -> bytes:
    return rng.randbytes(_length(info, rng) & ~3 or (info.min_length or 0))  # token and block ids have four each


def _items(info: Any, rng: Random) -> list[Any]:
    return [_value(info.item_type, rng) for _ in range(_length(info, rng, 3))]


_MAKERS: dict[type[Any], Callable[[Any, Random], Any]] = {
    inspect.StructType: _struct,
    inspect.DataclassType: _sampling,
    inspect.UnionType: lambda info, rng: _value(rng.choice(info.types), rng),
    inspect.IntType: _int,
    inspect.FloatType: _float,
    inspect.StrType: _str,
    inspect.BytesType: _bytes,
    inspect.ListType: _items,
    inspect.VarTupleType: lambda info, rng: tuple(_items(info, rng)),
    inspect.TupleType: lambda info, rng: tuple(_value(item, rng) for item in info.item_types),
    inspect.DictType: lambda info, rng: {
        _value(info.key_type, rng): _value(info.value_type, rng) for _ in range(rng.randrange(3))
    },
    inspect.EnumType: lambda info, rng: rng.choice(list(info.cls)),
    inspect.LiteralType: lambda info, rng: rng.choice(info.values),
    inspect.BoolType: lambda info, rng: rng.random() < 0.5,
    inspect.NoneType: lambda info, rng: None,
    inspect.AnyType: lambda info, rng: rng.choice((None, 1, "x")),
}


def _length(info: Any, rng: Random, few: int = 12) -> int:
    low = info.min_length or 0
    high = info.max_length if info.max_length is not None else 2**20
    return min(high, low + rng.randrange(few))


def fields_of(message: msgspec.Struct) -> Any:
    """As they go on the wire."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message))

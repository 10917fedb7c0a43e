"""From pydantic's errors to lines that a person can act on."""

import difflib
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.document import Document, Loc

_NOUNS = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list, each item starting with `- `",
    "model_type": "must hold keys of its own, indented below it",
    "model_attributes_type": "must hold keys of its own, indented below it",
    "finite_number": "must be a finite number",
}
_BOUNDS = {
    "greater_than": ("must be more than", "gt"),
    "greater_than_equal": ("must be at least", "ge"),
    "less_than": ("must be less than", "lt"),
    "less_than_equal": ("must be at most", "le"),
}
_PATTERNS = {
    "^[a-z][a-z0-9-]{0,39}$": "must be a short name of lower-case letters, digits and dashes, such as prefill",
    "^(cpu|cuda)$": "must be cpu or cuda",
}


def complaints(schema: type[BaseModel], document: Document, error: ValidationError) -> Iterator[tuple[Loc, str]]:
    """One for each error: where, and what to do."""
    details = error.errors()
    locs = [detail["loc"] for detail in details]
    for detail in details:
        loc = detail["loc"]
        if any(loc[:length] in document.unread for length in range(1, len(loc) + 1)):
            continue  # it is wrong only because it could not be read
        # A list whose items are wrong is also called too short.
        if detail["type"] != "too_short" or not any(
            len(other) > len(loc) and other[: len(loc)] == loc for other in locs
        ):
            yield loc, _text(schema, loc, detail)


def _text(schema: type[BaseModel], loc: Loc, detail: ErrorDetails) -> str:
    kind, context, name = detail["type"], detail.get("ctx", {}), _dotted(loc)
    got = _shown(detail["input"])
    match kind:
        case "extra_forbidden":
            known = list(_section(schema, loc[:-1]).model_fields)
            close = difflib.get_close_matches(str(loc[-1]), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
            return f"unknown key {loc[-1]!r}{_inside(loc)}; {hint}"
        case "missing":
            return f"{str(loc[-1])!r} is missing{_inside(loc)}; add it"
        case "literal_error":
            return f"{name} must be {str(context['expected']).replace(chr(39), '')}, got {got}"
        case "value_error":
            return f"{name}: {got} {context['error']}"
        case "string_pattern_mismatch":
            return f"{name} {_PATTERNS.get(str(context['pattern']), 'has the wrong form')}, got {got}"
        case "too_short" | "string_too_short":
            return f"{name} is empty; give at least one"
        case "too_long" | "string_too_long":
            return f"{name} is too long; {context.get('max_length')} is the most"
        case _ if kind in _BOUNDS:
            words, key = _BOUNDS[kind]
            return f"{name} {words} {_number(context[key])}, got {got}"
        case _:
            return f"{name} {_NOUNS.get(kind, detail['msg'])}, got {got}{_quotes(kind, detail['input'])}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value}"


def _quotes(kind: str, value: object) -> str:
    """YAML takes 8000 for a number, "8000" for text, and no for false."""
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "; put it in quotes"
    if kind in ("int_type", "float_type") and isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d+)?", value):
        return "; remove the quotes"
    return ""


def _dotted(loc: Loc) -> str:
    """("pools", 0, "role") -> pools[0].role"""
    text = ""
    for step in loc:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _inside(loc: Loc) -> str:
    return f" in {_dotted(loc[:-1])}" if len(loc) > 1 else ""


def _shown(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _section(schema: type[BaseModel], loc: Loc) -> type[BaseModel]:
    """The schema of the section at ``loc``."""
    for step in loc:
        if isinstance(step, str):
            schema = next(_models(schema.model_fields[step].annotation))
    return schema


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, types.UnionType, tuple):
        for part in get_args(annotation):
            yield from _models(part)

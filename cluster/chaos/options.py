"""What is said on the command line."""

import re

import typer

from cluster.chaos.core.faults import Kind

_TIME = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)(ms|s|m|h|)")
_UNITS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """``90s``, ``1.5m``, ``10``."""
    match = _TIME.fullmatch(text.strip())
    value = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if value <= 0:
        raise typer.BadParameter(f"{text!r} is no time; write one such as 60s or 10m")
    return value


def kinds(text: str) -> tuple[Kind, ...]:
    """``kill,stop``."""
    found = []
    for name in text.split(","):
        try:
            found.append(Kind(name.strip()))
        except ValueError:
            there_are = ", ".join(kind.value for kind in Kind)
            raise typer.BadParameter(f"{name.strip()!r} is no kind of fault; there are {there_are}") from None
    return tuple(dict.fromkeys(found))

"""How far a client has read a stream: the ids of its server-sent events.

An id says of each choice how many tokens its text so far stands for, with an ``e`` once the choice has ended; then
whether the usage, or the end of the stream, has been sent: ``12``, ``12,7e``, ``16e,9e,usage``, ``16e,9e,done``. What a
client has been sent up to an id follows from the request and that many tokens alone, however they came. So whoever has
the tokens can send just the rest.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from gateway.core.errors import InvalidRequest

USAGE, DONE = "usage", "done"
_CHOICE = re.compile(r"([0-9]{1,9})(e?)")


class Position(NamedTuple):
    """How far one choice has been read."""

    tokens: int = 0
    ended: bool = False

    def __str__(self) -> str:
        return f"{self.tokens}e" if self.ended else str(self.tokens)

    @property
    def begun(self) -> bool:
        """Whether anything has been sent."""
        return self.tokens > 0 or self.ended


START = Position()


class Cursor(NamedTuple):
    """How far an answer has been read."""

    choices: tuple[Position, ...]
    usage: bool = False


def event_id(choices: Iterable[Position], *tail: str) -> str:
    """The id after which ``choices`` stand like this."""
    return ",".join([*map(str, choices), *tail])


def at_end(text: str) -> bool:
    """Whether an id is the last one of a stream."""
    return text.endswith("," + DONE)


def parse(text: str, num_choices: int) -> Cursor:
    """The position that an id names which is not the last one; an empty one is the start. Raises ``InvalidRequest`` for
    what is no id of a stream with so many choices."""
    if not text:
        return Cursor((START,) * num_choices)
    parts = text.split(",", num_choices + 1)
    usage = parts[-1] == USAGE and bool(parts.pop())
    found = [_CHOICE.fullmatch(part) for part in parts]
    positions = tuple(Position(int(match[1]), bool(match[2])) for match in found if match is not None)
    if len(positions) != len(parts) or len(positions) != num_choices:
        raise InvalidRequest(f"not the id of an event of this stream: {text[:100]!r}", param="after")
    return Cursor(positions, usage)

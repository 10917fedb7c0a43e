"""Reads a YAML file into plain data, and remembers on which line everything stands.

Safe by construction: only scalars, lists and mappings with text keys; no tags, no duplicate keys, and caps on size,
depth and on what aliases expand to.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import TopologyError

MAX_BYTES = 256 << 10
MAX_NODES = 10_000
"""Values in the document, each use of an alias counted again."""
MAX_DEPTH = 20

Loc = tuple[int | str, ...]
"""The way to a value: ("pools", 0, "role")."""

_STANDARD = "tag:yaml.org,2002:"
_SCALARS = ("str", "int", "float", "bool", "null")


@dataclass(frozen=True)
class Document:
    """A mapping, and the line (from 1) of each of its keys and items."""

    file: str
    data: dict[str, Any]
    lines: dict[Loc, int] = field(default_factory=dict)
    problems: tuple[tuple[int, str], ...] = ()
    """Lines, and what is wrong there, that could not be taken into ``data``."""
    unread: frozenset[Loc] = frozenset()
    """Values that are None in ``data`` because they could not be read; ``problems`` says why."""

    def line(self, loc: Loc) -> int:
        """Of the value at ``loc``, or of the nearest thing around it."""
        while loc and loc not in self.lines:
            loc = loc[:-1]
        return self.lines.get(loc, 1)

    def at(self, loc: Loc, text: str) -> str:
        """``FILE:LINE: text``, the way that every complaint about a topology looks."""
        return self._at(self.line(loc), text)

    def error(self, found: Iterable[tuple[Loc, str]]) -> TopologyError:
        """All that was found, with what could not be read, in the order of the file."""
        both = [*self.problems, *((self.line(loc), text) for loc, text in found)]
        return TopologyError(*(self._at(line, text) for line, text in sorted(both, key=lambda pair: pair[0])))

    def _at(self, line: int, text: str) -> str:
        return f"{self.file}:{line}: {text}" if self.lines else f"{self.file}: {text}"


def read(path: Path) -> Document:
    """The document in ``path``; ``TopologyError`` where it is not one."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = getattr(error, "strerror", None) or error
        raise TopologyError(f"{path}: cannot be read: {reason}; name an existing YAML file") from error
    if len(content) > MAX_BYTES:
        raise TopologyError(f"{path}:1: the file is larger than {MAX_BYTES >> 10} KiB; a topology is a small file")
    try:
        node = yaml.compose(content.decode(), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise TopologyError(f"{path}:1: the file is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise TopologyError(_syntax(path, error)) from error
    except RecursionError as error:
        raise TopologyError(f"{path}:1: values are nested too deep; a topology is flat") from error
    if not isinstance(node, yaml.MappingNode):
        what = "the file is empty" if node is None else "the file holds no mapping"
        raise TopologyError(f"{path}:1: {what}; start with `model:` and `pools:`")
    reader = _Reader(str(path))
    data = reader.mapping(node, ())
    return Document(str(path), data, reader.lines, tuple(reader.problems), frozenset(reader.unread))


def _syntax(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = mark.line + 1 if mark else 1
    problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or "no YAML")
    if "'\\t'" in problem:
        return f"{path}:{line}: a tab stands where YAML wants spaces; indent with spaces"
    if "another document" in problem:
        return f"{path}:{line}: a second document starts here; a topology is one, so remove the `---`"
    if "special characters" in problem:
        return f"{path}:{line}: the file holds control characters; a topology is plain text"
    advice = "" if "alias" in problem else "; check indentation and quotes"
    return f"{path}:{line}: the YAML cannot be read: {problem}{advice}"


class _Unreadable(Exception):
    """A value that cannot be taken into the data."""


class _Reader:
    """Collects what it has to leave out, so that a file's complaints come all at once."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._loader = yaml.SafeLoader("")
        self._nodes = 0
        self.lines: dict[Loc, int] = {}
        self.problems: list[tuple[int, str]] = []
        self.unread: set[Loc] = set()

    def value(self, node: yaml.Node, loc: Loc) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise self._end(node, f"more than {MAX_NODES} values; a topology is a small file, and aliases count")
        if len(loc) > MAX_DEPTH:
            raise self._end(node, "values are nested too deep; a topology is flat")
        self.lines.setdefault(loc, node.start_mark.line + 1)
        kind = node.tag.removeprefix(_STANDARD)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self.mapping(node, loc)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return self._sequence(node, loc)
        if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
            try:
                return self._loader.construct_object(node)
            except (ValueError, yaml.YAMLError) as error:
                raise self._leave_out(node, loc, f"{node.value[:40]!r} cannot be read: {error}") from error
        if isinstance(node, yaml.ScalarNode) and kind == "timestamp":
            raise self._leave_out(node, loc, f"{node.value!r} reads as a date; put it in quotes")
        tag = node.tag.replace(_STANDARD, "!!")
        raise self._leave_out(node, loc, f"the tag {tag} is not allowed; write plain text, numbers, lists and mappings")

    def mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != f"{_STANDARD}str":
                self._note(key_node, "keys must be plain text; quote this one, or use the key that was meant")
                continue
            key = str(key_node.value)
            here = (*loc, key)
            if key in data:
                self._note(key_node, f"{key!r} stands twice, first on line {self.lines[here]}; remove one of them")
                continue
            self.lines[here] = key_node.start_mark.line + 1
            data[key] = None
            with contextlib.suppress(_Unreadable):
                data[key] = self.value(value_node, here)
        return data

    def _sequence(self, node: yaml.SequenceNode, loc: Loc) -> list[Any]:
        items: list[Any] = []
        for item in node.value:
            items.append(None)
            with contextlib.suppress(_Unreadable):
                items[-1] = self.value(item, (*loc, len(items) - 1))
        return items

    def _note(self, node: yaml.Node, text: str) -> None:
        self.problems.append((node.start_mark.line + 1, text))

    def _leave_out(self, node: yaml.Node, loc: Loc, text: str) -> _Unreadable:
        self._note(node, text)
        self.unread.add(loc)
        return _Unreadable(text)

    def _end(self, node: yaml.Node, text: str) -> TopologyError:
        return TopologyError(f"{self._file}:{node.start_mark.line + 1}: {text}")

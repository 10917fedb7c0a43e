"""Reads a YAML file into plain data, and remembers on which line everything stands.

Safe by construction: only scalars, lists and mappings with text keys; no tags, no duplicate keys, and caps on size,
depth and on what aliases expand to.
"""

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

_SCALARS = ("str", "int", "float", "bool", "null")


@dataclass(frozen=True)
class Document:
    """A mapping, and the line (from 1) of each of its keys and items."""

    file: str
    data: dict[str, Any]
    lines: dict[Loc, int] = field(default_factory=dict)

    def line(self, loc: Loc) -> int:
        """Of the value at ``loc``, or of the nearest thing around it."""
        while loc and loc not in self.lines:
            loc = loc[:-1]
        return self.lines.get(loc, 1)

    def at(self, loc: Loc, text: str) -> str:
        """``FILE:LINE: text``, the way that every complaint about a topology looks."""
        return f"{self.file}:{self.line(loc)}: {text}" if self.lines else f"{self.file}: {text}"


def read(path: Path) -> Document:
    """The document in ``path``; ``TopologyError`` where it is not one."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise TopologyError(f"{path}: cannot be read: {error.strerror}; name an existing YAML file") from error
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
        raise TopologyError(f"{path}:1: the file holds no mapping; start with `model:` and `pools:`")
    reader = _Reader(str(path))
    data = reader.value(node, ())
    return Document(str(path), data, reader.lines)


def _syntax(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or "no YAML")
    return f"{path}:{mark.line + 1 if mark else 1}: the YAML cannot be read: {problem}; check indentation and quotes"


class _Reader:
    def __init__(self, file: str) -> None:
        self._file = file
        self._loader = yaml.SafeLoader("")
        self._nodes = 0
        self.lines: dict[Loc, int] = {}

    def value(self, node: yaml.Node, loc: Loc) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise self._error(node, f"more than {MAX_NODES} values; a topology is a small file, and aliases count")
        if len(loc) > MAX_DEPTH:
            raise self._error(node, "values are nested too deep; a topology is flat")
        self.lines.setdefault(loc, node.start_mark.line + 1)
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, loc)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(item, (*loc, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
            try:
                return self._loader.construct_object(node)
            except (ValueError, yaml.YAMLError) as error:
                raise self._error(node, f"{node.value!r} cannot be read: {error}") from error
        raise self._error(node, f"{node.tag!r} is not allowed here; write plain text, numbers, lists and mappings")

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                raise self._error(key_node, "keys must be plain text; quote this one, or use the key that was meant")
            key = str(key_node.value)
            if key in data:
                first = self.lines[(*loc, key)]
                raise self._error(key_node, f"{key!r} stands twice, first on line {first}; remove one of them")
            self.lines[(*loc, key)] = key_node.start_mark.line + 1
            data[key] = self.value(value_node, (*loc, key))
        return data

    def _error(self, node: yaml.Node, text: str) -> TopologyError:
        return TopologyError(f"{self._file}:{node.start_mark.line + 1}: {text}")

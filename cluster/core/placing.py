"""On which host a worker runs: facts about hosts in, a choice or the reasons against each out.

All ranks of a worker go to one host. Of the hosts that have its labels and room for it, the one with the fewest workers
of the same pool is taken, so that the loss of a host costs a pool as little as can be.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

_SEVERAL = re.compile(r"(!?)in\(([^()]*)\)")
_ROUNDING = 1e-9

Needs = Mapping[str, float]
"""Ray's name of a resource -> how much of it."""


class Node(NamedTuple):
    """One host of the Ray that was joined, as Ray knows it."""

    id: str
    address: str
    """That it has among the others."""
    name: str
    labels: Mapping[str, str]
    free: Needs

    def __str__(self) -> str:
        return self.address if self.name in ("", self.address) else f"{self.name} ({self.address})"


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a host with ``labels`` is meant, in Ray's language: ``v``, ``!v``, ``in(a, b)``, ``!in(a, b)``."""
    return all(_matches(labels.get(key), wanted) for key, wanted in selector.items())


def _matches(value: str | None, wanted: str) -> bool:
    several = _SEVERAL.fullmatch(wanted)
    if several is not None:
        listed = value in [each.strip() for each in several[2].split(",")]
        return listed != bool(several[1])
    if wanted.startswith("!"):
        return value != wanted[1:]
    return value == wanted


def total(needs: Iterable[Needs]) -> dict[str, float]:
    """What several processes take together."""
    together: dict[str, float] = {}
    for each in needs:
        for name, amount in each.items():
            together[name] = together.get(name, 0.0) + amount
    return together


def lacking(node: Node, wanted: Needs) -> dict[str, float]:
    """What of ``wanted`` is not free there -> how much of it is."""
    return {
        name: node.free.get(name, 0.0)
        for name, amount in wanted.items()
        if amount > node.free.get(name, 0.0) + _ROUNDING
    }


def choose(
    nodes: Sequence[Node], wanted: Needs, selector: Mapping[str, str], neighbours: Mapping[str, int]
) -> Node | None:
    """The host for a worker; None where none has room now. ``neighbours``: workers of its pool, by host."""
    fitting = [node for node in nodes if matches(node.labels, selector) and not lacking(node, wanted)]
    return min(
        fitting,
        key=lambda node: (neighbours.get(node.id, 0), -node.free.get("CPU", 0.0), node.address, node.id),
        default=None,
    )

"""How long the rest of a hand-over may drag before the request goes another way: what that way costs, and some more."""

from collections.abc import Iterable

from runtime.core.recent import Cost

AT_LEAST = 0.8
"""Seconds: what is no slower is not worth an attempt. Where another way takes 0.2 the decision falls within one."""
TIMES = 4.0
"""What another way cost of late it may cost so many times over: the machine that both run on may have become slow."""


def patience(compute: float, num_bytes: int, others: Iterable[Cost]) -> float:
    """Seconds from the first token on. ``compute``: those that the whole prompt takes to compute. ``others``: what KV
    takes to other decode workers, by its ``num_bytes``."""
    ways = [compute, *(cost.seconds(num_bytes) for cost in others if cost.latency > 0 or cost.rate > 0)]
    return max(AT_LEAST, TIMES * min(ways))

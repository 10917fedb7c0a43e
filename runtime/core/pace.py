"""How many tokens a step may have, so that it ends in time: a worker reports between its steps, and one that does not
report for long is taken for lost.
"""

from math import ceil

STEP_SECONDS = 1.0
"""Well below ``router.liveness_timeout``, and little to wait for one's next token beside a long prompt."""
MEASURED = 32
"""Steps of fewer tokens mostly read weights, and say nothing about the pace of prompts."""
FIRST_STEP = 5.0
"""Seconds that a step is expected to take before one was measured."""
PATIENCE = 1.25
"""Where no step ends in time: how much longer than the shortest one a step may take."""


class StepPace:
    """Learns the pace of steps, and bounds the next one to about ``target`` seconds, at most ``most`` tokens.

    A single slow step (another process had the machine) costs little: the budget falls to a quarter at the least, and
    doubles with each step that went well. Where even the shortest step takes longer than ``target``, since it reads all
    weights, fewer tokens would not shorten it: then there may be as many as cost little more than one does.
    """

    def __init__(self, target: float, most: int) -> None:
        assert target > 0 and most > 0
        self._target = target
        self._most = most
        self._known = False
        self._shortest = float("inf")
        """Seconds of the shortest step, whatever was in it."""
        self.budget = min(most, MEASURED)
        """Tokens that the next step may have."""
        self._least = 0.0
        """Seconds of the last step of few tokens."""
        self._per_token = 0.0
        """Seconds, in the last step of more."""

    def expected(self, tokens: int) -> float:
        """Seconds that a step of ``tokens`` takes, by those before it. The first one warms up what all others use."""
        if self._shortest == float("inf"):
            return FIRST_STEP
        return max(self._least, tokens * self._per_token)

    def took(self, tokens: int, seconds: float) -> None:
        """A step of ``tokens`` took so long; the first one sets the pace."""
        if seconds <= 0:
            return
        self._shortest = min(self._shortest, seconds)
        if tokens < min(MEASURED, self.budget):
            self._least = seconds
            return
        self._per_token = seconds / tokens
        hopeless = self._known and self._shortest > self._target
        fits = tokens / seconds * (PATIENCE * self._shortest if hopeless else self._target)
        if self._known:
            fits = min(max(fits, self.budget / 4), self.budget * 2)
        self._known = True
        self.budget = min(ceil(fits), self._most)

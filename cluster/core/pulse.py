"""Whether a process that is asked all the time still turns."""

PAUSE = 0.5
"""Seconds between two looks from which who looks stood still itself, or was not let run."""


class Pulse:
    """``beat`` at every answer, ``still`` at every look; ``now`` never goes back."""

    def __init__(self, timeout: float, now: float) -> None:
        """``timeout``: seconds without an answer, while somebody looks, after which it stands still."""
        self._timeout = timeout
        self._beat = self._looked = now

    def beat(self, now: float) -> None:
        self._beat = now

    def still(self, now: float) -> bool:
        """Time for which nobody looked does not count: the answer may have been there."""
        if now - self._looked >= PAUSE:
            self._beat = min(now, self._beat + now - self._looked)
        self._looked = now
        return now - self._beat >= self._timeout

"""Whether a process that is asked again and again still turns."""


class Pulse:
    """``ask``, ``beat`` at the answer, ``still`` at every look; ``now`` never goes back."""

    def __init__(self, timeout: float) -> None:
        """``timeout``: seconds without an answer, while somebody looks, after which it stands still."""
        self._timeout = timeout
        self._asked: float | None = None
        self._looked = 0.0

    def ask(self, now: float) -> None:
        """A question goes out; one that is asked again, since its answer cannot come any more, is as old as it was."""
        if self._asked is None:
            self._asked = self._looked = now

    def beat(self) -> None:
        """The answer has come."""
        self._asked = None

    def still(self, now: float) -> bool:
        """Time for which nobody looked, a quarter of the timeout or more, does not count: who looks stood still."""
        if self._asked is None:
            return False
        if now - self._looked >= self._timeout / 4:
            self._asked += now - self._looked
        self._looked = now
        return now - self._asked >= self._timeout

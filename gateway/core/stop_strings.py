"""Stop strings in a text that arrives in pieces.

What could still become a stop string is held back. The result does not depend on where the text is cut, so a resumed
stream ends where the first one would have. One automaton a string (Knuth, Morris, Pratt 1977): constant work a
character.
"""

from typing import NamedTuple


class Emitted(NamedTuple):
    text: str
    matched: bool


class StopStrings:
    """The stop string that is complete first ends the text; of several that end together the longest."""

    def __init__(self, stops: tuple[str, ...], *, include: bool) -> None:
        """``stops``: not empty strings. ``include``: the text keeps the stop string at its end."""
        self._stops = [(stop, _failures(stop)) for stop in stops]
        self._states = [0] * len(stops)  # characters of each stop string that the text ends with
        self._include = include
        self._held = ""
        self.matched = ""
        """The stop string that has ended the text."""

    def feed(self, text: str) -> Emitted:
        """The text that is safe to emit now. After a match there is nothing more to feed."""
        if not self._stops or not text:
            return Emitted(text, False)
        pending = self._held + text
        states = self._states
        for position in range(len(self._held), len(pending)):
            character = pending[position]
            match = 0
            for i, (stop, failures) in enumerate(self._stops):
                state = states[i]
                while state and stop[state] != character:
                    state = failures[state - 1]
                if stop[state] == character:
                    state += 1
                if state == len(stop):
                    match = max(match, state)
                    state = 0
                states[i] = state
            if match:
                self._held = ""
                self.matched = pending[position + 1 - match : position + 1]
                return Emitted(pending[: position + 1 if self._include else position + 1 - match], True)
        safe = len(pending) - max(states)
        self._held = pending[safe:]
        return Emitted(pending[:safe], False)

    def flush(self) -> str:
        """What was held back, at the end of a text without a match."""
        held, self._held = self._held, ""
        return held


def _failures(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is its suffix too."""
    failures = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = failures[length - 1]
        if stop[i] == stop[length]:
            length += 1
        failures[i] = length
    return failures

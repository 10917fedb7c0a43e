"""The gateways that the router knows, each by the last message that named it.

One that falls silent is lost: its requests are kept for a while, on the workers too, for another gateway to adopt, or
for itself to come back.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from messages.ids import Address

MAX_GATEWAYS = 256
"""Known at once. Whoever reaches the mailbox can name addresses; beyond this the most silent one is forgotten."""


@dataclass(slots=True)
class Lost:
    """A gateway of which nothing is heard."""

    until: float
    """When its requests are dropped."""
    tell_at: float
    """When workers are told the next time."""


class Gateways:
    """``grace``: seconds for which the requests of a lost one are kept; ``tell_every``: between two tellings of it."""

    def __init__(self, timeout: float, grace: float, tell_every: float) -> None:
        self._timeout = timeout
        self._grace = grace
        self._tell_every = tell_every
        self._heard: OrderedDict[Address, float] = OrderedDict()  # the most silent one first
        self._holdings: set[Address] = set()
        self._named: set[Address] = set()  # by workers only
        self._lost: dict[Address, Lost] = {}

    def __len__(self) -> int:
        return len(self._heard) + len(self._lost)

    def __iter__(self) -> Iterator[Address]:
        """Live ones, and those that may come back."""
        return iter((*self._heard, *self._lost))

    def heard(self, gateway: Address, now: float) -> bool:
        """Something has come from ``gateway``; whether it was lost before."""
        self._heard[gateway] = now
        self._heard.move_to_end(gateway)
        self._named.discard(gateway)
        if len(self._heard) > MAX_GATEWAYS:
            most_silent, _ = self._heard.popitem(last=False)
            self._holdings.discard(most_silent)
            self._named.discard(most_silent)
        return self._lost.pop(gateway, None) is not None

    def named(self, gateway: Address, now: float) -> None:
        """A worker has requests of it. That shows no life; but one that this router has never heard may be dead."""
        if gateway not in self._heard and gateway not in self._lost:
            self.heard(gateway, now)
            self._named.add(gateway)

    def lives(self, gateway: Address) -> bool:
        """Whether something has come from it, and not too long ago."""
        return gateway in self._heard and gateway not in self._named

    def holds(self, gateway: Address) -> None:
        """It has said all that it holds."""
        self._holdings.add(gateway)

    def has_said(self, gateway: Address) -> bool:
        """Whether it has said what it holds."""
        return gateway in self._holdings

    def silent(self, now: float) -> list[Address]:
        """Those not heard for too long."""
        return [gateway for gateway, heard in self._heard.items() if heard + self._timeout <= now]

    def lose(self, gateway: Address, now: float) -> None:
        """It is silent, or dead; harmless twice."""
        self._heard.pop(gateway, None)
        self._named.discard(gateway)
        self._holdings.discard(gateway)
        if gateway not in self._lost:
            self._lost[gateway] = Lost(now + self._grace, now)

    def to_tell(self, now: float) -> list[Address]:
        """Lost ones of which the workers are to be told now."""
        due = [gateway for gateway, lost in self._lost.items() if lost.tell_at <= now]
        for gateway in due:
            self._lost[gateway].tell_at = now + self._tell_every
        return due

    def forget(self, now: float) -> list[Address]:
        """Lost ones whose requests are over now; they are not known any more."""
        over = [gateway for gateway, lost in self._lost.items() if lost.until <= now]
        for gateway in over:
            del self._lost[gateway]
        return over

    def stood_still(self, seconds: float, now: float) -> None:
        """For so long nobody could be heard."""
        for gateway, heard in self._heard.items():
            self._heard[gateway] = min(now, heard + seconds)

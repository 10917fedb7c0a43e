"""Requests whose gateway is gone: kept for a while, for another gateway to adopt or for their own to come back."""

from collections.abc import Iterator

from messages.ids import Address
from messages.router_to_worker import GatewayBack, GatewayLost

GRACE = 10.0
"""Seconds from the word that a gateway is lost to the end of its requests."""


class Orphans:
    """The gateways that the router has said are lost. Their requests go on meanwhile: who adopts one gets it all."""

    def __init__(self) -> None:
        self._until: dict[Address, float] = {}
        """Until when its requests are kept; in order."""
        self._over: dict[Address, float] = {}
        """When the socket to a gateway is closed whose requests were dropped: it was told of that."""

    def __len__(self) -> int:
        return len(self._until)

    def __iter__(self) -> Iterator[Address]:
        """Gateways whose requests will be dropped."""
        return iter(self._until)

    def heard(self, event: GatewayLost | GatewayBack, now: float) -> None:
        """Said again, it changes nothing."""
        if isinstance(event, GatewayBack):
            self._until.pop(event.gateway, None)
            self._over.pop(event.gateway, None)
        elif event.gateway not in self._over:
            self._until.setdefault(event.gateway, now + GRACE)

    def dropped(self, now: float) -> list[Address]:
        """Gateways whose requests are over now."""
        late = [gateway for gateway, until in self._until.items() if until <= now]
        for gateway in late:
            del self._until[gateway]
            self._over[gateway] = now + GRACE
        return late

    def forgotten(self, now: float) -> list[Address]:
        """Gateways that nothing is sent to any more."""
        late = [gateway for gateway, until in self._over.items() if until <= now]
        for gateway in late:
            del self._over[gateway]
        return late

    @property
    def wake_at(self) -> float:
        """When one of them is due."""
        return min((*self._until.values(), *self._over.values()), default=float("inf"))

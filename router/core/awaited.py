"""Attempts that gateways hold, on workers that have not registered with this router yet: an earlier one placed them."""

from collections.abc import Iterator
from dataclasses import dataclass

from msgspec import structs

from messages.gateway_to_router import Held
from messages.ids import Address, Attempt, RequestId, WorkerId


@dataclass(slots=True)
class Awaited:
    """An attempt that a gateway holds."""

    held: Held
    gateway: Address
    until: float
    """When its workers are taken for lost that have not registered."""


class Awaiting:
    """The newest one of each request; found by its workers too, so that each of them costs only what it has."""

    def __init__(self) -> None:
        self._all: dict[RequestId, Awaited] = {}
        self._on: dict[WorkerId, dict[RequestId, None]] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Awaited]:
        return iter(self._all.values())

    def get(self, request: RequestId) -> Awaited | None:
        return self._all.get(request)

    def add(self, held: Held, gateway: Address, until: float) -> None:
        """In place of an older one."""
        self.drop(held.request)
        self._all[held.request] = Awaited(held, gateway, until)
        for worker, _ in held.workers:
            self._on.setdefault(worker, {})[held.request] = None

    def drop(self, request: RequestId) -> None:
        """Harmless for one that is not awaited."""
        awaited = self._all.pop(request, None)
        if awaited is None:
            return
        for worker in {worker: None for worker, _ in awaited.held.workers}:
            del self._on[worker][request]
            if not self._on[worker]:
                del self._on[worker]

    def drop_older(self, request: RequestId, attempt: Attempt) -> None:
        """Of attempts before ``attempt`` nothing is awaited any more."""
        awaited = self._all.get(request)
        if awaited is not None and awaited.held.attempt < attempt:
            self.drop(request)

    def prefilled(self, request: RequestId, attempt: Attempt) -> None:
        """Its first token is there."""
        awaited = self._all.get(request)
        if awaited is not None and awaited.held.attempt == attempt:
            awaited.held = structs.replace(awaited.held, prefilled=True)

    def on(self, worker: WorkerId) -> list[RequestId]:
        """Those that some process of that name has."""
        return [*self._on.get(worker, ())]

    def of(self, gateway: Address) -> list[RequestId]:
        return [request for request, awaited in self._all.items() if awaited.gateway == gateway]

    def late(self, now: float) -> list[RequestId]:
        """Those whose workers have not registered in time."""
        return [request for request, awaited in self._all.items() if awaited.until <= now]

    def stood_still(self, seconds: float) -> None:
        """For so long nobody could be heard."""
        for awaited in self._all.values():
            awaited.until += seconds

    def check_integrity(self) -> None:
        expected: dict[WorkerId, set[RequestId]] = {}
        for request, awaited in self._all.items():
            for worker, _ in awaited.held.workers:
                expected.setdefault(worker, set()).add(request)
        assert {worker: set(requests) for worker, requests in self._on.items()} == expected, "awaited, not indexed"

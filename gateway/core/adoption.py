"""Finding who has a sequence that another gateway has begun, so that it can go on here.

1. ``AdoptionWanted`` goes to the router, again until an answer comes.
2. The router tells the workers that may have it ``Adopt``, and us which ones they are: ``AdoptionAsked``.
3. ``Adopted`` from one of them: the sequence is ours. ``NotHere`` from all of them, or silence: it is lost.
"""

from typing import NamedTuple

from gateway.core.session import Tick
from messages.gateway_to_router import AdoptionWanted
from messages.ids import Address, RequestId, WorkerId
from messages.router_to_gateway import AdoptionAsked
from messages.worker_to_gateway import Adopted, NotHere
from runtime.core.actions import Send, WakeAt

ASK_AGAIN = 0.25
"""Seconds until a question without an answer is asked again."""
GIVE_UP = 2.0
"""Seconds after which nobody is taken to have it."""

Message = AdoptionAsked | Adopted | NotHere
Event = Message | Tick


class Found(NamedTuple):
    adopted: Adopted


class Missing(NamedTuple):
    """Nobody has it any more."""


Action = Send | WakeAt | Found | Missing


class Adoption:
    """Of one sequence. Nothing is to be handled after ``Found`` or ``Missing``."""

    def __init__(self, request: RequestId, gateway: Address, router: Address, number: int) -> None:
        """``number``: of this one among the gateway's."""
        self._wanted = Send(router, AdoptionWanted(request=request, gateway=gateway, number=number))
        self._silent: set[WorkerId] | None = None  # asked, and not answered yet; None: not known who was asked
        self._not_here: set[WorkerId] = set()
        self._give_up_at = float("inf")

    def start(self, now: float) -> list[Action]:
        self._give_up_at = now + GIVE_UP
        return [self._wanted, WakeAt(now + ASK_AGAIN)]

    def handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case Adopted():
                return [Found(event)]
            case AdoptionAsked():
                self._silent = {*event.workers} - self._not_here
            case NotHere():  # which may overtake the router's word
                self._not_here.add(event.worker)
                if self._silent is not None:
                    self._silent.discard(event.worker)
            case Tick() if now >= self._give_up_at:
                return [Missing()]
            case Tick():
                return [self._wanted, WakeAt(now + ASK_AGAIN)]
        return [] if self._silent is None or self._silent else [Missing()]

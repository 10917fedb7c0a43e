"""What a gateway asks and tells the router."""

from typing import Annotated

from msgspec import Meta

from messages.common import AttemptMessage, Count, Detail, Message, Name, Part
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId

MAX_HELD = 256
"""Attempts in one ``Holding``."""
MAX_CUT = 256
"""Pairs that one ``PlacementWanted`` names."""


class Computed(Part, frozen=True):
    """An earlier attempt had this prefill worker compute ``num_tokens`` of the tokens: their KV may be there still."""

    worker: WorkerId
    epoch: Epoch
    num_tokens: Count


class PlacementWanted(AttemptMessage, frozen=True):
    """Which workers shall run this attempt? Answered by ``Placed`` or ``Rejected``; asking twice is harmless."""

    gateway: Address
    tenant: Name
    num_tokens: Count
    """Tokens to prefill: the prompt and what earlier attempts generated."""
    max_new_tokens: Count
    avoid: tuple[WorkerId, ...] = ()
    """Workers that failed earlier attempts; used only where no other is left."""
    cut: Annotated[tuple[tuple[WorkerId, WorkerId], ...], Meta(max_length=MAX_CUT)] = ()
    """Prefill and decode workers between which the KV of earlier attempts did not get through. Where no other pair is
    left, decode computes the prompt."""
    computed: Computed | None = None
    moving: bool = False
    """The last attempt runs on until this one begins: it is placed only where there is room now, and answered by
    ``Placed`` or not at all. See ``MoveWanted``."""


class Prefilled(AttemptMessage, frozen=True):
    """The first token is there: the prefill worker has done its part."""


class Finished(AttemptMessage, frozen=True):
    """The attempt is over, whatever its end: nothing of it is left to place."""


class AdoptionWanted(Message, frozen=True):
    """A client reads on here in a sequence that another gateway has begun. Whoever may have it is told ``Adopt``;
    answered by ``AdoptionAsked``."""

    request: RequestId
    gateway: Address
    number: Count
    """Of this adoption among the gateway's, however often it is asked for."""


class ClusterStateWanted(Message, frozen=True):
    """Answered by ``ClusterState``."""

    gateway: Address


class Held(Part, frozen=True):
    """An attempt that a router has placed, and that is not over."""

    request: RequestId
    attempt: Annotated[Attempt, Meta(ge=1, le=2**31)]
    prefill: tuple[WorkerId, Epoch] | None
    decode: tuple[WorkerId, Epoch]
    num_tokens: Count
    """As in ``PlacementWanted``."""
    max_new_tokens: Count
    prefilled: bool
    """Its first token is there."""

    @property
    def workers(self) -> list[tuple[WorkerId, Epoch]]:
        """On which it counts, decode last."""
        return [self.decode] if self.prefill is None else [self.prefill, self.decode]


class Holding(Message, frozen=True):
    """What a router that was restarted does not know of this gateway's requests. Saying it twice is harmless."""

    gateway: Address
    attempts: Annotated[tuple[Held, ...], Meta(max_length=MAX_HELD)]
    last: bool
    """Whether that is all, with what was said just before."""


class GatewayDied(Message, frozen=True):
    """Ray, or the controller, says that the gateway's process is dead: in the router's own process, like
    ``WorkerDied``."""

    gateway: Address
    detail: Detail

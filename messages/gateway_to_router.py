"""What a gateway asks and tells the router."""

from messages.common import AttemptMessage, Count, Message, Name
from messages.ids import Address, WorkerId


class PlacementWanted(AttemptMessage, frozen=True):
    """Which workers shall run this attempt? Answered by ``Placed`` or ``Rejected``; asking twice is harmless."""

    gateway: Address
    tenant: Name
    num_tokens: Count
    """Tokens to prefill: the prompt and what earlier attempts generated."""
    max_new_tokens: Count
    avoid: tuple[WorkerId, ...] = ()
    """Workers that failed earlier attempts; used only where no other is left."""


class Prefilled(AttemptMessage, frozen=True):
    """The first token is there: the prefill worker has done its part."""


class Finished(AttemptMessage, frozen=True):
    """The attempt is over, whatever its end: nothing of it is left to place."""


class ClusterStateWanted(Message, frozen=True):
    """Answered by ``ClusterState``."""

    gateway: Address

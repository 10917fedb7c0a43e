"""What a gateway asks and tells the router."""

from messages.common import AttemptMessage, Count, Message, Name, Part
from messages.ids import Address, Epoch, WorkerId


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
    computed: Computed | None = None


class Prefilled(AttemptMessage, frozen=True):
    """The first token is there: the prefill worker has done its part."""


class Finished(AttemptMessage, frozen=True):
    """The attempt is over, whatever its end: nothing of it is left to place."""


class ClusterStateWanted(Message, frozen=True):
    """Answered by ``ClusterState``."""

    gateway: Address

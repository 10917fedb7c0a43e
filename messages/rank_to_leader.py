"""What the other ranks of a tensor-parallel worker tell its rank 0. All are sealed."""

from typing import Annotated

from msgspec import Meta

from messages.common import KVRank, Name
from messages.ids import Address, Epoch, WorkerId
from messages.leader_to_rank import MAX_BODY
from messages.seals import Sealed

Rank = Annotated[int, Meta(ge=1, le=1023)]


class Join(Sealed, frozen=True, kw_only=True):
    """A rank is there; it is answered by ``Welcome`` when all are."""

    worker: WorkerId
    rank: Rank
    mailbox: Address


class RankMessage(Sealed, frozen=True, kw_only=True):
    """From a rank of this incarnation of a worker."""

    worker: WorkerId
    epoch: Epoch
    rank: Rank


class Ready(RankMessage, frozen=True, kw_only=True):
    """The rank has loaded its part of the model and waits for steps."""

    kv: KVRank


class RankEvent(RankMessage, frozen=True, kw_only=True):
    """Something that a command brought about; of ``runtime.core.rank_wire.RANK_EVENTS``."""

    kind: Name
    body: Annotated[bytes, Meta(max_length=MAX_BODY)]

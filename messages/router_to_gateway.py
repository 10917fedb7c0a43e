"""What the router answers and announces to gateways."""

from messages.common import (
    AttemptMessage,
    BlockCounts,
    CacheCounts,
    Count,
    DecisionCounts,
    Detail,
    Message,
    Part,
    Rate,
    Role,
    Seconds,
    Ticket,
    TransferCounts,
    WorkerAddress,
)
from messages.ids import Epoch, RequestId, WorkerId


class Placed(AttemptMessage, frozen=True):
    """``prefill`` is None where the decode worker does both (a colocated pool)."""

    prefill: WorkerAddress | None
    decode: WorkerAddress
    ticket: Ticket | None


class Rejected(AttemptMessage, frozen=True):
    """Not placed. ``retry_after`` (seconds) is None where asking again cannot help."""

    detail: Detail
    retry_after: float | None
    unavailable: bool = False
    """There is no live worker of a role that it needs, rather than too many requests."""


class AdoptionAsked(Message, frozen=True):
    """These workers were told to ``Adopt``: each answers ``Adopted`` or ``NotHere``. None: nobody has it any more."""

    request: RequestId
    workers: tuple[WorkerId, ...]


class WorkerLost(Message, frozen=True):
    """This incarnation of the worker has left the membership: its attempts need new ones. Sent to every gateway."""

    worker: WorkerId
    epoch: Epoch
    detail: Detail
    dead: bool = False
    """Its process has died. Where False it was silent, and may come back, or has left in good order."""


class MoveWanted(Message, frozen=True):
    """``worker`` is draining, and another one has room. If it decodes this request, the next attempt shall be asked for
    with ``moving``; this one runs on until that begins. Repeated until it has begun."""

    request: RequestId
    worker: WorkerId
    epoch: Epoch


class WorkerState(Part, frozen=True):
    """What the router knows of a worker."""

    worker: WorkerId
    epoch: Epoch
    role: Role
    alive: bool
    running: Count
    waiting: Count
    steps: Count
    blocks: BlockCounts
    kv_bytes_sent: Count
    kv_bytes_received: Count
    transfers: Count
    assigned: Count
    """Requests that the router has placed there and not yet seen finished."""
    cache: CacheCounts = CacheCounts()
    handovers: TransferCounts = TransferCounts()
    prefill_rate: Rate = 0.0
    transfer_latency: Seconds = 0.0
    transfer_rate: Rate = 0.0
    decisions: DecisionCounts = DecisionCounts()
    draining: bool = False
    """Nothing is placed there; what is there ends, or moves elsewhere."""
    drained: bool = False
    """Nothing is left there."""
    left: Count = 0
    """See ``Report``."""


class ClusterState(Message, frozen=True):
    workers: tuple[WorkerState, ...]
    queued: Count
    """Requests waiting for a placement."""
    ready: bool
    """Whether every role that a request needs has a live worker."""
    decisions: DecisionCounts = DecisionCounts()
    """Of the router, on requests that it has placed."""
    router: Epoch = Epoch(0)
    """Of the router's process: another one knows of no request that the one before has placed."""
    known: bool = True
    """Whether this router has heard what the gateway holds: ``Holding``. Where not, it shall say so."""

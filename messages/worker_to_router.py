"""What workers, and whoever watches them, tell the router."""

from typing import Annotated

from msgspec import Meta

from messages.common import (
    BlockCounts,
    CacheCounts,
    Count,
    DecisionCounts,
    Detail,
    Message,
    Rate,
    Role,
    Seconds,
    TransferCounts,
    WorkerAddress,
)
from messages.ids import Address, Epoch, WorkerId
from messages.seals import Sealed

MAX_GATEWAYS = 64
"""That one report names."""


class Register(Sealed, frozen=True):
    """A worker enters the membership, or renews its place in a restarted router."""

    address: WorkerAddress
    role: Role
    max_num_seqs: Count
    max_model_len: Count
    incarnation: Count = 0
    """Which process of that name it is, by its supervisor's count: a later one takes the place of an earlier one, and
    an earlier one none."""
    draining: bool = False
    """The router, or the one before it, has said so: ``RoleWanted``."""


class Report(Message, frozen=True):
    """Every 100 ms from the step loop: a worker lives while its loop turns, not while its process exists."""

    worker: WorkerId
    epoch: Epoch
    number: Count
    """Counts up; an older report that arrives late is dropped."""
    steps: Count
    running: Count
    waiting: Count
    blocks: BlockCounts
    kv_bytes_sent: Count
    kv_bytes_received: Count
    transfers: Count
    cache: CacheCounts = CacheCounts()
    handovers: TransferCounts = TransferCounts()
    prefill_rate: Rate = 0.0
    """Prompt tokens a second, of late."""
    transfer_latency: Seconds = 0.0
    """Of its hand-overs, from the computed prompt to the ack, whatever their size; 0 with a rate of 0: not known."""
    transfer_rate: Rate = 0.0
    """KV bytes a second on top of that; 0 where they make no difference."""
    decisions: DecisionCounts = DecisionCounts()
    """Of a decode worker, on the transfers opened to it."""
    gateways: Annotated[tuple[Address, ...], Meta(max_length=MAX_GATEWAYS)] = ()
    """Whose requests it has; said now and then."""
    lost_gateways: Annotated[tuple[Address, ...], Meta(max_length=MAX_GATEWAYS)] = ()
    """That it was told are lost, and whose requests it will drop; said as often."""
    busy_for: Seconds = 0.0
    """What the step is expected to take that runs now: no report comes before its end."""
    left: Count = 0
    """Attempts, hand-overs and unacked ends that are here: what a worker that is drained has none of."""


class WorkerDied(Message, frozen=True):
    """Ray, or the controller, says that this incarnation is dead. It says so in the router's own process: what comes
    over the network is never taken for this."""

    worker: WorkerId
    epoch: Epoch | None
    """None: whichever incarnation is known."""
    detail: Detail


class Leaving(Sealed, frozen=True):
    """The worker stops in good order: place nothing on it any more."""

    worker: WorkerId
    epoch: Epoch

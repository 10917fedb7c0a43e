"""What rank 0 of a tensor-parallel worker tells the other ranks, in order.

All messages are sealed, and name the incarnation of the worker that they belong to.
"""

from typing import Annotated

from msgspec import Meta

from messages.common import Count, Name
from messages.ids import Epoch, WorkerId
from messages.seals import Sealed

MAX_BODY = 30 << 20
"""Below what a mailbox takes."""


class LeaderMessage(Sealed, frozen=True, kw_only=True):
    """From rank 0 of this incarnation of a worker."""

    worker: WorkerId
    epoch: Epoch


class Welcome(LeaderMessage, frozen=True, kw_only=True):
    """All ranks have joined: meet here."""

    backend: Name
    """shared_memory, or a backend of torch.distributed: gloo, nccl."""
    address: Name
    """Of the shared memory, or the ``tcp://`` rendezvous of torch.distributed."""


class Step(LeaderMessage, frozen=True, kw_only=True):
    """Run this: an ``engine.core.step_input.StepInput``, packed by ``runtime.core.wire``."""

    number: Count
    """1, 2, 3, ...: one that is missing ends the group."""
    listen: bool = False
    """Whether commands may come that are to be performed while it runs, between two of its layers."""
    body: Annotated[bytes, Meta(max_length=MAX_BODY)]


class Command(LeaderMessage, frozen=True, kw_only=True):
    """Do this with your part of the KV cache, before the steps that follow: one of
    ``runtime.core.rank_wire.RANK_COMMANDS``."""

    kind: Name
    body: Annotated[bytes, Meta(max_length=MAX_BODY)]


class Dismissed(LeaderMessage, frozen=True, kw_only=True):
    """The worker stops in good order."""

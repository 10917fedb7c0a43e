"""Actions that every state machine asks of its shell."""

from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from messages.common import WorkerAddress
from messages.ids import Address


class Send(NamedTuple):
    """Send ``message`` to the process at ``to``; nothing is promised about its arrival."""

    to: Address
    message: msgspec.Struct


class ForgetPeer(NamedTuple):
    """That process is gone: let go of the sockets and mappings that lead to it."""

    peer: WorkerAddress


class Forget(NamedTuple):
    """Nobody listens at ``address`` any more: let go of the socket that leads there."""

    address: Address


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Call ``handle`` with a tick at or soon after ``time`` (seconds of the shell's monotonic clock)."""

    time: float

"""What the router tells workers."""

from messages.common import Count, Detail, Message, Role, WorkerAddress
from messages.ids import Address, Epoch, RequestId, WorkerId
from messages.seals import Sealed


class RegisterWanted(Message, frozen=True):
    """The router does not know the worker behind a report: it shall register."""

    worker: WorkerId
    epoch: Epoch


class RoleWanted(Sealed, frozen=True):
    """Register as this: nothing is placed on a worker that is ``draining``. Repeated until the worker has."""

    worker: WorkerId
    epoch: Epoch
    role: Role
    draining: bool


class PeerLost(Sealed, frozen=True):
    """This incarnation of another worker has left the membership."""

    peer: WorkerAddress
    dead: bool
    """Its process is gone: it writes no more. Where False it was silent, or said good-bye, and may still write."""
    detail: Detail


class GatewayLost(Sealed, frozen=True):
    """Nothing is heard of this gateway: its requests are kept for a while, for another one to adopt, or for itself to
    come back, and then dropped. Said again and again, lest it get lost."""

    gateway: Address


class GatewayBack(Sealed, frozen=True):
    """The gateway was only slow: its requests are not dropped. Said again to whoever reports it as lost."""

    gateway: Address


class Adopt(Sealed, frozen=True):
    """The request is this gateway's from now on, whoever began it. Answered to it by ``Adopted`` or ``NotHere``; saying
    it twice is harmless, also when a third gateway has adopted it since."""

    request: RequestId
    gateway: Address
    number: Count
    """As in ``AdoptionWanted``."""

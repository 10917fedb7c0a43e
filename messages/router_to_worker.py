"""What the router tells workers."""

from messages.common import Detail, Message, WorkerAddress
from messages.ids import Epoch, WorkerId
from messages.seals import Sealed


class RegisterWanted(Message, frozen=True):
    """The router does not know the worker behind a report: it shall register."""

    worker: WorkerId
    epoch: Epoch


class PeerLost(Sealed, frozen=True):
    """This incarnation of another worker has left the membership."""

    peer: WorkerAddress
    dead: bool
    """Its process is gone: it writes no more. Where False it was silent, or said good-bye, and may still write."""
    detail: Detail

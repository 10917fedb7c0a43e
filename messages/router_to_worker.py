"""What the router tells workers."""

from messages.common import Detail, Message
from messages.ids import Epoch, WorkerId


class RegisterWanted(Message, frozen=True):
    """The router does not know the worker behind a report: it shall register."""

    worker: WorkerId
    epoch: Epoch


class PeerLost(Message, frozen=True):
    """This incarnation of another worker has left: it writes no more, and answers no more."""

    worker: WorkerId
    epoch: Epoch
    detail: Detail

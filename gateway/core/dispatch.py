"""Who hears of what comes to a gateway, and what it answers for sequences that it does not have."""

from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple, Protocol

from gateway.core.session import Chunk, Event, answer_to_unwanted
from messages.common import WorkerAddress
from messages.gateway_to_router import Finished
from messages.ids import Address, RequestId, WorkerId
from messages.router_to_gateway import ClusterState, Placed, Rejected, WorkerLost
from messages.worker_to_gateway import AttemptFailed, Timeline, TokenBatch, TokenChunk
from runtime.core.actions import Send

Message = TokenBatch | AttemptFailed | Placed | Rejected | WorkerLost
Messages = (TokenBatch, AttemptFailed, Timeline, Placed, Rejected, WorkerLost, ClusterState)
"""What a gateway's mailbox takes."""


class Heard(NamedTuple):
    """The session of ``request`` hears of ``event``."""

    request: RequestId
    event: Event


class Late(NamedTuple):
    """Tokens came that nobody waits for. Their worker hears ``answer``, if it is known where it is."""

    answer: Send | None


class Sessions(Container[RequestId], Iterable[RequestId], Protocol):
    """The sequences that are under way."""


class Dispatch:
    """Belongs to one gateway. ``workers``: where each one is, by the last placement."""

    def __init__(self, router: Address) -> None:
        self.workers: dict[WorkerId, WorkerAddress] = {}
        self._router = router

    def take(self, message: Message, sessions: Sessions) -> Iterator[Heard | Late | Send]:
        """What ``message`` means, step by step; ``sessions`` may change between two of them."""
        match message:
            case TokenBatch(worker, chunks):
                for chunk in chunks:
                    if chunk.request in sessions:
                        yield Heard(chunk.request, Chunk(worker, chunk))
                    else:
                        yield self._late(worker, chunk)
            case Placed(request, attempt):
                for address in (message.prefill, message.decode):
                    if address is not None:
                        self.workers[address.worker] = address
                if request in sessions:
                    yield Heard(request, message)
                else:  # the router must have missed the end
                    yield Send(self._router, Finished(request=request, attempt=attempt))
            case Rejected(request) | AttemptFailed(request):
                if request in sessions:
                    yield Heard(request, message)
            case WorkerLost():
                for request in list(sessions):
                    yield Heard(request, message)

    def _late(self, worker: WorkerId, chunk: TokenChunk) -> Late:
        known = self.workers.get(worker)
        return Late(None if known is None else answer_to_unwanted(known.mailbox, chunk))

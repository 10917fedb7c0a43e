"""Who hears of what comes to a gateway, and what it answers for sequences that it does not have."""

from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple, Protocol

from gateway.core.session import Chunk, Event, RouterRestarted, Session, answer_to_unwanted
from messages.common import WorkerAddress
from messages.gateway_to_router import MAX_HELD, Finished, Holding
from messages.ids import Address, Epoch, RequestId, WorkerId
from messages.router_to_gateway import AdoptionAsked, ClusterState, MoveWanted, Placed, Rejected, WorkerLost
from messages.worker_to_gateway import Adopted, AttemptFailed, NotHere, Superseded, Timeline, TokenBatch, TokenChunk
from runtime.core.actions import Send

Message = TokenBatch | AttemptFailed | Superseded | Placed | Rejected | MoveWanted | WorkerLost
Messages = (
    TokenBatch, AttemptFailed, Superseded, Adopted, NotHere, Timeline,
    Placed, Rejected, AdoptionAsked, MoveWanted, WorkerLost, ClusterState,
)  # fmt: skip
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

    def __init__(self, gateway: Address, router: Address) -> None:
        self.workers: dict[WorkerId, WorkerAddress] = {}
        self._gateway = gateway
        self._router = router
        self._epoch: Epoch | None = None
        """Of the router."""

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
                        self.know(address)
                if request in sessions:
                    yield Heard(request, message)
                else:  # the router must have missed the end
                    yield Send(self._router, Finished(request=request, attempt=attempt))
            case Rejected(request) | AttemptFailed(request) | Superseded(request) | MoveWanted(request):
                if request in sessions:
                    yield Heard(request, message)
            case WorkerLost():
                for request in list(sessions):
                    yield Heard(request, message)

    def know(self, worker: WorkerAddress) -> None:
        """Where ``worker`` is now."""
        self.workers[worker.worker] = worker

    def _late(self, worker: WorkerId, chunk: TokenChunk) -> Late:
        known = self.workers.get(worker)
        return Late(None if known is None else answer_to_unwanted(known.mailbox, chunk))

    def state(self, state: ClusterState, sessions: Iterable[Session]) -> Iterator[Heard | Send]:
        """What the router's state means for ``sessions``, all that there are.

        Another process is the router: who waits for an answer asks again. It does not know what is placed: it is told.
        A worker is gone whose ``WorkerLost`` did not arrive: this makes up for it.
        """
        everyone = list(sessions)
        if self._epoch not in (None, state.router):
            yield from [Heard(session.request, RouterRestarted()) for session in everyone]
        self._epoch = state.router
        held = [each for session in everyone if (each := session.held) is not None]
        if not state.known:
            for first in range(0, max(1, len(held)), MAX_HELD):
                some, last = tuple(held[first : first + MAX_HELD]), first + MAX_HELD >= len(held)
                yield Send(self._router, Holding(gateway=self._gateway, attempts=some, last=last))
        workers = {each.worker: each for each in state.workers}
        for each in held:
            for worker, epoch in each.workers:
                now = workers.get(worker)
                if now is not None and not (now.alive and now.epoch == epoch):
                    lost = WorkerLost(worker=worker, epoch=epoch, detail="the router has lost it")
                    yield Heard(each.request, lost)

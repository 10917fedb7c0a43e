"""What the two halves of a worker have in common: its engine, its streams, its standing, and which attempts it admits.

One half computes prompts and hands their KV over (``prefill_worker.core``), the other takes KV over and decodes
(``decode_worker.core``). Both are always there, on one scheduler and one block pool; which of them has work to do is
only a matter of what the worker is sent.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine.core.blocks import BlockPool
from engine.core.scheduler import Scheduler
from messages.common import FailReason, Generation, Role, WorkerAddress
from messages.ids import Address, Attempt, RequestId
from messages.worker_to_gateway import AttemptFailed
from runtime.core.actions import Send
from runtime.core.deliveries import Deliveries
from runtime.core.disaggregation import ALWAYS, Disaggregation
from runtime.core.fences import Fences
from runtime.core.membership import Membership
from runtime.core.work import misfit

REMEMBERED = 4096
"""Requests of which is known that their last attempt here was given up."""
Stop = Callable[[RequestId, Attempt, str, float], list[Any]]
"""End attempts of a request up to this one, without a word to the gateway: (request, attempt, why, now) -> actions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What a machine needs to know of its worker."""

    address: WorkerAddress
    role: Role
    """That it registers as at first."""
    router: Address
    cluster_key: bytes = field(repr=False)
    block_bytes: int
    """Of a block on all ranks together."""
    max_num_seqs: int
    max_model_len: int
    vocab_size: int
    incarnation: int = 0
    """See ``Register``."""
    disaggregation: Disaggregation = ALWAYS


class Shared:
    """Of one worker."""

    def __init__(self, settings: WorkerSettings, scheduler: Scheduler, pool: BlockPool) -> None:
        self.settings = settings
        self.scheduler = scheduler
        self.pool = pool
        self.fences = Fences()
        self.deliveries = Deliveries(settings.address.worker)
        self.membership = Membership(
            settings.address, settings.role, settings.router, settings.cluster_key,
            max_num_seqs=settings.max_num_seqs, max_model_len=settings.max_model_len,
            incarnation=settings.incarnation,
        )  # fmt: skip
        self.peers: set[Address] = set()
        """Mailboxes of workers that came with a ticket; no other is answered."""
        self._failures: OrderedDict[RequestId, tuple[Address, AttemptFailed]] = OrderedDict()
        """The last attempts that were given up: the word of it may be lost, and who asks hears it again."""
        self.forged = 0
        """Messages without a proof that they are who they say; dropped."""
        self.stops: list[Stop] = []
        """Each half's."""

    def stop(self, request: RequestId, attempt: Attempt, detail: str, now: float) -> list[Any]:
        """End every attempt of ``request`` up to ``attempt``, in whichever half, without a word to the gateway."""
        self.deliveries.fence(request, attempt)
        return [action for stop in self.stops for action in stop(request, attempt, detail, now)]

    def misfit(self, generation: Generation) -> str:
        """Why this worker can never run ``generation``; empty where it can."""
        return misfit(generation, self.pool, self.settings.vocab_size, self.settings.max_model_len)

    def failed(self, request: RequestId, attempt: Attempt, gateway: Address, reason: FailReason, detail: str) -> Send:
        """Tell the gateway that this attempt is given up; once more what it was told of it before, if it was."""
        known = self._failures.get(request)
        if known is not None and known[1].attempt == attempt:
            return Send(*known)
        failed = AttemptFailed(
            request=request, attempt=attempt, worker=self.settings.address.worker, reason=reason, detail=detail[:2000]
        )
        self._failures[request] = (gateway, failed)
        self._failures.move_to_end(request)
        if len(self._failures) > REMEMBERED:
            self._failures.popitem(last=False)
        return Send(gateway, failed)

    def failed_before(self, request: RequestId, attempt: Attempt) -> list[Any]:
        """Once more what its gateway was told, if just this attempt was given up here."""
        gateway, failed = self._failures.get(request, (None, None))
        return [] if gateway is None or failed is None or failed.attempt != attempt else [Send(gateway, failed)]

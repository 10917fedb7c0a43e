"""Prompts that were left to their decode workers: each is told so until it acks."""

from dataclasses import dataclass

from kv_transfer.core.events import TransferKey
from messages.common import WorkerAddress
from messages.ids import Attempt, Epoch, RequestId, WorkerId
from messages.prefill_to_decode import TailYielded
from runtime.core.actions import Send


@dataclass(slots=True)
class _Yield:
    to: WorkerAddress
    message: TailYielded
    resend_at: float
    deadline: float


class Yields:
    """``resend``: seconds from one telling to the next; ``patience``: until the peer is taken to be beyond reach, of
    which the gateway hears from the router."""

    def __init__(self, resend: float, patience: float) -> None:
        self._resend = resend
        self._patience = patience
        self._open: dict[TransferKey, _Yield] = {}

    def __len__(self) -> int:
        return len(self._open)

    def tell(self, to: WorkerAddress, message: TailYielded, now: float) -> Send:
        key = TransferKey(message.request, message.attempt)
        self._open[key] = _Yield(to, message, now + self._resend, now + self._patience)
        return Send(to.mailbox, message)

    def acked(self, key: TransferKey) -> None:
        """Harmless for one that nobody yielded."""
        self._open.pop(key, None)

    def fence(self, request: RequestId, attempt: Attempt) -> None:
        """Attempts of ``request`` up to ``attempt`` are over."""
        for key in [key for key in self._open if key.request == request and key.attempt <= attempt]:
            del self._open[key]

    def peer_lost(self, worker: WorkerId, epoch: Epoch) -> None:
        for key, each in list(self._open.items()):
            if (each.to.worker, each.to.epoch) == (worker, epoch):
                del self._open[key]

    def tick(self, now: float) -> list[Send]:
        sends = []
        for key, each in list(self._open.items()):
            if now >= each.deadline:
                del self._open[key]
            elif now >= each.resend_at:
                each.resend_at = now + self._resend
                sends.append(Send(each.to.mailbox, each.message))
        return sends

    @property
    def wake_at(self) -> float:
        """When ``tick`` has something to do at the latest."""
        return min((min(each.resend_at, each.deadline) for each in self._open.values()), default=float("inf"))

"""How a worker stays known to the router: it registers, then reports from its step loop."""

from collections.abc import Callable, Iterable

from msgspec import structs
from msgspec.structs import replace

from messages.common import BlockCounts, CacheCounts, Role, TransferCounts, WorkerAddress
from messages.ids import Address
from messages.router_to_worker import RegisterWanted, RoleWanted
from messages.seals import seal
from messages.worker_to_router import MAX_GATEWAYS, Leaving, Register, Report
from runtime.core.actions import Send
from runtime.core.disaggregation import Decisions
from runtime.core.recent import RecentCost, RecentRate

REPORT_EVERY = 0.1
"""Seconds."""
REGISTER_EVERY = 5
"""Reports from one ``Register`` to the next, for the router may be another one, or may have missed the last. It was
sealed once, so it costs as little as a report."""
ANNOUNCED = 0.5
"""Seconds: a longer step is announced before it begins. The router's patience covers shorter ones."""


class Membership:
    """One worker's standing with the router. A lost ``Register`` mends itself: every so often another one follows. One
    that the router knows, but took for lost, is told so by ``RegisterWanted``."""

    def __init__(
        self,
        address: WorkerAddress,
        role: Role,
        router: Address,
        cluster_key: bytes,
        *,
        max_num_seqs: int,
        max_model_len: int,
        incarnation: int = 0,
    ) -> None:
        self.address = address
        self._router = router
        self._cluster_key = cluster_key
        register = Register(
            address=address,
            role=role,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            incarnation=incarnation,
        )
        self._register = seal(cluster_key, register)
        self._leaving = seal(cluster_key, Leaving(worker=address.worker, epoch=address.epoch))
        self._number = 0
        self._last: Report | None = None
        self.report_at = 0.0
        self.kv_bytes_sent = 0
        self.kv_bytes_received = 0
        self.transfers = 0
        self.steps = 0
        self.prefill_rate = RecentRate()
        """Prompt tokens a second."""
        self.transfer_cost = RecentCost()
        """Of a hand-over from here by its KV bytes."""
        self.decisions = Decisions()

    @property
    def role(self) -> Role:
        return self._register.role

    def register(self) -> Send:
        return Send(self._router, self._register)

    def leave(self) -> Send:
        return Send(self._router, self._leaving)

    def wanted(self, event: RegisterWanted) -> list[Send]:
        return [self.register()] if event.epoch == self.address.epoch else []

    def become(self, wanted: RoleWanted) -> list[Send]:
        """Take the role; none of it changes what the worker does."""
        if wanted.epoch != self.address.epoch:
            return []
        register = replace(self._register, role=wanted.role, draining=wanted.draining)
        self._register = seal(self._cluster_key, register)
        return [self.register()]

    def report(
        self,
        blocks: BlockCounts,
        cache: CacheCounts,
        handovers: Callable[[], TransferCounts],
        *,
        running: int,
        waiting: int,
        left: int,
        gateways: Callable[[], Iterable[Address]] = tuple,
        lost_gateways: Iterable[Address] = (),
        now: float,
    ) -> list[Send]:
        """A report, if one is due. ``gateways``: whose requests are here; ``lost_gateways``: said to be lost."""
        if now < self.report_at:
            return []
        self.report_at = now + REPORT_EVERY
        self._number += 1
        transfer = self.transfer_cost.value
        registers = self._number % REGISTER_EVERY == 0
        report = Report(
            worker=self.address.worker,
            epoch=self.address.epoch,
            number=self._number,
            steps=self.steps,
            running=running,
            waiting=waiting,
            blocks=blocks,
            kv_bytes_sent=self.kv_bytes_sent,
            kv_bytes_received=self.kv_bytes_received,
            transfers=self.transfers,
            cache=cache,
            handovers=handovers(),
            prefill_rate=self.prefill_rate.value,
            transfer_latency=transfer.latency,
            transfer_rate=transfer.rate,
            decisions=self.decisions.counts(),
            gateways=tuple(dict.fromkeys(gateways()))[:MAX_GATEWAYS] if registers else (),
            lost_gateways=tuple(lost_gateways)[:MAX_GATEWAYS] if registers else (),
            left=left,
        )
        self._last = report
        again = [self.register()] if registers else []
        return [*again, Send(self._router, report)]

    def announce(self, seconds: float) -> list[Send]:
        """A step of so many seconds is to begin: silence till its end means nothing."""
        if seconds < ANNOUNCED or self._last is None:
            return []
        self._number += 1
        self._last = structs.replace(self._last, number=self._number, steps=self.steps, busy_for=seconds)
        return [Send(self._router, self._last)]

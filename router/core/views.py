"""What the router knows of one worker: what the worker says of itself, and what the router has placed on it."""

from dataclasses import dataclass, field

from messages.common import BlockCounts, Role, WorkerAddress
from messages.ids import Epoch, RequestId, WorkerId
from messages.router_to_gateway import WorkerState
from messages.worker_to_router import Register, Report

NO_BLOCKS = BlockCounts(free=0, held=0, cached=0, total=0)


@dataclass(slots=True, eq=False)
class WorkerView:
    """One incarnation of a worker. The ledger alone writes ``requests`` and ``tokens``."""

    address: WorkerAddress
    role: Role
    max_num_seqs: int
    max_model_len: int
    heard: float
    """When it last reported or registered."""
    alive: bool = True
    dead_for_good: bool = False
    """Its process is gone or has said good-bye: whatever still comes in its name is late."""
    report: Report | None = None
    requests: dict[RequestId, None] = field(default_factory=dict)
    """Placed here and not yet finished, in order of placement."""
    tokens: int = 0
    """Tokens placed here whose work the router does not know to be over."""

    @classmethod
    def registered(cls, message: Register, now: float) -> "WorkerView":
        return cls(message.address, message.role, message.max_num_seqs, message.max_model_len, now)

    @property
    def worker(self) -> WorkerId:
        return self.address.worker

    @property
    def epoch(self) -> Epoch:
        return self.address.epoch

    def take(self, report: Report, now: float) -> None:
        """Note a report, unless a younger one came before it."""
        if self.report is None or report.number > self.report.number:
            self.report, self.heard = report, now

    def state(self) -> WorkerState:
        """For ``ClusterState``; zeros where the worker has not reported yet."""
        report = self.report
        return WorkerState(
            worker=self.worker,
            epoch=self.epoch,
            role=self.role,
            alive=self.alive,
            running=report.running if report else 0,
            waiting=report.waiting if report else 0,
            steps=report.steps if report else 0,
            blocks=report.blocks if report else NO_BLOCKS,
            kv_bytes_sent=report.kv_bytes_sent if report else 0,
            kv_bytes_received=report.kv_bytes_received if report else 0,
            transfers=report.transfers if report else 0,
            assigned=len(self.requests),
        )

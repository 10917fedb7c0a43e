"""What the router knows of one worker: what the worker says of itself, and what the router has placed on it."""

from dataclasses import dataclass, field

from kv_transfer.core.lanes import layout_of
from messages.common import BlockCounts, CacheCounts, DecisionCounts, Role, TransferCounts, WorkerAddress
from messages.ids import Epoch, RequestId, WorkerId
from messages.router_to_gateway import WorkerState
from messages.worker_to_router import Register, Report
from runtime.core.recent import Cost

LONGEST_STEP = 10.0
"""Seconds that an announced step is believed to take."""
IDLE = 2
"""Reports: the last but one was on its way before."""
LONG_IDLE = 100
"""Reports, which come every 100 ms."""
NO_BLOCKS = BlockCounts(free=0, held=0, cached=0, total=0)


@dataclass(slots=True)
class Move:
    """A request's gateway was asked to have it go on elsewhere."""

    since: float
    asked: float
    """The last time."""


@dataclass(slots=True, eq=False)
class WorkerView:
    """One incarnation of a worker. The ledger alone writes what is placed on it."""

    address: WorkerAddress
    role: Role
    max_num_seqs: int
    max_model_len: int
    heard: float
    """When it last reported or registered."""
    block_size: int
    num_blocks: int
    """Of its KV pool; 0 until it says so."""
    incarnation: int = 0
    """Which process of its name it is; a later one has a higher number."""
    token_bytes: float = 0.0
    """KV of one token, as it is handed over to this worker."""
    unreported: int = 0
    """Requests placed here since its last report."""
    unreported_tokens: int = 0
    alive: bool = True
    dead_for_good: bool = False
    """Its process is gone or has said good-bye: whatever still comes in its name is late."""
    report: Report | None = None
    requests: dict[RequestId, None] = field(default_factory=dict)
    """Placed here and not yet finished, in order of placement."""
    looked_at: float = float("-inf")
    """When its requests were last compared with what it says that it has."""
    tokens: int = 0
    """Tokens placed here whose work the router does not know to be over: of prompts where they are prefilled, as in
    ``admission.expected_tokens`` where they are decoded."""
    prompt_tokens: int = 0
    """Of those, tokens of prompts that a worker which decodes computes itself, until their first token."""
    draining: bool = False
    becoming: Role | None = None
    """What it is drained to become."""
    called_off: str = ""
    """Why it does not become what was last asked for."""
    moving: dict[RequestId, "Move"] = field(default_factory=dict)
    """Requests that were asked to go on elsewhere."""
    stuck: dict[RequestId, float] = field(default_factory=dict)
    """Those that did not, and when they are asked again."""
    idle_reports: int = 0
    """How many of the last reports said that nothing is left there."""

    @classmethod
    def registered(cls, message: Register, now: float, block_size: int = 16) -> "WorkerView":
        kv = message.address.kv
        return cls(
            address=message.address,
            role=message.role,
            max_num_seqs=message.max_num_seqs,
            max_model_len=message.max_model_len,
            draining=message.draining,
            incarnation=message.incarnation,
            heard=now,
            block_size=block_size,
            num_blocks=min((endpoint.num_blocks for endpoint in kv), default=0),
            token_bytes=sum(layout_of(each.shard).block_bytes / each.shard.block_size for each in kv),
        )

    @property
    def worker(self) -> WorkerId:
        return self.address.worker

    @property
    def epoch(self) -> Epoch:
        return self.address.epoch

    @property
    def pool_tokens(self) -> int:
        """Tokens that its KV pool holds; 0 while nobody knows."""
        return self.num_blocks * self.block_size

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second; 0 while nobody knows."""
        return self.report.prefill_rate if self.report else 0.0

    @property
    def transfer_cost(self) -> Cost:
        """Of a hand-over from it by its KV bytes, from the computed prompt to the ack."""
        return Cost(self.report.transfer_latency, self.report.transfer_rate) if self.report else Cost(0.0, 0.0)

    def deadline(self, timeout: float) -> float:
        """When it has been silent for too long: for ``timeout`` seconds, or longer where it has announced a step that
        takes twice as long as it expects, at the worst."""
        announced = min(self.report.busy_for, LONGEST_STEP) if self.report else 0.0
        return self.heard + max(timeout, 0.4 * timeout + 2 * announced)

    @property
    def drained(self) -> bool:
        """Whether nothing is left there, nor on its way. After a while its own word is enough, since whoever would have
        to finish the rest has been lost."""
        idle = self.idle_reports
        return self.alive and self.draining and (idle >= LONG_IDLE or (idle >= IDLE and self.tokens == 0))

    def take(self, report: Report, now: float) -> bool:
        """Note a report, unless a younger one came before it: then False."""
        if self.report is not None and report.number <= self.report.number:
            return False
        self.report, self.heard = report, now
        self.unreported = self.unreported_tokens = 0
        self.idle_reports = 0 if report.left else self.idle_reports + 1
        return True

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
            cache=report.cache if report else CacheCounts(),
            handovers=report.handovers if report else TransferCounts(),
            prefill_rate=self.prefill_rate,
            transfer_latency=self.transfer_cost.latency,
            transfer_rate=self.transfer_cost.rate,
            decisions=report.decisions if report else DecisionCounts(),
            draining=self.draining,
            drained=self.drained,
            left=report.left if report else 0,
        )

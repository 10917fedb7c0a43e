"""What the composition root tells a worker; nothing below it sees the topology."""

from dataclasses import dataclass, field

from engine.core.scheduler import Preemption
from kv_transfer.curve import CurveKeys
from messages.common import Role
from runtime.core.disaggregation import ALWAYS, Disaggregation


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """One worker of one pool."""

    worker: str
    """Its name in the topology, such as ``prefill-0``."""
    role: Role
    incarnation: int = 0
    """Counts up with each process of that name."""
    host: str
    """Address of this machine that the worker's sockets bind to."""
    router: str
    """The router's mailbox."""
    cluster_key: bytes = field(repr=False)
    """Checks KV tickets; drawn by the launcher, known to the router and the workers only."""
    curve: CurveKeys | None = None
    """Of the cluster; needed to bind to anything but loopback."""
    model: str
    """Folder with config.json and safetensors."""
    dtype: str
    """auto, float32, bfloat16 or float16."""
    quantization: str | None = None
    """Of the weights, on load: int8, fp8, or None."""
    device: str
    num_blocks: int
    block_size: int
    """Tokens in a KV block."""
    kv_dtype: str
    """What KV is stored in: a dtype that models compute in, or int8 or fp8; auto for the model's own."""
    enable_prefix_caching: bool = True
    preemption: Preemption = Preemption.RECOMPUTE
    swap_blocks: int = 0
    """KV blocks of the host tier."""
    expected_output: int = 1024
    """Tokens of an answer that room is kept for; the router counts as many."""
    transport: str
    """How KV leaves and enters this worker: auto, shm, nccl, zmq, inproc."""
    disaggregation: Disaggregation = ALWAYS
    """Of a decode worker: when it computes prompts itself."""
    max_num_seqs: int
    max_num_batched_tokens: int
    """Token budget of one step."""
    prefill_chunk: int
    """Most prompt tokens of one sequence in one step."""
    max_model_len: int
    record: str = ""
    """Folder in which everything that happens to the machine is written down; empty for none."""
    threads: int
    """Threads that torch may use."""
    tensor_parallel: int = 1
    """Ranks, each a process."""
    rank: int = 0
    leader: str = ""
    """Rank 0's mailbox, for the other ranks."""
    chaos: bool = False
    """Whether faults may be put into the links of this worker: see ``WorkerActor.inject``."""

    @property
    def process(self) -> str:
        """The name of this rank's process."""
        return self.worker if self.rank == 0 else f"{self.worker}.rank{self.rank}"

"""What a worker says of itself when it is asked whether it goes with others."""

from dataclasses import dataclass

from messages.common import KVRank, KVShard, Role, WorkerAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """One worker, as its rank 0 tells it."""

    address: WorkerAddress
    role: Role
    node: str
    """The host's name."""
    baton: str
    """Version."""
    torch: str
    """Version."""
    protocol: str
    """``messages.fingerprint.protocol``."""
    ranks: tuple[KVRank, ...]
    """Its KV, and the transports that it offers."""
    max_model_len: int

    @property
    def shards(self) -> tuple[KVShard, ...]:
        return tuple(rank.shard for rank in self.ranks)

    @property
    def num_blocks(self) -> int:
        return min(rank.num_blocks for rank in self.ranks)

    @property
    def worker(self) -> str:
        return self.address.worker

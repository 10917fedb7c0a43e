"""A worker's machine from plain values: all that decides, and nothing that computes."""

from dataclasses import dataclass

from decode_worker.core.reservation import Reservations
from engine.core.blocks import BlockPool
from engine.core.host_tier import HostTier
from engine.core.scheduler import Preemption, Scheduler, SchedulerLimits
from kv_transfer.core.session import TransferTimeouts
from prefill_worker.core.handoff import Handoffs
from runtime.core.shared import WorkerSettings
from worker.core.machine import WorkerMachine


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What the scheduler and the block pool need to know of the engine."""

    num_blocks: int
    block_size: int
    enable_prefix_caching: bool
    swap_blocks: int
    """KV blocks of the host tier."""
    limits: SchedulerLimits
    eos_token_ids: frozenset[int]
    preemption: Preemption


def make_machine(settings: WorkerSettings, engine: EngineSettings) -> WorkerMachine:
    caching = engine.enable_prefix_caching
    pool = BlockPool(engine.num_blocks, engine.block_size, caching=caching)
    host = HostTier(engine.swap_blocks, engine.block_size, caching=caching) if engine.swap_blocks else None
    scheduler = Scheduler(pool, engine.limits, engine.eos_token_ids, host, preemption=engine.preemption)
    address, timeouts = settings.address, TransferTimeouts()
    handoffs = Handoffs(address, address.kv, pool, timeouts)
    reservations = Reservations(address.mailbox, address.kv, pool, timeouts=timeouts)
    return WorkerMachine(settings, scheduler, pool, handoffs, reservations)

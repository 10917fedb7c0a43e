"""Promise: who asks a decode worker for room gets it while there is some, whatever the host tier is busy with."""

import numpy as np

from decode_worker.core.reservation import Reservations
from engine.core.blocks import BlockPool
from engine.core.host_tier import HostTier
from engine.core.outputs import StepOutput
from engine.core.scheduler import Scheduler, SchedulerLimits
from kv_transfer.core.session import OpenLanding, TransferTimeouts
from messages.codec import pack_tokens
from messages.common import Generation, Role
from messages.gateway_to_worker import Generate
from messages.ids import RequestId
from messages.sampling import SamplingParams
from prefill_worker.core.handoff import Handoffs
from runtime.core.shared import WorkerSettings
from tests.workers.test_machines import ATTEMPT, DECODE, GATEWAY, KEY, OPEN, ROUTER
from worker.core.machine import WorkerMachine

PARAMS = SamplingParams(max_tokens=100)


def machine_with_a_host_tier() -> tuple[WorkerMachine, Scheduler, BlockPool]:
    pool = BlockPool(256, 16)
    limits = SchedulerLimits(
        max_num_seqs=32, max_num_batched_tokens=512, max_model_len=1024, prefill_chunk=512, expected_output=1
    )
    scheduler = Scheduler(pool, limits, frozenset(), HostTier(4096, 16))
    settings = WorkerSettings(
        address=DECODE, role=Role.DECODE, router=ROUTER, cluster_key=KEY, block_bytes=64, max_num_seqs=32,
        max_model_len=1024, vocab_size=100,
    )  # fmt: skip
    reservations = Reservations(DECODE.mailbox, DECODE.kv, pool, timeouts=TransferTimeouts())
    handoffs = Handoffs(DECODE, DECODE.kv, pool, TransferTimeouts())
    return WorkerMachine(settings, scheduler, pool, handoffs, reservations), scheduler, pool


def fill_with_cached_content(pool: BlockPool) -> None:
    blocks = pool.allocate(pool.num_blocks)
    assert blocks is not None
    for block in blocks.tolist():
        pool.register(block, block.to_bytes(32, "little"))
    pool.free(blocks)


def test_a_transfer_is_let_in_although_every_step_offloads_what_it_evicts() -> None:
    machine, scheduler, pool = machine_with_a_host_tier()
    fill_with_cached_content(pool)
    for number in range(16):  # at each step one of them begins a block
        work = Generation(pack_tokens([number + 1] * (16 + number)), PARAMS)
        machine.handle(Generate(RequestId(f"{number:032x}"), ATTEMPT, GATEWAY, work), 0.0)
    while scheduler.num_running < 16:
        plan, _ = machine.schedule(0.0)
        assert plan is not None
        machine.update(plan, StepOutput(np.ones(int(plan.samples.sum()), np.int32)), 0.0)
    machine.handle(OPEN, 0.0)
    plan, actions = machine.schedule(0.0)
    assert plan is not None and len(plan.moves.swap_out)
    assert [type(action) for action in actions] == [OpenLanding]

"""The process of a worker, whatever its role."""

from decode_worker.core.reservation import Reservations
from engine.core.blocks import BlockPool
from engine.core.scheduler import Scheduler
from engine.runner import ModelRunner
from kv_transfer.core.lanes import layout_of
from kv_transfer.core.session import TransferTimeouts
from messages.common import WorkerAddress
from messages.ids import Address
from prefill_worker.core.handoff import Handoffs
from runtime.actor import WorkerActor
from runtime.core.shared import WorkerSettings
from runtime.worker import Machine
from worker.core.machine import Messages, WorkerMachine


class Worker(WorkerActor):
    """Computes prompts and hands their KV over, takes KV over and decodes: as it is sent."""

    _messages = Messages

    def _make_machine(
        self, address: WorkerAddress, scheduler: Scheduler, pool: BlockPool, runner: ModelRunner
    ) -> Machine:
        settings = WorkerSettings(
            address=address,
            role=self._config.role,
            router=Address(self._config.router),
            cluster_key=self._config.cluster_key,
            block_bytes=sum(layout_of(rank.shard).block_bytes for rank in address.kv),
            max_num_seqs=self._config.max_num_seqs,
            max_model_len=self._config.max_model_len,
            vocab_size=runner.config.vocab_size,
            disaggregation=self._config.disaggregation,
        )
        handoffs = Handoffs(address, address.kv, pool, TransferTimeouts())
        reservations = Reservations(address.mailbox, address.kv, pool, timeouts=TransferTimeouts())
        return WorkerMachine(settings, scheduler, pool, handoffs, reservations)

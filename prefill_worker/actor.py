"""The process of a prefill worker."""

from engine.core.blocks import BlockPool
from engine.core.scheduler import Scheduler
from engine.layer_gate import LayerGate
from engine.runner import ModelRunner
from kv_transfer.core.session import TransferTimeouts
from kv_transfer.transports.base import PoolMemory
from kv_transfer.transports.build import host_of, make_senders, ways_out
from messages.common import KVRank, KVShard, WorkerAddress
from messages.ids import Address
from prefill_worker.core.handoff import Handoffs
from prefill_worker.core.machine import Messages, PrefillMachine, PrefillSettings
from runtime.actor import WorkerActor
from runtime.kv_port import FromRank, KVPort, RankPort
from runtime.mailbox import Mailbox
from runtime.worker import Machine


class PrefillWorker(WorkerActor):
    """Computes prompts and hands their KV over."""

    _messages = Messages

    def _make_port(self, memory: PoolMemory, mailbox: Mailbox, shard: KVShard, layers: LayerGate) -> RankPort:
        rank = self._config.rank
        transport = self._config.transport
        senders = make_senders(transport, memory, shard, lambda event: mailbox.post(FromRank(rank, event)))
        kv = KVRank(shard, len(memory.pool), host_of(memory), ways_out(transport, memory))
        return RankPort(rank, memory.pool, kv, mailbox.post, senders=senders, layers=layers)

    def _make_machine(
        self, address: WorkerAddress, scheduler: Scheduler, pool: BlockPool, runner: ModelRunner, port: KVPort
    ) -> Machine:
        settings = PrefillSettings(
            address=address,
            router=Address(self._config.router),
            cluster_key=self._config.cluster_key,
            max_num_seqs=self._config.max_num_seqs,
            max_model_len=self._config.max_model_len,
            vocab_size=runner.config.vocab_size,
        )
        handoffs = Handoffs(address, port.ranks, pool, TransferTimeouts())
        return PrefillMachine(settings, scheduler, pool, handoffs)

"""The process of a decode worker, which is also that of a colocated one."""

from decode_worker.core.machine import DecodeMachine, DecodeSettings, Messages
from decode_worker.core.reservation import Reservations
from engine.core.blocks import BlockPool
from engine.core.scheduler import Scheduler
from engine.layer_gate import LayerGate
from engine.runner import ModelRunner
from kv_transfer.core.lanes import layout_of
from kv_transfer.core.session import TransferTimeouts
from kv_transfer.transports.base import PoolMemory
from kv_transfer.transports.build import make_receiver
from messages.common import KVShard, Role, WorkerAddress
from messages.ids import Address
from runtime.actor import WorkerActor
from runtime.kv_port import FromRank, KVPort, RankPort
from runtime.mailbox import Mailbox
from runtime.worker import Machine


class DecodeWorker(WorkerActor):
    """Takes KV over and decodes."""

    _one_sided = False

    _messages = Messages

    def _make_port(self, memory: PoolMemory, mailbox: Mailbox, shard: KVShard, layers: LayerGate) -> RankPort:
        rank = self._config.rank
        if self._config.role is Role.COLOCATED:
            return RankPort(rank, memory.pool, shard, mailbox.post)
        receiver = make_receiver(
            self._config.transport, self._config.host, memory, shard, lambda event: mailbox.post(FromRank(rank, event))
        )
        self._one_sided = receiver.one_sided
        return RankPort(rank, memory.pool, shard, mailbox.post, receiver=receiver)

    def _make_machine(
        self, address: WorkerAddress, scheduler: Scheduler, pool: BlockPool, runner: ModelRunner, port: KVPort
    ) -> Machine:
        settings = DecodeSettings(
            address=address,
            role=self._config.role,
            router=Address(self._config.router),
            cluster_key=self._config.cluster_key,
            block_bytes=sum(layout_of(shard).block_bytes for shard in port.shards),
            max_num_seqs=self._config.max_num_seqs,
            max_model_len=self._config.max_model_len,
            vocab_size=runner.config.vocab_size,
        )
        reservations = Reservations(
            address.mailbox, address.kv, pool, one_sided=self._one_sided, timeouts=TransferTimeouts()
        )
        return DecodeMachine(settings, scheduler, pool, reservations)

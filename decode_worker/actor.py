"""The process of a decode worker, which is also that of a colocated one."""

from decode_worker.core.machine import DecodeMachine, DecodeSettings, Messages
from decode_worker.core.reservation import Reservations
from engine.core.blocks import BlockPool
from engine.core.scheduler import Scheduler
from engine.layer_gate import LayerGate
from engine.runner import ModelRunner
from kv_transfer.core.lanes import layout_of
from kv_transfer.core.session import TransferTimeouts
from kv_transfer.transports.base import PoolMemory, Receiver
from kv_transfer.transports.build import host_of, make_receivers
from messages.common import KVRank, KVShard, KVWay, Role, WorkerAddress
from messages.ids import Address
from runtime.actor import WorkerActor
from runtime.kv_port import FromRank, KVPort, RankPort
from runtime.mailbox import Mailbox
from runtime.worker import Machine


class DecodeWorker(WorkerActor):
    """Takes KV over and decodes."""

    _messages = Messages

    def _make_port(self, memory: PoolMemory, mailbox: Mailbox, shard: KVShard, layers: LayerGate) -> RankPort:
        rank = self._config.rank
        receivers: dict[str, Receiver] = {}
        if self._config.role is not Role.COLOCATED:
            receivers = make_receivers(
                self._config.transport,
                self._config.host,
                memory,
                shard,
                lambda event: mailbox.post(FromRank(rank, event)),
            )
        ways = tuple(KVWay(name, receiver.endpoint.address) for name, receiver in receivers.items())
        kv = KVRank(shard, len(memory.pool), host_of(memory), ways)
        return RankPort(rank, memory.pool, kv, mailbox.post, receivers=receivers)

    def _make_machine(
        self, address: WorkerAddress, scheduler: Scheduler, pool: BlockPool, runner: ModelRunner, port: KVPort
    ) -> Machine:
        settings = DecodeSettings(
            address=address,
            role=self._config.role,
            router=Address(self._config.router),
            cluster_key=self._config.cluster_key,
            block_bytes=sum(layout_of(rank.shard).block_bytes for rank in port.ranks),
            max_num_seqs=self._config.max_num_seqs,
            max_model_len=self._config.max_model_len,
            vocab_size=runner.config.vocab_size,
            disaggregation=self._config.disaggregation,
        )
        reservations = Reservations(address.mailbox, address.kv, pool, timeouts=TransferTimeouts())
        return DecodeMachine(settings, scheduler, pool, reservations)

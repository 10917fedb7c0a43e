"""The process of a worker, whatever its role."""

from pathlib import Path

from engine.core.scheduler import SchedulerLimits
from engine.runner import ModelRunner
from kv_transfer.core.lanes import layout_of
from messages.common import WorkerAddress
from messages.ids import Address
from runtime.actor import WorkerActor
from runtime.core.shared import WorkerSettings
from runtime.recorded import RecordedMachine
from runtime.recorder import Recorder
from runtime.worker import Machine
from runtime.worker_config import WorkerConfig
from worker.core.build import EngineSettings, make_machine
from worker.core.machine import Messages


class Worker(WorkerActor):
    """Computes prompts and hands their KV over, takes KV over and decodes: as it is sent."""

    _messages = Messages

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        self._recorder: Recorder | None = None

    def _make_machine(self, address: WorkerAddress, runner: ModelRunner) -> Machine:
        config = self._config
        settings = WorkerSettings(
            address=address,
            role=config.role,
            router=Address(config.router),
            cluster_key=config.cluster_key,
            block_bytes=sum(layout_of(rank.shard).block_bytes for rank in address.kv),
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            vocab_size=runner.config.vocab_size,
            disaggregation=config.disaggregation,
            incarnation=config.incarnation,
        )
        limits = SchedulerLimits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            prefill_chunk=config.prefill_chunk,
            expected_output=config.expected_output,
        )
        engine = EngineSettings(
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            swap_blocks=config.swap_blocks,
            limits=limits,
            eos_token_ids=frozenset(runner.config.eos_token_ids),
            preemption=config.preemption,
        )
        machine = make_machine(settings, engine)
        if not config.record:
            return machine
        self._recorder = Recorder(Path(config.record), config.worker)
        self._recorder.made("worker", config.worker, settings=settings, engine=engine)
        return RecordedMachine(machine, self._recorder, config.worker)

    def stop(self) -> None:
        super().stop()
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

"""What prefill and decode actors have in common: they load a model, make a machine, and run its loop in a thread."""

import logging
import os
import queue
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.core.blocks import BlockPool
from engine.core.errors import ModelError
from engine.core.host_tier import HostTier
from engine.core.scheduler import Scheduler, SchedulerLimits
from engine.models.config import ModelConfig
from engine.runner import ModelRunner, kv_layout
from kv_transfer.core.lanes import shard_of
from kv_transfer.transports.base import PoolMemory
from kv_transfer.transports.build import allocate_pool
from messages.codec import Decode
from messages.common import KVShard, WorkerAddress
from messages.ids import Epoch, WorkerId
from runtime.kv_port import KVPort
from runtime.mailbox import Mailbox
from runtime.worker import Machine, WorkerLoop
from runtime.worker_config import WorkerConfig

log = logging.getLogger(__name__)

STOP_WITHIN = 10.0
"""Seconds that a loop may take to end; a model step is the longest thing it waits for."""


class WorkerActor(ABC):
    """One worker process. ``start`` returns when it serves; ``stop`` when nothing of it is left."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._epoch = Epoch(secrets.randbits(62))
        self._memory: PoolMemory | None = None
        self._port: KVPort | None = None
        self._mailbox: Mailbox | None = None
        self._loop: WorkerLoop | None = None
        self._thread: threading.Thread | None = None
        self.on_failure: Callable[[BaseException], None] | None = None
        """Called, in the loop's thread, when the loop ends by an exception: nothing is served here any more."""

    def start(self) -> dict[str, Any]:
        """Load the model and begin to serve; raises ``ModelError`` or ``ValueError`` with what to do about it."""
        config = self._config
        torch.set_num_threads(config.threads)
        folder = Path(config.model)
        layout = kv_layout(ModelConfig.from_folder(folder), config.dtype, config.block_size, kv_dtype=config.kv_dtype)
        if layout.quantized:
            raise ModelError(f"attention over {layout.dtype} KV comes next; write another kv.dtype")
        self._memory = allocate_pool(config.transport, config.num_blocks, layout.block_bytes)
        runner = ModelRunner(
            folder,
            dtype=config.dtype,
            device=config.device,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            kv_dtype=config.kv_dtype,
            kv_memory=torch.from_numpy(self._memory.pool).view(-1),
            max_model_len=config.max_model_len,
            swap_blocks=config.swap_blocks,
        )
        caching = config.enable_prefix_caching
        pool = BlockPool(config.num_blocks, config.block_size, caching=caching)
        host = HostTier(config.swap_blocks, config.block_size, caching=caching) if config.swap_blocks else None
        limits = SchedulerLimits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            prefill_chunk=config.prefill_chunk,
            expected_output=config.expected_output,
        )
        eos = frozenset(runner.config.eos_token_ids)
        scheduler = Scheduler(pool, limits, eos, host, preemption=config.preemption)
        self._mailbox = Mailbox(config.host, self._decoder())
        self._port = self._make_port(self._memory, self._mailbox, runner)
        address = WorkerAddress(
            worker=WorkerId(config.worker),
            epoch=self._epoch,
            mailbox=self._mailbox.address,
            kv=self._port.endpoints,
        )
        machine = self._make_machine(address, scheduler, pool, runner)
        self._loop = WorkerLoop(machine, runner, self._mailbox, self._port)
        self._thread = threading.Thread(target=self._run, args=(self._loop,), name=config.worker, daemon=True)
        self._thread.start()
        return {"worker": config.worker, "epoch": self._epoch, "mailbox": self._mailbox.address, "pid": os.getpid()}

    def inspect(self) -> dict[str, int]:
        """What is in the machine between two turns of its loop, after ``check_integrity``; for tests and status."""
        assert self._loop is not None, "not started"
        answers: queue.SimpleQueue[dict[str, int] | AssertionError] = queue.SimpleQueue()

        def look(machine: Machine) -> None:
            try:
                machine.check_integrity()
            except AssertionError as error:
                answers.put(error)
            else:
                answers.put(machine.inspect())

        self._loop.ask(look)
        answer = answers.get(timeout=STOP_WITHIN)
        if isinstance(answer, AssertionError):
            raise answer
        return answer

    def stop(self) -> None:
        """Leave the cluster and give everything back; harmless twice."""
        if self._loop is not None and self._thread is not None:
            self._loop.stop()
            self._thread.join(STOP_WITHIN)
            if self._thread.is_alive():
                raise TimeoutError(f"{self._config.worker} did not stop within {STOP_WITHIN:.0f} s")
            self._loop = None
        if self._port is not None:
            self._port.close()
            self._port = None
        if self._mailbox is not None:
            self._mailbox.close()
            self._mailbox = None
        if self._memory is not None:
            self._memory.release()
            self._memory = None

    @staticmethod
    def _shard(runner: ModelRunner) -> KVShard:
        """What the own pool's blocks are."""
        return shard_of(runner.layout, runner.config.num_kv_heads)

    def _run(self, loop: WorkerLoop) -> None:
        try:
            loop.run()
        except BaseException as error:
            log.exception("the loop of %s has failed", self._config.worker)
            if self.on_failure is not None:
                self.on_failure(error)

    @abstractmethod
    def _decoder(self) -> Decode:
        """Of the messages that this role's mailbox takes."""

    @abstractmethod
    def _make_port(self, memory: PoolMemory, mailbox: Mailbox, runner: ModelRunner) -> KVPort:
        """The role's ways of moving KV."""

    @abstractmethod
    def _make_machine(
        self, address: WorkerAddress, scheduler: Scheduler, pool: BlockPool, runner: ModelRunner
    ) -> Machine:
        """The role's decisions."""

"""A worker's process but for its decisions: it loads a model, makes a machine, and runs its loop in a thread."""

import importlib.metadata
import logging
import os
import queue
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from engine.core.kv_layout import KVLayout
from engine.core.step_input import StepInput
from engine.layer_gate import LayerGate
from engine.models.config import ModelConfig
from engine.parallel import ParallelGroup
from engine.rank import RankModel
from engine.runner import ModelRunner, kv_layout
from kv_transfer.core.fanout import RankEvent
from kv_transfer.core.lanes import shard_of
from kv_transfer.transports.base import PoolMemory
from kv_transfer.transports.build import allocate_pool, host_of, make_receivers, make_senders
from kv_transfer.transports.switched import Links, LinkState
from messages.codec import decoder_for
from messages.common import KVRank, KVShard, KVWay, WorkerAddress
from messages.fingerprint import protocol
from messages.ids import Address, Epoch, RequestId, WorkerId
from runtime.clock import clock_name
from runtime.core.membership import Membership
from runtime.core.probe import ProbeEnded, ProbeWanted
from runtime.core.rank_wire import RANK_COMMANDS, RANK_EVENTS
from runtime.core.timeline import Timelines
from runtime.facts import WorkerFacts
from runtime.follower import FOLLOWER_MESSAGES, Follower, FollowerLoop, RemoteRank
from runtime.kv_port import FromRank, KVPort, RankPort
from runtime.leader import RANK_MESSAGES, Leader
from runtime.mailbox import Mailbox
from runtime.worker import Machine, WorkerLoop
from runtime.worker_config import WorkerConfig

log = logging.getLogger(__name__)

STOP_WITHIN = 10.0
"""Seconds that a loop may take to end; a model step is the longest thing it waits for."""


class WorkerActor(ABC):
    """One rank of a worker, a process. ``start`` returns when it serves; ``stop`` when nothing of it is left.

    Most workers have one rank. Of those with more, rank 0 is ``prepare``d first: the others need its address.
    """

    _messages: tuple[type[msgspec.Struct], ...]
    """What its mailbox takes."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._epoch = Epoch(secrets.randbits(62))
        self._memory: PoolMemory | None = None
        self._own: RankPort | None = None
        self._port: KVPort | None = None
        self._address: WorkerAddress | None = None
        self._membership: Membership | None = None
        self._mailbox: Mailbox | None = None
        self._member: Leader | Follower | None = None
        self._loop: WorkerLoop | FollowerLoop | None = None
        self._thread: threading.Thread | None = None
        self._links = Links() if config.chaos else None
        self.on_failure: Callable[[BaseException], None] | None = None
        """Called, in the loop's thread, when the loop ends by an exception: nothing is served here any more."""

    def prepare(self) -> str:
        """Open the mailbox; its address."""
        if self._mailbox is None:
            takes: tuple[type[msgspec.Struct], ...] = FOLLOWER_MESSAGES
            if self._config.rank == 0:
                takes = (*self._messages, *RANK_MESSAGES)
            self._mailbox = Mailbox(self._config.host, decoder_for(*takes), curve=self._config.curve)
        return self._mailbox.address

    def start(self) -> dict[str, Any]:
        """Load the model and begin to serve; raises ``ModelError`` or ``ValueError`` with what to do about it."""
        torch.set_num_threads(self._config.threads)
        self.prepare()
        assert self._mailbox is not None
        self._loop = self._follow(self._mailbox) if self._config.rank else self._lead(self._mailbox)
        self._thread = threading.Thread(target=self._run, args=(self._loop,), name=self._config.process, daemon=True)
        self._thread.start()
        return {
            "worker": self._config.worker,
            "epoch": self._epoch,
            "mailbox": self._mailbox.address,
            "pid": os.getpid(),
        }

    def _lead(self, mailbox: Mailbox) -> WorkerLoop:
        """Rank 0, which decides."""
        config, folder = self._config, Path(self._config.model)
        leader = None
        if config.tensor_parallel > 1:
            self._member = leader = Leader(
                mailbox, WorkerId(config.worker), self._epoch, config.tensor_parallel, config.cluster_key,
                commands=RANK_COMMANDS, events=RANK_EVENTS,
            )  # fmt: skip
            leader.assemble(config.device)
        group = ParallelGroup() if leader is None else leader.group
        model_config = ModelConfig.from_folder(folder)
        layout, memory = self._allocate(model_config, group)
        runner = ModelRunner(
            folder,
            dtype=config.dtype,
            device=config.device,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            kv_dtype=config.kv_dtype,
            quantization=config.quantization,
            kv_memory=torch.from_numpy(memory.pool).view(-1),
            max_model_len=config.max_model_len,
            swap_blocks=config.swap_blocks,
            group=group,
            broadcast=_nobody if leader is None else leader.broadcast,
        )
        self._own = self._make_port(memory, mailbox, _shard(layout, model_config, group), runner.layers)
        others = [] if leader is None else [RemoteRank(leader, ready) for ready in leader.wait_until_ready()]
        self._port = port = KVPort(self._own, others)
        self._address = address = WorkerAddress(
            worker=WorkerId(config.worker),
            epoch=self._epoch,
            mailbox=mailbox.address,
            kv=port.ranks,
        )
        machine = self._make_machine(address, runner)
        self._membership = machine.membership
        timelines = Timelines(address.worker, clock_name(), machine.has)
        return WorkerLoop(machine, runner, mailbox, port, timelines, leader)

    def _follow(self, mailbox: Mailbox) -> FollowerLoop:
        """Another rank, which does what rank 0 has decided."""
        config, folder = self._config, Path(self._config.model)
        self._member = follower = Follower(
            mailbox, WorkerId(config.worker), config.rank, config.tensor_parallel, config.cluster_key,
            Address(config.leader), commands=RANK_COMMANDS, events=RANK_EVENTS,
        )  # fmt: skip
        group = follower.join()
        model_config = ModelConfig.from_folder(folder)
        layout, memory = self._allocate(model_config, group)
        model = RankModel(
            folder,
            model_config,
            group,
            layout,
            dtype=model_config.resolve_dtype(config.dtype),
            kv_memory=torch.from_numpy(memory.pool).view(-1),
            max_positions=config.max_model_len,
            quantization=config.quantization,
            swap_blocks=config.swap_blocks,
        )
        self._own = self._make_port(memory, mailbox, _shard(layout, model_config, group), model.layers)
        follower.ready(kv=self._own.kv)
        return FollowerLoop(follower, model, self._own)

    def _allocate(self, model: ModelConfig, group: ParallelGroup) -> tuple[KVLayout, PoolMemory]:
        """This rank's KV pool."""
        config = self._config
        layout = kv_layout(model, config.dtype, config.block_size, kv_dtype=config.kv_dtype, group=group)
        self._memory = allocate_pool(config.transport, config.num_blocks, layout.block_bytes)
        return layout, self._memory

    def facts(self) -> WorkerFacts:
        """What `baton doctor` compares between workers."""
        assert self._address is not None and self._port is not None and self._membership is not None, (
            "not started, or no rank 0"
        )
        config = self._config
        return WorkerFacts(
            address=self._address,
            role=self._membership.role,
            node=os.uname().nodename,
            baton=_version("baton-serve"),
            torch=str(torch.__version__),  # a class of its own, for which who reads it would have to import PyTorch
            protocol=protocol(),
            ranks=self._port.ranks,
            max_model_len=config.max_model_len,
        )

    def probe(self, decode: WorkerAddress, num_blocks: int, within: float) -> ProbeEnded:
        """Hand ``num_blocks`` blocks of this prefill worker, which nobody owns, over to ``decode``, as a test; answers
        in twice ``within`` seconds at most."""
        assert isinstance(self._loop, WorkerLoop), "not started, or no rank 0"
        wanted = ProbeWanted(RequestId(f"probe-{secrets.token_hex(16)}"), decode, num_blocks)
        return self._loop.probe(wanted, within=within)

    def inject(self, state: LinkState) -> None:
        """Have the KV links out of this rank be like this from now on. ``RuntimeError`` unless the cluster was started
        for chaos; no message leads here, only a call of who may call actors."""
        if self._links is None:
            raise RuntimeError(f"{self._config.process} was not started for chaos: set cluster.chaos in the topology")
        self._links.state = state

    def inspect(self) -> dict[str, int]:
        """What is in the machine between two turns of its loop, after ``check_integrity``; for tests and status."""
        assert isinstance(self._loop, WorkerLoop), "not started, or no rank 0"
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
                raise TimeoutError(f"{self._config.process} did not stop within {STOP_WITHIN:.0f} s")
            self._loop = None
        if self._member is not None:
            self._member.close()
            self._member = None
        if self._own is not None:
            self._own.close()
            self._own = None
        if self._mailbox is not None:
            self._mailbox.close()
            self._mailbox = None
        if self._memory is not None:
            self._memory.release()
            self._memory = None

    def _run(self, loop: WorkerLoop | FollowerLoop) -> None:
        try:
            loop.run()
        except BaseException as error:
            log.exception("the loop of %s has failed", self._config.process)
            if self._member is not None:
                self._member.group.close()  # the other ranks end too
            if self.on_failure is not None:
                self.on_failure(error)

    def _make_port(self, memory: PoolMemory, mailbox: Mailbox, shard: KVShard, layers: LayerGate) -> RankPort:
        """The ways of this rank's KV, out and in; ``layers`` of the steps that write it."""
        config = self._config

        def report(event: RankEvent) -> None:
            mailbox.post(FromRank(config.rank, event))

        senders = make_senders(config.transport, memory, shard, report, self._links, config.curve)
        receivers = make_receivers(config.transport, config.host, memory, shard, report, config.curve)
        ways = tuple(KVWay(name, receiver.endpoint.address) for name, receiver in receivers.items())
        kv = KVRank(shard, len(memory.pool), host_of(memory), ways)
        return RankPort(config.rank, memory.pool, kv, mailbox.post, senders, receivers, layers)

    @abstractmethod
    def _make_machine(self, address: WorkerAddress, runner: ModelRunner) -> Machine:
        """Its decisions."""


def _shard(layout: KVLayout, model: ModelConfig, group: ParallelGroup) -> KVShard:
    """What blocks of a rank are, of the model's."""
    return shard_of(layout, model.num_kv_heads, group.heads(model.num_heads, model.num_kv_heads).kv.start)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _nobody(step: StepInput) -> None:
    """Has to be told of a step where there is one rank."""

"""The other ranks of an engine in this process, each a child process: for scripts and benchmarks, without Ray."""

import multiprocessing
import secrets
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from engine.core.errors import GroupLost
from engine.core.step_input import StepInput
from engine.models.config import ModelConfig
from engine.parallel import ParallelGroup
from engine.rank import RankModel
from engine.runner import kv_layout
from kv_transfer.core.lanes import shard_of
from messages.codec import decoder_for
from messages.common import KVRank
from messages.ids import Address, Epoch, WorkerId
from runtime.core.rank_wire import RANK_COMMANDS, RANK_EVENTS
from runtime.follower import FOLLOWER_MESSAGES, Follower
from runtime.leader import RANK_MESSAGES, Leader
from runtime.mailbox import Mailbox

_WORKER = WorkerId("local")
_LOOPBACK = "127.0.0.1"
END_WITHIN = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSettings:
    """What every rank of the engine must agree on."""

    folder: Path
    dtype: str
    num_blocks: int
    block_size: int
    max_model_len: int
    kv_dtype: str = "auto"
    quantization: str | None = None
    swap_blocks: int = 0
    threads: int = 1


class LocalRanks:
    """Ranks 1 .. ``size - 1``; ``group`` and ``broadcast`` are for the engine, which is rank 0. A context manager."""

    def __init__(self, size: int, settings: RankSettings) -> None:
        key = secrets.token_bytes(32)
        spawn = multiprocessing.get_context("spawn")
        self._mailbox = Mailbox(_LOOPBACK, decoder_for(*RANK_MESSAGES))
        self._children = [
            spawn.Process(target=_serve, args=(settings, rank, size, key, self._mailbox.address), daemon=True)
            for rank in range(1, size)
        ]
        self._leader = Leader(
            self._mailbox, _WORKER, Epoch(secrets.randbits(62)), size, key,
            commands=RANK_COMMANDS, events=RANK_EVENTS, look=self._look,
        )  # fmt: skip
        try:
            for child in self._children:
                child.start()
            self.group: ParallelGroup = self._leader.assemble("cpu")
        except BaseException:
            self.close()
            raise

    def broadcast(self, step: StepInput) -> None:
        """See ``ModelRunner``."""
        self._leader.broadcast(step)

    def wait_until_ready(self) -> None:
        """Return when every rank has loaded its part of the model."""
        self._leader.wait_until_ready()

    def close(self) -> None:
        """Let the ranks end; harmless twice."""
        self._leader.close()
        self._mailbox.close()
        for child in self._children:
            if child.pid is not None:
                child.join(END_WITHIN)
                child.kill()
                child.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _look(self) -> None:
        for rank, child in enumerate(self._children, 1):
            if child.exitcode is not None:
                raise GroupLost(f"rank {rank} ended with exit code {child.exitcode}; what it said stands above")


def _serve(settings: RankSettings, rank: int, size: int, key: bytes, leader: Address) -> None:
    """A child's life."""
    torch.set_num_threads(settings.threads)
    with Mailbox(_LOOPBACK, decoder_for(*FOLLOWER_MESSAGES)) as mailbox:
        follower = Follower(mailbox, _WORKER, rank, size, key, leader, commands=RANK_COMMANDS, events=RANK_EVENTS)
        group = follower.join()
        try:
            config = ModelConfig.from_folder(settings.folder)
            layout = kv_layout(config, settings.dtype, settings.block_size, kv_dtype=settings.kv_dtype, group=group)
            model = RankModel(
                settings.folder,
                config,
                group,
                layout,
                dtype=config.resolve_dtype(settings.dtype),
                kv_memory=torch.from_numpy(np.zeros(settings.num_blocks * layout.block_bytes, np.uint8)),
                max_positions=settings.max_model_len,
                quantization=settings.quantization,
                swap_blocks=settings.swap_blocks,
            )
            first = group.heads(config.num_heads, config.num_kv_heads).kv.start
            shard = shard_of(layout, config.num_kv_heads, first)
            follower.ready(KVRank(shard, settings.num_blocks, host="local"))
            follower.serve(model, _refuse)
        finally:
            follower.close()


def _refuse(command: Any) -> None:
    raise AssertionError(f"this rank moves no KV: {command}")

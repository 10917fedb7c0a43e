"""Other ranks for a test: child processes that do what they are told, and tell what came of it."""

import contextlib
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.engine import Engine
from engine.models.config import ModelConfig
from engine.parallel import ParallelGroup
from engine.rank import STEP_ERRORS, RankModel
from engine.runner import kv_layout
from engine.shared_memory_group import SharedMemoryGroup

Task = Callable[..., Any]
"""Called in a child with its connection to the test, its rank, and the arguments; picklable."""


class Ranks:
    """Ranks 1 .. ``count``, each a process; rank 0 is the test."""

    def __init__(self, count: int) -> None:
        # Forked from a server that has imported torch: once for all ranks of all tests.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(1, count + 1):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def begin(self, size: int, task: Task, *arguments: Any) -> None:
        """Have ranks 1 .. ``size - 1`` do ``task``."""
        for connection in self.connections[: size - 1]:
            connection.send((task, arguments))

    def results(self, size: int) -> list[Any]:
        """What ``task`` returned on each; an exception as such."""
        return [connection.recv() for connection in self.connections[: size - 1]]

    def close(self) -> None:
        for connection, process in zip(self.connections, self.processes, strict=True):
            connection.close()
            process.join(10)
            assert not process.is_alive()
            process.close()


def _serve(test: Connection, rank: int) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            task, arguments = test.recv()
        except EOFError:
            return
        try:
            result = task(test, rank, *arguments)
        except Exception as error:  # noqa: BLE001 - for the test to look at
            result = error
        test.send(result)


def follow(test: Connection, rank: int, size: int, address: str, folder: Path, dtype: str, num_blocks: int) -> str:
    """A rank of an engine: runs the steps that the test sends, until it sends None."""
    group = SharedMemoryGroup(rank, size, address)
    try:
        _follow(test, group, folder, dtype, num_blocks)
    finally:
        group.close()
    return "done"


def _follow(test: Connection, group: ParallelGroup, folder: Path, dtype: str, num_blocks: int) -> None:
    config = ModelConfig.from_folder(folder)
    layout = kv_layout(config, dtype, 16, group=group)
    memory = torch.from_numpy(np.zeros(num_blocks * layout.block_bytes, np.uint8))
    positions = config.max_position_embeddings
    model = RankModel(folder, config, group, layout, dtype=dtype, kv_memory=memory, max_positions=positions)
    test.send("loaded")
    while (step := test.recv()) is not None:
        with contextlib.suppress(*STEP_ERRORS):  # told to the others already
            model.follow(step)


class ParallelEngine:
    """An ``Engine`` whose other ranks are ``ranks``; a context manager."""

    def __init__(self, ranks: Ranks, size: int, folder: Path, *, dtype: str, num_blocks: int, **options: Any) -> None:
        self._ranks, self._size = ranks, size
        shared = SharedMemoryGroup.create(size)
        ranks.begin(size, follow, size, shared.address, folder, dtype, num_blocks)
        self._group = SharedMemoryGroup(0, size, shared)
        layout = kv_layout(ModelConfig.from_folder(folder), dtype, 16, group=self._group)
        self.engine = Engine(
            folder, dtype=dtype, kv_bytes=num_blocks * layout.block_bytes, group=self._group, broadcast=self._send,
            **options,
        )  # fmt: skip
        # A rank that is still loading, after all of its imports, may be silent for longer than a step allows.
        loaded = ranks.results(size)
        assert loaded == ["loaded"] * (size - 1), loaded

    def _send(self, step: Any) -> None:
        for connection in self._ranks.connections[: self._size - 1]:
            connection.send(step)

    def __enter__(self) -> Engine:
        return self.engine

    def __exit__(self, *_: object) -> None:
        self._send(None)
        results = self._ranks.results(self._size)
        self._group.close()
        assert results == ["done"] * (self._size - 1), results

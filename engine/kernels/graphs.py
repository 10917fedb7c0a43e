"""Decode steps as captured CUDA graphs: one launch in place of hundreds, which at small batches take longer than what
they launch.

A graph replays the same kernels on the same memory, so there is one for each of a few numbers of rows, and a step is
padded to the next of them. A padded row has length 0: it writes to no block, and what it computes is thrown away.
"""

from collections.abc import Callable

import numpy as np
import torch

from engine.core.step_input import StepInput
from engine.kernels.attention import AttentionMaker, DecodeRows, KernelAttention
from engine.models.interface import Model

Run = Callable[[], torch.Tensor]
Capture = Callable[[Run], Run]
"""Takes a function of fixed tensors; gives one that does the same work on them, into the same result."""

MAX_ROWS = 256
"""Rows beyond which the launches are hidden behind the kernels anyway."""


def buckets(most: int) -> list[int]:
    """Numbers of rows that graphs are captured for: powers of two up to 16, then steps of 16 up to ``most`` or more."""
    return [size for size in (1, 2, 4, 8) if size < most] + list(range(16, -(-most // 16) * 16 + 1, 16))


class CudaCapture:
    """``Capture`` by ``torch.cuda.CUDAGraph``; all graphs share one pool of memory, since one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        # Once outside of the graph, on a stream of its own: a first run compiles kernels and sets up libraries.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay


class DecodeGraphs:
    """Runs steps in which every row has one token; a bucket's graph is captured with the first step that needs it."""

    def __init__(self, model: Model, maker: AttentionMaker, max_positions: int, capture: Capture) -> None:
        self._model = model
        self._maker = maker
        self._capture = capture
        self._buckets = buckets(MAX_ROWS)
        self._max_positions = max_positions
        width = maker.layout.blocks_for(max_positions)
        self._tables = torch.zeros((MAX_ROWS, width), dtype=torch.int32, device=maker.device)
        self._made: dict[int, tuple[torch.Tensor, Run]] = {}

    def fits(self, step: StepInput) -> bool:
        rows, width = step.block_tables.shape
        return rows <= MAX_ROWS and width <= self._tables.shape[1] and len(step.tokens) == rows

    def run(self, step: StepInput) -> torch.Tensor:
        """A step that fits -> hidden states ``[rows, hidden]``, valid until the next step."""
        rows, width = step.block_tables.shape
        bucket = next(size for size in self._buckets if size >= rows)
        if bucket not in self._made:
            self._made[bucket] = self._make(bucket)
        inputs, replay = self._made[bucket]
        fields = np.zeros(tuple(inputs.shape), np.int32)
        fields[0, :rows] = step.tokens
        fields[1, :rows] = step.num_computed
        fields[2, :rows] = step.num_computed + 1
        fields[3] = -1
        if self._maker.layout.quantized:
            spans = fields[4:8].ravel()[: 4 * bucket].reshape(bucket, 4)
            spans[:rows] = self._maker.places(step)
        else:
            fields[3, :rows] = self._maker.places(step)
        inputs.copy_(torch.from_numpy(fields))
        self._tables[:rows, :width].copy_(torch.from_numpy(np.ascontiguousarray(step.block_tables)))
        return replay()[:rows]

    def _make(self, bucket: int) -> tuple[torch.Tensor, Run]:
        """Fixed inputs, ``[8, bucket or more]``: tokens, positions, lengths, slots, spans (of four numbers)."""
        device, aligned = self._maker.device, -(-bucket // 4) * 4
        inputs = torch.zeros((8, aligned), dtype=torch.int32, device=device)
        inputs[3] = -1
        spans = inputs[4:8].view(-1)[: 4 * bucket].view(bucket, 4)
        attend = KernelAttention(
            self._maker.data,
            self._maker.scales,
            spans if self._maker.layout.quantized else inputs[3, :bucket],
            DecodeRows(
                self._tables[:bucket],
                torch.arange(bucket, dtype=torch.int32, device=device),
                inputs[2, :bucket],
                self._maker.splits(bucket, self._max_positions),
            ),
            None,
        )
        run = self._capture(lambda: self._model.forward(inputs[0, :bucket], inputs[1, :bucket], attend))
        return inputs, run

"""Runs a rank's steps on a GPU: the model over the kernels, and its decode steps as CUDA graphs."""

import numpy as np
import torch

from engine.core.step_input import StepInput
from engine.kernels.attention import AttentionMaker, upload
from engine.kernels.blocks import copy_blocks, records_of
from engine.kernels.graphs import CudaCapture, DecodeGraphs
from engine.kv_cache import KVCache
from engine.models.interface import Model
from engine.parallel import ParallelGroup


class KernelBackend:
    """``graphs``: for steps in which every row has one token; without it they run kernel by kernel."""

    def __init__(
        self, model: Model, kv_cache: KVCache, maker: AttentionMaker, graphs: DecodeGraphs | None = None
    ) -> None:
        self._model = model
        self._maker = maker
        self._graphs = graphs
        self._records = records_of(kv_cache)

    def forward(self, step: StepInput) -> torch.Tensor:
        """Compute the step and write its KV -> its hidden states, ``[tokens, hidden]``, valid until the next step.

        Nothing is cleared beforehand: the kernels never look at what is behind a sequence's end, and a quantised record
        begins anew with its first token.
        """
        if len(step.moves.copies):
            source, target = upload(self._maker.device, list(step.moves.copies.T))
            copy_blocks(self._records, source, target)
        if self._graphs is not None and self._graphs.fits(step):
            return self._graphs.run(step)
        attend, (tokens, positions) = self._maker.prepare(step, step.tokens, step.positions.astype(np.int32))
        return self._model.forward(tokens, positions, attend)


def gpu_backend(
    model: Model,
    kv_cache: KVCache,
    group: ParallelGroup,
    num_heads: int,
    compute_dtype: torch.dtype,
    max_positions: int,
) -> KernelBackend:
    """What a rank on a CUDA device runs. Its graphs hold one rank's work only: ranks that must meet run without."""
    maker = AttentionMaker(kv_cache, num_heads, compute_dtype)
    captures = group.size == 1 and model.fixed_launches
    graphs = DecodeGraphs(model, maker, max_positions, CudaCapture()) if captures else None
    return KernelBackend(model, kv_cache, maker, graphs)

"""One rank: its shard of the model, its KV cache, and a step's arithmetic on them. Samples nothing, decides nothing."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.core.kv_layout import KVLayout
from engine.core.step_input import StepInput
from engine.host_blocks import HostBlocks
from engine.kv_cache import KVCache
from engine.layer_gate import LayerGate, StepLayers
from engine.models.config import ModelConfig
from engine.models.interface import Attend
from engine.models.registry import load_model
from engine.parallel import ParallelGroup

# torch asks for huge pages for large tensors where this is set before its first one: steadier, and up to 20 % faster.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

STEP_ERRORS = (RuntimeError, ValueError, IndexError, MemoryError)
"""What torch and numpy raise when a step goes wrong; the next one may go well."""


class RankModel:
    """``kv_memory``: uint8, whole blocks of ``layout``, of the caller's; for example shared memory.
    ``swap_blocks``: as many more in host memory, for KV that the pool has no room for."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        group: ParallelGroup,
        layout: KVLayout,
        *,
        dtype: str,
        kv_memory: torch.Tensor,
        max_positions: int,
        quantization: str | None = None,
        swap_blocks: int = 0,
        device: str = "cpu",
    ) -> None:
        self.layout = layout
        self.kv_cache = KVCache(layout, kv_memory)
        self.layers = LayerGate(layout.num_layers)
        self._host = HostBlocks(swap_blocks, layout.block_bytes)
        compute: torch.dtype = getattr(torch, dtype)
        heads = group.heads(config.num_heads, config.num_kv_heads)
        self.group = group
        self._backend = None
        with torch.inference_mode():
            with torch.device(device):
                self._model = load_model(folder, config, group, compute, max_positions, quantization)
            if device == "cpu":
                from engine.attention import make_attention  # and numba, which a GPU does not need

                self._attention = make_attention(self.kv_cache, len(heads.query), compute)
            else:
                from engine.kernels.backend import gpu_backend  # Triton, which a machine without a GPU need not have

                self._backend = gpu_backend(self._model, self.kv_cache, group, len(heads.query), compute, max_positions)

    @torch.inference_mode()
    def forward(self, step: StepInput) -> tuple[torch.Tensor, frozenset[int]]:
        """Compute the step and write its KV -> the hidden states of ``logit_rows``, ``[rows, hidden]``, and the rows of
        the step whose KV is not all numbers."""
        with self.layers.step() as layers:
            self._host.swap_out(self.kv_cache, step.moves.swap_out)
            self._host.swap_in(self.kv_cache, step.moves.swap_in)
            if self._backend is None:
                hidden = self._compute(step, layers)
            else:
                # A GPU tells of all layers at the end: which one it has reached, the host does not know.
                hidden = self._backend.forward(step)
                if layers.watched:
                    torch.cuda.current_stream().synchronize()
        if len(step.tokens) == step.num_sampled == len(step.logit_rows):
            return hidden, frozenset()
        rows = torch.from_numpy(step.logit_rows.astype(np.int64)).to(hidden.device)
        return hidden[rows], _not_numbers(step, hidden)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, hidden] -> [rows, vocab]``, fp32; whole on rank 0 only."""
        return self._model.logits(hidden).float()

    def follow(self, step: StepInput) -> None:
        """What a rank other than 0 does of a step."""
        with self.group.step():
            hidden, _ = self.forward(step)
            for rows in step.logit_chunks():
                self.logits(hidden[rows])

    def _compute(self, step: StepInput, layers: StepLayers) -> torch.Tensor:
        """All of a step's hidden states, on a CPU."""
        if len(step.moves.copies):
            copies = torch.from_numpy(step.moves.copies.astype(np.int64))
            self.kv_cache.copy(copies[:, 0], copies[:, 1])
        self._clear_begun(step)
        attend = _telling(self._attention.prepare(step), layers)
        tokens = torch.from_numpy(step.tokens.astype(np.int64))
        return self._model.forward(tokens, torch.from_numpy(step.positions), attend)

    def _clear_begun(self, step: StepInput) -> None:
        """Zero each block that this step begins and does not fill: attention masks what is behind a sequence's end,
        but 0 times a former owner's NaN is NaN. Of quantised blocks all that begin, for their scales."""
        size = self.layout.block_size
        ends = step.num_computed + step.num_tokens
        if self.layout.quantized:
            begun = step.positions % size == 0
            rows = np.repeat(np.arange(len(ends)), step.num_tokens)[begun]
            blocks = step.block_tables[rows, step.positions[begun] // size]
        else:
            last = (ends - 1) // size
            rows = np.flatnonzero((last * size >= step.num_computed) & (ends % size != 0))
            blocks = step.block_tables[rows, last[rows]]
        if len(blocks):
            self.kv_cache.clear(torch.from_numpy(blocks.astype(np.int64)))


def _telling(attend: Attend, layers: StepLayers) -> Attend:
    """``attend``, which tells who listens of each layer that it has written."""
    if not layers.watched:
        return attend

    def attend_and_tell(layer: int, *given: Any, **options: Any) -> torch.Tensor:
        out = attend(layer, *given, **options)
        if layer == layers.num_ready:  # of layers in another order all are told of at the end
            layers.advance(layer + 1)
        return out

    return attend_and_tell


def _not_numbers(step: StepInput, hidden: torch.Tensor) -> frozenset[int]:
    """Rows with a hidden state that is not finite: then so is the KV of its token, or of one that it attends to. A row
    that computes one token and samples shows it in its logits, so a decode step need not ask."""
    finite = hidden.sum(-1, dtype=torch.float32).isfinite()
    if bool(finite.all()):
        return frozenset()
    rows = np.repeat(np.arange(len(step.num_tokens)), step.num_tokens)
    return frozenset(rows[~finite.cpu().numpy()].tolist())

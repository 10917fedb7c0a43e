"""A model with random weights made on the device, and the time of its steps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.gpu_checks import make_cache
from engine.core.kv_layout import KVLayout
from engine.core.step_input import StepInput
from engine.kernels import sampling
from engine.kernels.attention import AttentionMaker
from engine.kernels.backend import KernelBackend
from engine.kernels.graphs import Capture, CudaCapture, DecodeGraphs
from engine.models.llama import Llama
from engine.models.llama_config import LlamaConfig
from engine.parallel import ParallelGroup

LLAMA_3_1_8B = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 16_384, "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}  # fmt: skip

Seconds = Callable[[Callable[[], object]], float]
"""The time of one call."""


class RandomWeights:
    """Stands in for ``engine.weights.Checkpoint``: any tensor that it is asked for, random."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.parameters: dict[str, int] = {}

    def __enter__(self) -> "RandomWeights":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __contains__(self, name: str) -> bool:
        return True

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, *, rows: Any = None, columns: Any = None
    ) -> torch.Tensor:
        self.parameters[name] = int(np.prod(shape))
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=self._device)
        return torch.randn(shape, dtype=dtype, device=self._device).mul_(shape[1] ** -0.5)

    def take_rows(
        self, names: list[str], counts: list[int], shares: Any, columns: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        return self.take("+".join(names), (sum(counts), *columns), dtype)

    def unread(self) -> Iterator[str]:
        return iter(())


@dataclass(frozen=True)
class DecodeTime:
    batch: int
    context: int
    graphs: bool
    seconds: float
    floor: float
    """Seconds in which the weights and the KV can be read, at the rate of a copy."""


@dataclass(frozen=True)
class PrefillTime:
    tokens: int
    seconds: float
    flops: float


class Bench:
    """One rank of a model, as a GPU runs it. ``capture`` None: on a GPU, CUDA graphs."""

    def __init__(
        self, shape: dict[str, Any], device: torch.device, seconds: Seconds, dtype: str, capture: Capture | None = None
    ) -> None:
        self.config = LlamaConfig.parse("LlamaForCausalLM", shape, dtype, ())
        self.device = device
        self._seconds = seconds
        self._compute: torch.dtype = getattr(torch, dtype)
        weights = RandomWeights(device)
        with patch("engine.models.llama.Checkpoint", lambda folder: weights), torch.device(device):
            limit = self.config.max_position_embeddings
            self._model = Llama(Path(), self.config, ParallelGroup(), self._compute, limit)
        self.read_parameters = sum(weights.parameters.values()) - weights.parameters["model.embed_tokens.weight"]
        self._head_parameters = weights.parameters["lm_head.weight"]
        self._capture = capture

    def layout(self, block_size: int = 16) -> KVLayout:
        config = self.config
        return KVLayout(config.num_layers, config.num_kv_heads, config.head_dim, block_size, str(config.dtype))

    def blocks(self, batch: int, context: int) -> int:
        return batch * self.layout().blocks_for(context)

    @torch.inference_mode()
    def decode(self, batch: int, context: int, read_rate: float) -> Iterator[DecodeTime]:
        """A step of ``batch`` rows that see ``context`` tokens each, greedy, until its tokens are on the host; with
        graphs and without. ``read_rate`` in bytes/s."""
        layout = self.layout()
        cache = make_cache(layout, self.blocks(batch, context), self.device)
        maker = AttentionMaker(cache, self.config.num_heads, self._compute)
        capture = self._capture or CudaCapture()
        graphs = DecodeGraphs(self._model, maker, self.config.max_position_embeddings, capture)
        order = np.random.default_rng(0).permutation(cache.num_blocks).astype(np.int32)
        step = StepInput(
            tokens=np.arange(batch, dtype=np.int32),
            num_tokens=np.ones(batch, np.int32),
            num_computed=np.full(batch, context - 1, np.int32),
            block_tables=order.reshape(batch, -1),
            logit_rows=np.arange(batch, dtype=np.int32),
            num_sampled=batch,
        )
        bytes_read = self.read_parameters * self._compute.itemsize + layout.block_bytes * cache.num_blocks
        for captured in (True, False):
            backend = KernelBackend(self._model, cache, maker, graphs if captured else None)
            taken = self._seconds(lambda backend=backend: self._next_tokens(backend.forward(step)))
            yield DecodeTime(batch, context, captured, taken, bytes_read / read_rate)

    @torch.inference_mode()
    def prefill(self, tokens: int) -> PrefillTime:
        """One prompt of ``tokens`` in one chunk, and its first token."""
        cache = make_cache(self.layout(), self.blocks(1, tokens), self.device)
        backend = KernelBackend(self._model, cache, AttentionMaker(cache, self.config.num_heads, self._compute))
        step = StepInput(
            tokens=np.arange(tokens, dtype=np.int32) % self.config.vocab_size,
            num_tokens=np.array([tokens], np.int32),
            num_computed=np.zeros(1, np.int32),
            block_tables=np.arange(cache.num_blocks, dtype=np.int32)[None],
            logit_rows=np.array([tokens - 1], np.int32),
            num_sampled=1,
        )
        taken = self._seconds(lambda: self._next_tokens(backend.forward(step)[-1:]))
        config = self.config
        products = 2 * (self.read_parameters - self._head_parameters) * tokens + 2 * self._head_parameters
        # Scores and their use: 2 x 2 x dim for each head and each of n^2 / 2 pairs.
        attention = 2 * config.num_layers * config.num_heads * config.head_dim * tokens**2
        return PrefillTime(tokens, taken, products + attention)

    def _next_tokens(self, hidden: torch.Tensor) -> list[int]:
        logits = self._model.logits(hidden).float()
        zeros = torch.zeros(len(logits), dtype=torch.float64, device=self.device)
        found: list[int] = sampling.sample(logits, zeros, zeros.float(), zeros.int(), zeros + 1, zeros.float()).tolist()
        return found

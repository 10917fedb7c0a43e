"""The model families, in one place: which architecture (``architectures`` in config.json) runs how.

An architecture that is not here runs through transformers' own code (``engine.models.fallback``). How to add one:
docs/add-a-model.md. Needs neither torch nor transformers until a model is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from engine.models.config import ModelConfig
    from engine.models.interface import Model
    from engine.parallel import ParallelGroup


class Window(Enum):
    """Which layers slide a window (``sliding_window``)."""

    NEVER = "never"
    ALWAYS = "always"
    """In every layer, unless ``sliding_window`` is null."""
    SWITCHED = "switched"
    """In every layer where ``use_sliding_window`` is true."""
    BY_LAYER = "by layer"
    """Where ``use_sliding_window`` is true, from ``max_window_layers`` on or by ``layer_types``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """How a family names its experts, in config.json and in a checkpoint."""

    count: tuple[str, ...]
    """Keys of config.json, the first that is there counts."""
    inner: str
    """Key of an expert's inner size."""
    block: str
    """In a layer of the checkpoint: holds ``gate`` (the router) and ``experts``."""
    gate: str
    up: str
    down: str
    norm_topk_prob: bool
    """Whether the chosen experts' weights are made to sum to 1, where config.json does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How an architecture of the Llama family differs from Llama: what config.json leaves out stands here, as in
    transformers 5."""

    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = True
    """Whether ``attention_bias`` is also one of attention's output projection."""
    window: Window = Window.NEVER
    sliding_window: int | None = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    experts: Experts | None = None


NATIVE: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(window=Window.ALWAYS),
    "MixtralForCausalLM": Family(
        window=Window.ALWAYS,
        sliding_window=None,
        rms_norm_eps=1e-5,
        rope_theta=1_000_000.0,
        experts=Experts(
            count=("num_local_experts",),
            inner="intermediate_size",
            block="block_sparse_moe",
            gate="w1",
            up="w3",
            down="w2",
            norm_topk_prob=True,
        ),
    ),
    "Qwen2ForCausalLM": Family(qkv_bias=True, output_bias=False, window=Window.BY_LAYER),
    "Qwen3ForCausalLM": Family(qk_norm=True, window=Window.BY_LAYER),
    "Qwen3MoeForCausalLM": Family(
        qk_norm=True,
        window=Window.SWITCHED,
        experts=Experts(
            count=("num_experts", "num_local_experts"),
            inner="moe_intermediate_size",
            block="mlp",
            gate="gate_proj",
            up="up_proj",
            down="down_proj",
            norm_topk_prob=False,
        ),
    ),
}


def load_model(
    folder: Path,
    config: "ModelConfig",
    group: "ParallelGroup",
    dtype: "torch.dtype",
    max_positions: int,
    quantization: str | None = None,
) -> "Model":
    """This rank's part of the model in ``folder``; ``ModelError`` where it cannot be served.

    ``quantization`` of the weights, on load: int8, fp8 or None; see ``engine.quantized``.
    """
    from engine.quantized import linear_maker

    make_linear = linear_maker(quantization)
    from engine.models.llama_config import LlamaConfig

    if isinstance(config, LlamaConfig):
        from engine.models.llama import Llama

        return Llama(folder, config, group, dtype, max_positions, make_linear)
    from engine.models.fallback import FallbackModel

    return FallbackModel(folder, config, group, dtype, max_positions, make_linear)

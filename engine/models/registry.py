"""Which class runs which architecture (``architectures`` in config.json)."""

from pathlib import Path

import torch

from engine.models.config import ModelConfig
from engine.models.interface import Model
from engine.models.llama import Llama
from engine.parallel import ParallelGroup

NATIVE = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Llama,
    "Qwen2ForCausalLM": Llama,
    "Qwen3ForCausalLM": Llama,
}


def load_model(
    folder: Path, config: ModelConfig, group: ParallelGroup, dtype: torch.dtype, max_positions: int
) -> Model:
    """This rank's part of the model in ``folder``; ``ModelError`` where it cannot be served."""
    return NATIVE[config.architecture](folder, config, group, dtype, max_positions)

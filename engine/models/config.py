"""What a model folder's config.json says. Needs neither torch nor transformers, but for the architectures that only
transformers knows."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.core.errors import ModelError
from engine.core.kv_layout import DTYPE_BYTES
from engine.models.registry import NATIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What the engine has to know of any model."""

    architecture: str
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    dtype: str
    """The checkpoint's own."""
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read config.json and generation_config.json; ``ModelError`` for what cannot be served."""
        from engine.models.llama_config import LlamaConfig, beyond_native

        config = _read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        generating = _read_json(generation) if generation.is_file() else {}
        _refuse_quantized(folder, config)
        try:
            names = config.get("architectures") or [f"{config.get('model_type', 'unknown')} (no architectures)"]
            architecture = str(names[0])
            dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
            eos = generating.get("eos_token_id", config.get("eos_token_id"))
            eos_token_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),)
            if architecture in NATIVE and beyond_native(config) is None:
                return LlamaConfig.parse(architecture, config, dtype, eos_token_ids)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder}/config.json: {type(error).__name__}: {error}") from error
        from engine.models.fallback_config import read_config  # heavy: transformers, and torch with it

        return read_config(folder, architecture, dtype, eos_token_ids)

    @property
    def native(self) -> bool:
        """Whether the model runs natively, or through transformers' own code."""
        return False

    def resolve_dtype(self, dtype: str) -> str:
        """``auto`` is the checkpoint's own dtype; anything else must be one that the engine computes in."""
        name = self.dtype if dtype == "auto" else dtype
        if name not in DTYPE_BYTES:
            raise ModelError(f"dtype must be auto, {', '.join(DTYPE_BYTES)}; got {name!r}")
        return name


def _refuse_quantized(folder: Path, config: dict[str, Any]) -> None:
    quantized = config.get("quantization_config") or config.get("compression_config")
    if not quantized:
        return
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    raise ModelError(
        f"{folder}: {str(method or 'quantised').upper()} checkpoints are not read yet; name the unquantised model, and "
        "set quantization: int8 or fp8 to shrink its weights while they are loaded"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; a model folder holds config.json and *.safetensors") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content

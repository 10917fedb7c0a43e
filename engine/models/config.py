"""What a model folder's config.json says, for the families that run natively. Needs neither torch nor transformers."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.core.errors import ModelError
from engine.core.kv_layout import DTYPE_BYTES

NATIVE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures of the Llama family: RMSNorm, RoPE, grouped queries, SwiGLU."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's stretching of the slow frequencies (Llama 3.1 release, Meta 2024)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    """Of the query, key and value projections."""
    output_bias: bool
    """Of attention's output projection."""
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm over each head's query and key (Qwen 3)."""
    windows: tuple[int | None, ...]
    """For each layer: how many tokens a token sees, itself included; None: all before it."""
    dtype: str
    """The checkpoint's own."""
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read config.json and generation_config.json; ``ModelError`` for what cannot be served."""
        config = _read_json(folder / "config.json")
        generation = _read_json(folder / "generation_config.json") if _has(folder / "generation_config.json") else {}
        architectures = config.get("architectures") or [f"{config.get('model_type', 'unknown')} (no architectures)"]
        architecture = str(architectures[0])
        if architecture not in NATIVE:
            raise ModelError(f"{folder}: {architecture} is not supported; the native families are {', '.join(NATIVE)}")
        if config.get("quantization_config"):
            raise ModelError(f"{folder}: quantised checkpoints are not supported; use the unquantised model")
        try:
            return cls._parse(architecture, config, generation)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder}/config.json: {type(error).__name__}: {error}") from error

    @classmethod
    def _parse(cls, architecture: str, config: dict[str, Any], generation: dict[str, Any]) -> "ModelConfig":
        heads = int(config["num_attention_heads"])
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        eos = generation.get("eos_token_id", config.get("eos_token_id"))
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        qwen2 = architecture == "Qwen2ForCausalLM"
        bias = bool(config.get("attention_bias", qwen2))
        parsed = cls(
            architecture=architecture,
            vocab_size=int(config["vocab_size"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
            rope_scaling=_rope_scaling(rope),
            max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bias,
            output_bias=bias and not qwen2,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            windows=_windows(architecture, config),
            dtype=dtype.removeprefix("torch."),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
        )
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act must be silu, got {config['hidden_act']!r}")
        if parsed.num_heads % parsed.num_kv_heads:
            raise ValueError(f"{parsed.num_heads} heads do not divide into {parsed.num_kv_heads} KV heads")
        return parsed

    def resolve_dtype(self, dtype: str) -> str:
        """``auto`` is the checkpoint's own dtype; anything else must be one that the engine computes in."""
        name = self.dtype if dtype == "auto" else dtype
        if name not in DTYPE_BYTES:
            raise ModelError(f"dtype must be auto, {', '.join(DTYPE_BYTES)}; got {name!r}")
        return name

    def inverse_frequencies(self) -> list[float]:
        """RoPE's angle a position, for each pair of dimensions (Su et al. 2021), stretched where the model says so."""
        plain = [self.rope_theta ** (-2 * pair / self.head_dim) for pair in range(self.head_dim // 2)]
        scaling = self.rope_scaling
        if scaling is None:
            return plain
        low = scaling.original_max_position_embeddings / scaling.low_freq_factor
        high = scaling.original_max_position_embeddings / scaling.high_freq_factor
        stretched = []
        for frequency in plain:
            wavelength = 2 * math.pi / frequency
            if wavelength < high:
                stretched.append(frequency)
            elif wavelength > low:
                stretched.append(frequency / scaling.factor)
            else:
                smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                stretched.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
        return stretched


def _has(path: Path) -> bool:
    return path.is_file()


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


def _windows(architecture: str, config: dict[str, Any]) -> tuple[int | None, ...]:
    """Each layer's sliding window, as transformers 5 reads the same keys: Mistral slides in every layer unless told
    otherwise, Qwen 2 and 3 where ``use_sliding_window`` is set, from layer ``max_window_layers`` on or by
    ``layer_types``; Llama never does."""
    layers = int(config["num_hidden_layers"])
    window = config.get("sliding_window", 4096)
    if architecture == "MistralForCausalLM":
        slides = [window is not None] * layers
    elif architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM") and config.get("use_sliding_window") and window:
        first = int(config.get("max_window_layers", 28))
        default = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
        types = config.get("layer_types") or default
        if len(types) != layers or set(types) - {"sliding_attention", "full_attention"}:
            raise ValueError(f"layer_types must name full_attention or sliding_attention {layers} times")
        slides = [kind == "sliding_attention" for kind in types]
    else:
        slides = [False] * layers
    if any(slides) and int(window) < 1:
        raise ValueError(f"sliding_window must be at least 1, got {window}")
    return tuple(int(window) if slide else None for slide in slides)


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"RoPE scaling {kind!r} is not supported; default and llama3 are")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )

"""What config.json says of a model of the Llama family."""

import math
from dataclasses import dataclass
from typing import Any

from engine.models.config import ModelConfig
from engine.models.registry import NATIVE, Family, Window


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's stretching of the slow frequencies (Llama 3.1 release, Meta 2024)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """A layer's experts: each a SwiGLU MLP of its own, a few of them chosen for each token (Fedus et al. 2021)."""

    count: int
    per_token: int
    inner: int
    norm_topk_prob: bool
    """Whether the chosen experts' weights are made to sum to 1."""
    sparse: tuple[bool, ...]
    """For each layer: whether it has experts, or one MLP like any other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(ModelConfig):
    hidden_size: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
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
    experts: ExpertsConfig | None

    @property
    def native(self) -> bool:
        return True

    @classmethod
    def parse(
        cls, architecture: str, config: dict[str, Any], dtype: str, eos_token_ids: tuple[int, ...]
    ) -> "LlamaConfig":
        """Raises ``KeyError``, ``TypeError`` or ``ValueError``."""
        family = NATIVE[architecture]
        heads = int(config["num_attention_heads"])
        rope = _rope(config)
        bias = bool(config.get("attention_bias", family.qkv_bias))
        parsed = cls(
            architecture=architecture,
            vocab_size=int(config["vocab_size"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
            rms_norm_eps=float(config.get("rms_norm_eps", family.rms_norm_eps)),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or family.rope_theta),
            rope_scaling=_rope_scaling(rope),
            max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bias,
            output_bias=bias and family.output_bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            windows=_windows(family, config),
            experts=_experts(family, config),
            dtype=dtype,
            eos_token_ids=eos_token_ids,
        )
        if parsed.num_heads % parsed.num_kv_heads:
            raise ValueError(f"{parsed.num_heads} heads do not divide into {parsed.num_kv_heads} KV heads")
        return parsed

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


def beyond_native(config: dict[str, Any]) -> str | None:
    """What the native code of a family does not have and transformers' may; None where there is nothing of that."""
    if (kind := _rope_type(_rope(config))) not in ("default", "llama3"):
        return f"RoPE of type {kind!r}"
    if (act := config.get("hidden_act", "silu")) != "silu":
        return f"hidden_act {act!r}"
    return None


def _windows(family: Family, config: dict[str, Any]) -> tuple[int | None, ...]:
    layers = int(config["num_hidden_layers"])
    window = config.get("sliding_window", family.sliding_window)
    switched = family.window in (Window.SWITCHED, Window.BY_LAYER)
    if window is None or family.window is Window.NEVER or (switched and not config.get("use_sliding_window")):
        return (None,) * layers
    if int(window) < 1:
        raise ValueError(f"sliding_window must be at least 1, got {window}")
    slides = [True] * layers
    if family.window is Window.BY_LAYER:
        first = int(config.get("max_window_layers", 28))
        default = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
        types = config.get("layer_types") or default
        if len(types) != layers or set(types) - {"sliding_attention", "full_attention"}:
            raise ValueError(f"layer_types must name full_attention or sliding_attention {layers} times")
        slides = [kind == "sliding_attention" for kind in types]
    return tuple(int(window) if slide else None for slide in slides)


def _experts(family: Family, config: dict[str, Any]) -> ExpertsConfig | None:
    if family.experts is None:
        return None
    count = int(next(config[key] for key in family.experts.count if key in config))
    step, dense = int(config.get("decoder_sparse_step", 1)), config.get("mlp_only_layers") or []
    layers = range(int(config["num_hidden_layers"]))
    experts = ExpertsConfig(
        count=count,
        per_token=int(config["num_experts_per_tok"]),
        inner=int(config[family.experts.inner]),
        norm_topk_prob=bool(config.get("norm_topk_prob", family.experts.norm_topk_prob)),
        sparse=tuple(layer not in dense and count > 0 and (layer + 1) % step == 0 for layer in layers),
    )
    if not 1 <= experts.per_token <= count:
        raise ValueError(f"num_experts_per_tok must be 1 to {count}, got {experts.per_token}")
    return experts


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 reads it: whoever adds ``rope_scaling`` to a config.json means it, whatever else is there."""
    return dict(config.get("rope_scaling") or config.get("rope_parameters") or {})


def _rope_type(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    if _rope_type(rope) == "default":
        return None
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )

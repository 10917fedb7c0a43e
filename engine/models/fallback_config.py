"""What config.json says of a model that runs through transformers' own code.

Everything is refused here that can be known from the config alone, so that it is told before anything starts; what the
model's code does is checked when it is loaded (``engine.models.fallback``).
"""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from engine.core.errors import ModelError
from engine.models.config import ModelConfig
from engine.models.registry import NATIVE

_SERVED_LAYERS = {"full_attention", "sliding_attention", "attention", "moe", "dense", "sparse"}

FOREIGN_ERRORS = (
    OSError, ImportError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises where a config or a model is not to its liking; it has no tree of errors of its own."""


def load_config(folder: Path) -> Any:
    """transformers' config object; code of the checkpoint's own is never run."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except FOREIGN_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it needs code that comes with the checkpoint, which is never run"
        elif "does not recognize" in reason:
            reason = f"transformers {transformers.__version__} does not know this kind of model"
        raise ModelError(f"{folder}/config.json: {reason}") from error


def text_config(config: Any) -> Any:
    """The part of it that is about the text decoder."""
    return config.get_text_config(decoder=True)


def read_config(folder: Path, architecture: str, dtype: str, eos_token_ids: tuple[int, ...]) -> ModelConfig:
    """``ModelError`` where the model cannot be served."""
    config = load_config(folder)
    text = text_config(config)
    problem = _problem(config, text, architecture)
    if problem is not None:
        native = ", ".join(NATIVE)
        raise ModelError(
            f"{folder}: {architecture} is not supported: {problem}. Native are {native}; other causal language models "
            "run through transformers where their attention can be paged"
        )
    heads = _number(folder, text, "num_attention_heads")
    head_dim = _optional(text, "head_dim") or _number(folder, text, "hidden_size") // heads
    kv_heads = _optional(text, "num_key_value_heads") or _optional(text, "num_kv_heads") or heads
    if _optional(text, "kv_lora_rank"):  # multi-head latent attention, run with its keys and values spelled out
        head_dim = _number(folder, text, "qk_nope_head_dim") + _number(folder, text, "qk_rope_head_dim")
        kv_heads = heads
    return ModelConfig(
        architecture=architecture,
        vocab_size=_number(folder, text, "vocab_size"),
        num_layers=_number(folder, text, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_number(folder, text, "max_position_embeddings"),
        dtype=dtype,
        eos_token_ids=eos_token_ids,
    )


def _problem(config: Any, text: Any, architecture: str) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if config.is_encoder_decoder:
        return "it is an encoder and a decoder, not a causal language model"
    if architecture not in (CAUSAL.get(config.model_type), CAUSAL.get(text.model_type)):
        known = CAUSAL.get(config.model_type) or CAUSAL.get(text.model_type)
        return "it is no causal language model" + (f"; of this kind {known} is one" if known else "")
    if getattr(text, "alibi", False) or getattr(text, "position_embedding_type", "absolute") == "alibi":
        return "its positions are biases of attention scores (ALiBi)"
    kinds = {*(getattr(text, "layer_types", None) or ()), *(getattr(text, "layers_block_type", None) or ())}
    if others := sorted(kinds - _SERVED_LAYERS):
        return f"it has layers whose state is no KV cache of every token ({', '.join(others)})"
    return None


def _number(folder: Path, text: Any, name: str) -> int:
    value = _optional(text, name)
    if value is None or value < 1:
        raise ModelError(
            f"{folder}/config.json does not say {name} as one positive number, and the KV cache depends on it"
        )
    return value


def _optional(text: Any, name: str) -> int | None:
    try:
        value = getattr(text, name, None)
    except RuntimeError:  # it differs from layer to layer
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None

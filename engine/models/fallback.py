"""Any causal language model that transformers knows, by transformers' own code, with our paged attention inside.

1. The class that config.json names is loaded from safetensors; code of a checkpoint's own is never run.
2. The model is probed: a short prompt goes through transformers' own attention, then through ours, one layer after the
   other; what each layer asks of attention is noted. What cannot be paged is refused here.
3. A step is one flat batch ``[1, tokens]`` with a position for each token. The model is given no cache and no mask:
   which tokens belong together, and what each of them sees, is known to ``attend`` alone.

On several ranks each rank computes the whole model, but holds and attends to its own KV heads only; after each
attention the heads' outputs are brought together. So the KV cache and attention are shared out, weights are not.
"""

import threading
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers.pytorch_utils import Conv1D

from engine.core.errors import ModelError
from engine.linear import Linear, MakeLinear
from engine.models import fallback_probe as probe
from engine.models.config import ModelConfig
from engine.models.fallback_config import FOREIGN_ERRORS, load_config, text_config
from engine.models.interface import Attend
from engine.parallel import ParallelGroup

ATTENTION = "baton"
"""Our attention's name in transformers. No mask function goes by it, so models make no masks."""
Call = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, Any]], torch.Tensor]
_LOADING = threading.Lock()
"""transformers sets torch's default dtype, for the whole process, while it makes a model."""
_CALL: ContextVar[Call] = ContextVar("attention of the step that runs")


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: ``[1, heads, tokens, head_dim]`` each -> ``[1, tokens, heads, head_dim]``."""
    return _CALL.get()(module, query, key, value, attention_mask, options), None


transformers.AttentionInterface.register(ATTENTION, _attention)
transformers.AttentionInterface.register(probe.ATTENTION, _attention)
transformers.AttentionMaskInterface.register(probe.ATTENTION, probe.note_mask)


class _Body(torch.nn.Module):
    """Stands where the model's layers were: what is behind them (head, soft cap, scale) gets hidden states from us."""

    def __init__(self, output: type) -> None:
        super().__init__()
        self._output = output
        self.hidden = torch.empty(0)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._output(last_hidden_state=self.hidden)


class FallbackModel:
    """See ``engine.models.interface.Model``. ``ModelError`` for a model that cannot be served."""

    fixed_launches = False  # as far as we know

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        group: ParallelGroup,
        dtype: torch.dtype,
        max_positions: int,
        make_linear: MakeLinear = Linear,
    ) -> None:
        self._config = config
        self._share(ParallelGroup())  # each rank probes by itself: others may still be loading
        self._windows: dict[int, int | None] = {}
        what = f"{folder}: {config.architecture}"
        _refuse_changing_rope(what, folder, max_positions)
        model = _load(what, folder, config, dtype)
        try:
            with torch.inference_mode():
                self._take_apart(what, model)
                _refuse_forgetting(what, folder, self._windows, max_positions)
                if make_linear is not Linear:
                    _make_linears(self._layers, make_linear)
        except FOREIGN_ERRORS as error:
            raise ModelError(f"{what} cannot run on a paged cache: {type(error).__name__}: {error}") from error
        self._share(group)

    def _share(self, group: ParallelGroup) -> None:
        self._group = group
        self._shard = group.heads(self._config.num_heads, self._config.num_kv_heads)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """``tokens``, ``positions [tokens]`` -> hidden states ``[tokens, hidden]``."""

        def call(
            module: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            mask: torch.Tensor | None,
            options: dict[str, Any],
        ) -> torch.Tensor:
            return self._attend(attend, module.layer_idx, query, key, value, options)

        return self._run(call, tokens, positions)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, hidden] -> [rows, vocab]`` on rank 0; the others have nothing to add."""
        if self._group.rank != 0:
            return hidden
        self._stand_in.hidden = hidden[None]
        dummy = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
        logits: torch.Tensor = self._head(input_ids=dummy, use_cache=False).logits[0]
        return logits

    def _run(self, call: Call, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        running = _CALL.set(call)
        try:
            out = self._layers(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
        finally:
            _CALL.reset(running)
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    def _attend(
        self,
        attend: Attend,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: dict[str, Any],
    ) -> torch.Tensor:
        shard, dim, out_dim = self._shard, self._config.head_dim, value.shape[-1]
        scale = options.get("scaling")
        out = attend(
            layer,
            _padded(query[0, shard.query.start : shard.query.stop].transpose(0, 1), dim),
            _padded(key[0, shard.kv.start : shard.kv.stop].transpose(0, 1), dim),
            _padded(value[0, shard.kv.start : shard.kv.stop].transpose(0, 1), dim),
            window=self._windows[layer],
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            softcap=options.get("softcap"),
        ).view(-1, len(shard.query), dim)
        if self._group.size > 1:
            whole = out.new_zeros(len(out), self._config.num_heads, dim)
            whole[:, shard.query.start : shard.query.stop] = out
            out = self._group.all_reduce(whole)
        return out[None, ..., :out_dim]

    def _take_apart(self, what: str, model: Any) -> None:
        """Probe the model, and part its layers from its head."""
        vocab = self._config.vocab_size
        prompt = probe.prompt(vocab)
        name, output, hidden, expected = probe.transformers_logits(model, prompt)
        self._layers = model.get_submodule(name)
        probe.check_positions(what, self._layers, prompt, hidden)
        self._stand_in = _Body(output)
        model.set_submodule(name, self._stand_in)
        self._head = model
        notes = probe.Notes(what, self._config)
        _set_attention(self._layers, probe.ATTENTION)
        with notes:
            self._run(notes.call, prompt, torch.arange(len(prompt)))
        self._windows = notes.windows()
        _set_attention(self._layers, ATTENTION)
        probe.compare(what, expected, *(self._probe(batch) for batch in (probe.alone(vocab), probe.shuffled(vocab))))

    def _probe(self, batch: probe.Batch) -> torch.Tensor:
        """The logits of the batch's tokens that are wanted."""
        hidden = self.forward(batch.tokens, batch.positions, probe.dense_attention(batch))
        return self.logits(hidden[batch.wanted])


def _load(what: str, folder: Path, config: ModelConfig, dtype: torch.dtype) -> Any:
    cls: Any = getattr(transformers, config.architecture)
    if not cls._can_set_attn_implementation():
        raise ModelError(
            f"{what} is not supported: its attention does not go through transformers' attention interface"
        )
    transformers.utils.logging.disable_progress_bar()
    try:
        with _LOADING:
            model, info = cls.from_pretrained(
                folder,
                config=load_config(folder),
                dtype=dtype,
                attn_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except FOREIGN_ERRORS as error:
        raise ModelError(f"{what} cannot be loaded: {error}") from error
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if wrong := sorted(str(key) for key in info[kind]):
            raise ModelError(f"{what} cannot be loaded: {kind.replace('_', ' ')}: {wrong[:3]}")
    return model.eval().requires_grad_(False)


def _set_attention(model: Any, name: str) -> None:
    model.set_attn_implementation(name)


class _Linear(torch.nn.Module):
    """A linear layer of ours in the place of one of transformers'."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self._linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._linear(x.flatten(0, -2))
        return y.view(*x.shape[:-1], y.shape[-1])


def _make_linears(layers: Any, make: MakeLinear) -> None:
    """Make each of transformers' linear layers one of ours; each weight is let go before the next."""
    for name, module in list(layers.named_modules()):
        if type(module) is torch.nn.Linear:
            weight = module.weight
        elif isinstance(module, Conv1D):  # GPT-2's, which keeps its weight the other way round
            weight = module.weight.T.contiguous()
        else:
            continue
        layers.set_submodule(
            name, _Linear(make(weight.detach(), None if module.bias is None else module.bias.detach()))
        )


def _refuse_changing_rope(what: str, folder: Path, max_positions: int) -> None:
    """Refuse RoPE whose angles depend on the longest sequence at hand: others would change a sequence's tokens."""
    text = text_config(load_config(folder))
    rope = getattr(text, "rope_parameters", None) or {}
    for part in rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]:
        original = part.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        if part.get("rope_type") == "longrope" and original and max_positions > original:
            raise ModelError(
                f"{what}: RoPE of type longrope changes with the length of a batch beyond {original} tokens; set "
                f"max_model_len to {original} or less"
            )


def _refuse_forgetting(what: str, folder: Path, windows: dict[int, int | None], max_positions: int) -> None:
    """Refuse a model whose masks let tokens see further than transformers' cache keeps: then its answers depend on how
    they are computed."""
    for layer, kept in enumerate(transformers.DynamicCache(config=load_config(folder)).layers):
        size = getattr(kept, "sliding_window", None)
        if size is not None and min(windows.get(layer) or max_positions, max_positions) > size:
            raise ModelError(
                f"{what}: its cache keeps {size} tokens, but its masks hide none before them; set max_model_len to "
                f"{size} or less"
            )


def _padded(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Zeros behind the last dimension: of queries and keys they change no score, of values they are cut off again."""
    return x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1]))

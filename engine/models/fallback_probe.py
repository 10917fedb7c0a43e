"""What a transformers model asks of attention, found out by asking it: two short prompts at load.

1. A prompt goes through transformers' own attention, for the logits to expect; given its positions or not, bit by bit
   the same must come out.
2. With a mask function and an attention of ours, layer by layer: heads, sizes, and how far each layer sees (from the
   mask that it would have been given).
3. It runs as steps do: alone, and shuffled into a flat batch with another prompt. Alone the logits must be the expected
   ones, but for rounding; shuffled they must be the same again. That finds whatever else mixes tokens or looks at the
   batch: convolutions, biases of the scores, positions that are counted and not taken.
"""

from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from engine.core.errors import ModelError
from engine.models.config import ModelConfig
from engine.models.interface import Attend

ATTENTION = "baton_probe"
LENGTHS = (5, 11)
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.5}
"""Of the logits' difference to transformers', relative to their spread. In 16 bits rounding may pick other experts."""
SHUFFLED = {torch.float32: 1e-3, torch.bfloat16: 0.02, torch.float16: 0.02}
"""The same, of the logits' difference between one batch and another: there only the shapes of products differ."""
_HARMLESS = {
    "dropout", "scaling", "sliding_window", "softcap", "is_causal", "position_ids", "cache_position", "use_cache",
    "position_embeddings", "past_key_values",
}  # fmt: skip
"""Options of an attention call that our attention follows, or may leave aside."""

_NOTES: ContextVar["Notes"] = ContextVar("notes of the probe that runs")


@dataclass(frozen=True, slots=True)
class Batch:
    """A flat batch of two prompts, all ``[tokens]``."""

    tokens: torch.Tensor
    positions: torch.Tensor
    prompts: torch.Tensor
    """Which prompt each token is of."""
    wanted: torch.Tensor
    """Where the second prompt's tokens are, in its order."""


def prompt(vocab_size: int) -> torch.Tensor:
    return _tokens(vocab_size)[LENGTHS[0] :]


def alone(vocab_size: int) -> Batch:
    tokens = prompt(vocab_size)
    order = torch.arange(len(tokens))
    return Batch(tokens, order, torch.ones_like(order), order)


def shuffled(vocab_size: int) -> Batch:
    """The same prompt and another one, all tokens out of order: nothing but its position tells where one belongs."""
    tokens = _tokens(vocab_size)
    order = torch.arange(len(tokens)) * 7 % len(tokens)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    prompts = torch.repeat_interleave(torch.arange(2), torch.tensor(LENGTHS))
    return Batch(tokens[order], positions[order], prompts[order], order.argsort()[LENGTHS[0] :])


def _tokens(vocab_size: int) -> torch.Tensor:
    return (torch.arange(sum(LENGTHS)) * 37 + 11) % min(vocab_size, 1000)


def transformers_logits(model: Any, tokens: torch.Tensor) -> tuple[str, type, torch.Tensor, torch.Tensor]:
    """The name of the submodule that is the model without its head, what class it answers with, its hidden states, and
    the logits ``[tokens, vocab]``."""
    inner = {id(module) for module in (model.base_model, model.get_decoder())}
    answered: list[tuple[str, Any]] = []
    hooks = [
        module.register_forward_hook(lambda *args, name=name: answered.append((name, args[-1])))
        for name, module in model.named_modules()
        if name and id(module) in inner
    ]
    try:
        logits: torch.Tensor = model(input_ids=tokens[None], use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    if not answered:
        raise ValueError("its layers cannot be told from its head")
    name, out = answered[-1]  # the outermost answers last
    return name, type(out), out.last_hidden_state, logits


def check_positions(what: str, layers: Any, tokens: torch.Tensor, expected: torch.Tensor) -> None:
    """``ModelError`` where positions from 0 on give other hidden states than ``expected``, those without positions."""
    made = layers(input_ids=tokens[None], position_ids=torch.arange(len(tokens))[None], use_cache=False)
    error = _difference(made.last_hidden_state, expected)
    # The very same products on a CPU; on a GPU sums may come in any order.
    if not error <= (SHUFFLED[expected.dtype] if expected.is_cuda else 0):
        raise ModelError(f"{what} is not supported: its positions do not count from 0 (off by {error:.2g})")


@dataclass(slots=True)
class _Seen:
    """What one layer asked for."""

    heads: int
    kv_heads: int
    dims: tuple[int, int, int]
    window: int | None


class Notes:
    """Takes down what layers ask of attention while it is entered."""

    def __init__(self, what: str, config: ModelConfig) -> None:
        self._what = what
        self._config = config
        self._masks: dict[int, tuple[torch.Tensor, int | ModelError | None]] = {}
        self._seen: dict[int, _Seen] = {}
        self._entered: Token[Notes] | None = None

    def __enter__(self) -> "Notes":
        self._entered = _NOTES.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._entered is not None:
            _NOTES.reset(self._entered)

    def refuse(self, why: str) -> ModelError:
        return ModelError(f"{self._what} is not supported: {why}")

    def add_mask(self, mask: torch.Tensor, visible: Callable[[int, int, torch.Tensor, torch.Tensor], Any]) -> None:
        """Know ``mask`` again by where it lies. What is wrong with it matters only to a layer that uses it."""
        try:
            self._masks[mask.data_ptr()] = (mask, self._window(visible))
        except ModelError as error:
            self._masks[mask.data_ptr()] = (mask, error)

    def call(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Note one layer's call, and answer it."""
        unknown = sorted(name for name, given in options.items() if name not in _HARMLESS and given is not None)
        unknown = [name for name in unknown if options[name] is not False]
        if unknown:
            raise self.refuse(f"its attention asks for {', '.join(unknown)}")
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or layer in self._seen:
            raise self.refuse(f"its attention layers are not numbered one by one ({layer})")
        if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise self.refuse("its attention is not causal")
        if mask is not None and mask.data_ptr() not in self._masks:
            raise self.refuse("it makes attention masks or biases of its own")
        window = None if mask is None else self._masks[mask.data_ptr()][1]
        if isinstance(window, ModelError):
            raise window
        dims = (query.shape[-1], key.shape[-1], value.shape[-1])
        self._seen[layer] = _Seen(query.shape[1], key.shape[1], dims, window)
        return query.new_zeros(1, query.shape[2], query.shape[1], dims[2])

    def windows(self) -> dict[int, int | None]:
        """Each layer's window. ``ModelError`` where the KV cache, laid out by config.json, does not fit the model."""
        config = self._config
        if not self._seen:
            raise self.refuse("its attention does not go through transformers' attention interface")
        if sorted(self._seen) != list(range(config.num_layers)):
            raise self.refuse(f"{len(self._seen)} of its {config.num_layers} layers have attention with a KV cache")
        for layer, seen in self._seen.items():
            if (seen.heads, seen.kv_heads) != (config.num_heads, config.num_kv_heads) or (
                max(seen.dims) > config.head_dim
            ):
                found = f"{seen.heads} heads and {seen.kv_heads} KV heads of {max(seen.dims)}"
                read = f"{config.num_heads} and {config.num_kv_heads} of {config.head_dim}"
                raise self.refuse(f"layer {layer} has {found}, where config.json reads as {read}")
        return {layer: seen.window for layer, seen in self._seen.items()}

    def _window(self, visible: Callable[[int, int, torch.Tensor, torch.Tensor], Any]) -> int | None:
        """How many tokens a token sees, by a mask function of transformers; it must be the same everywhere."""
        last = max(self._config.max_position_embeddings, 64)
        zero = torch.tensor(0)
        windows = []
        for query in (last, last - 1, last // 2, last // 3):
            seen = torch.as_tensor(visible(zero, zero, torch.tensor(query), torch.arange(query + 2)))  # type: ignore[arg-type]
            first = int(seen.int().argmax())
            window = query - first + 1
            expected = torch.zeros(query + 2, dtype=torch.bool)
            expected[first : query + 1] = True
            if not torch.equal(seen.expand(query + 2), expected):
                raise self.refuse("what its tokens see is neither all before them nor a window of it")
            windows.append(None if first == 0 else window)
        window_found = windows[0]
        fits = all(w == window_found or (w is None and window_found is not None) for w in windows)
        if not fits:
            raise self.refuse("what its tokens see is neither all before them nor a sliding window of it")
        return window_found


def note_mask(*, q_length: int, kv_length: int, mask_function: Any, **_: Any) -> torch.Tensor:
    """In the place of transformers' mask functions: a tensor by which a layer's call is known again."""
    mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool)
    _NOTES.get().add_mask(mask, mask_function)
    return mask


def dense_attention(batch: Batch) -> Attend:
    """Attention over the whole prompts of a batch, by the formula and without a cache."""
    behind = batch.positions[:, None] - batch.positions
    causal = (batch.prompts[:, None] == batch.prompts) & (behind >= 0)

    def attend(
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", query.float(), key.float())
        scores *= query.shape[-1] ** -0.5 if scale is None else scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible = causal if window is None else causal & (behind < window)
        weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), -1)
        return torch.einsum("hqk,khd->qhd", weights, value.float()).to(query.dtype).flatten(1)

    return attend


def compare(what: str, expected: torch.Tensor, alone: torch.Tensor, shuffled: torch.Tensor) -> None:
    """``ModelError`` where the logits of our batches are not those of transformers."""
    for made, wanted, bounds in ((alone, expected, ROUNDING), (shuffled, alone, SHUFFLED)):
        error = _difference(made, wanted)
        if not error <= bounds[made.dtype]:
            raise ModelError(
                f"{what} is not supported: on a flat batch it gives other logits than alone (off by {error:.2g} of "
                "their spread); something besides attention mixes its tokens, or it does not follow the positions given"
            )


def _difference(made: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to how far what is expected spreads."""
    made, expected = made.float(), expected.float()
    spread = float((expected - expected.mean(-1, keepdim=True)).norm())
    return float((made - expected).norm()) / max(spread, 1e-30)

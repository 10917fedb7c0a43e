"""The Llama family: RMSNorm, RoPE, grouped-query attention, SwiGLU; Mistral, Qwen 2 and Qwen 3 differ in details only.

Merged projections: q, k and v are one product, gate and up another (Touvron et al. 2023; Jiang et al. 2023).
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from engine.core.errors import ModelError
from engine.linear import Linear, MakeLinear
from engine.models.experts import ExpertsLayer
from engine.models.interface import Attend
from engine.models.llama_config import LlamaConfig
from engine.ops import Rope, Rotation, rms_norm
from engine.parallel import ParallelGroup
from engine.weights import Checkpoint


class Layer:
    """One rank's part of a decoder layer: its heads and its MLP columns (Shoeybi et al. 2019)."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: LlamaConfig,
        group: ParallelGroup,
        layer: int,
        dtype: torch.dtype,
        make: MakeLinear,
    ) -> None:
        self._config = config
        self._group = group
        heads = group.heads(config.num_heads, config.num_kv_heads)
        self.heads, self.kv_heads = len(heads.query), len(heads.kv)
        hidden, inner = config.hidden_size, group.part(config.intermediate_size)
        query, kv = _times(heads.query, config.head_dim), _times(heads.kv, config.head_dim)
        all_query, all_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        prefix = f"model.layers.{layer}"
        attn, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        self.input_norm = checkpoint.take(f"{prefix}.input_layernorm.weight", (hidden,), torch.float32)
        self.post_norm = checkpoint.take(f"{prefix}.post_attention_layernorm.weight", (hidden,), torch.float32)
        self.qk_norms = None
        if config.qk_norm:
            q_norm, k_norm = (
                checkpoint.take(f"{attn}.{x}_norm.weight", (config.head_dim,), torch.float32) for x in "qk"
            )
            self.qk_norms = q_norm, k_norm
        self.qkv = _column_parallel(
            checkpoint, [f"{attn}.{x}_proj" for x in "qkv"], [all_query, all_kv, all_kv], [query, kv, kv],
            hidden, config.attention_bias, dtype, make,
        )  # fmt: skip
        self.out = _row_parallel(
            checkpoint, group, f"{attn}.o_proj", (hidden, all_query), query, config.output_bias, dtype, make
        )
        self._experts = None
        if config.experts is not None and config.experts.sparse[layer]:
            self._experts = ExpertsLayer(checkpoint, config, group, prefix, dtype, make)
            return
        self.gate_up = _column_parallel(
            checkpoint, [f"{mlp}.gate_proj", f"{mlp}.up_proj"], [config.intermediate_size] * 2, [inner, inner],
            hidden, config.mlp_bias, dtype, make,
        )  # fmt: skip
        self.down = _row_parallel(
            checkpoint,
            group,
            f"{mlp}.down_proj",
            (hidden, config.intermediate_size),
            inner,
            config.mlp_bias,
            dtype,
            make,
        )

    def forward(self, index: int, x: torch.Tensor, rotation: Rotation, attend: Attend) -> torch.Tensor:
        """``x [tokens, hidden]``, which is overwritten, -> the same."""
        config = self._config
        qkv = self.qkv(rms_norm(x, self.input_norm, config.rms_norm_eps))
        qkv = qkv.view(-1, self.heads + 2 * self.kv_heads, config.head_dim)
        rotation.apply_(qkv, self.heads, self.kv_heads, self.qk_norms, config.rms_norm_eps)
        query, key, value = torch.split(qkv, [self.heads, self.kv_heads, self.kv_heads], 1)
        self._add(x, self.out, attend(index, query, key, value, window=config.windows[index]))
        normed = rms_norm(x, self.post_norm, config.rms_norm_eps)
        if self._experts is None:
            self._add(x, self.down, self.gate_up.silu_mul(normed))
        else:
            x += self._group.all_reduce(self._experts(normed))
        return x

    def _add(self, x: torch.Tensor, linear: Linear, given: torch.Tensor) -> None:
        """Adds what all ranks' shares of ``linear`` come to."""
        if self._group.size == 1:
            linear.add_to(x, given)
        else:
            x += self._group.all_reduce(linear(given))


class Llama:
    """One rank's part of the model. ``folder`` holds config.json and safetensors; ``ModelError`` where they disagree.

    The vocabulary is shared out: a rank looks up the tokens whose rows it has, and makes their logits.
    """

    def __init__(
        self,
        folder: Path,
        config: LlamaConfig,
        group: ParallelGroup,
        dtype: torch.dtype,
        max_positions: int,
        make_linear: MakeLinear = Linear,
    ) -> None:
        self.fixed_launches = config.experts is None  # which experts are asked, the host decides
        self._config = config
        self._group = group
        self._vocabulary = group.part(config.vocab_size)
        with Checkpoint(folder) as checkpoint:
            table = (config.vocab_size, config.hidden_size)
            embedding = checkpoint.take("model.embed_tokens.weight", table, dtype, rows=self._vocabulary)
            tied = config.tie_word_embeddings or "lm_head.weight" not in checkpoint
            if tied and not config.tie_word_embeddings:
                raise ModelError(f"{folder}: no lm_head.weight, and config.json does not tie the embeddings")
            # A tied table is held once, in the head's form. Before the layers: the plain one is gone when they come.
            self._embedding = None if tied else embedding
            head = embedding if tied else checkpoint.take("lm_head.weight", table, dtype, rows=self._vocabulary)
            self._head = Linear(head)
            del embedding, head
            self._layers = [
                Layer(checkpoint, config, group, layer, dtype, make_linear) for layer in range(config.num_layers)
            ]
            self._norm = checkpoint.take("model.norm.weight", (config.hidden_size,), torch.float32)
            unread = [name for name in checkpoint.unread() if not (tied and name == "lm_head.weight")]
            if unread:
                count = len(unread)
                raise ModelError(f"{folder}: {count} tensors have no place in {config.architecture}: {unread[:3]}")
        self._rope = Rope(torch.tensor(config.inverse_frequencies(), dtype=torch.float32), max_positions, dtype)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """``tokens``, ``positions [tokens]`` -> hidden states ``[tokens, hidden]``, not yet normed."""
        x = self._embed(tokens)
        rotation = self._rope.at(positions)
        for index, layer in enumerate(self._layers):
            x = layer.forward(index, x, rotation, attend)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, hidden] -> [rows, vocab]`` on rank 0."""
        part = self._head(rms_norm(hidden, self._norm, self._config.rms_norm_eps))
        return self._group.gather(part, self._config.vocab_size)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if self._group.size == 1:
            return self._looked_up(tokens)
        mine = (tokens >= self._vocabulary.start) & (tokens < self._vocabulary.stop)
        x = self._looked_up(torch.where(mine, tokens - self._vocabulary.start, 0))
        x.masked_fill_(~mine.unsqueeze(1), 0)
        return self._group.all_reduce(x)

    def _looked_up(self, places: torch.Tensor) -> torch.Tensor:
        return self._head.rows(places) if self._embedding is None else F.embedding(places, self._embedding)


def _column_parallel(
    checkpoint: Checkpoint, names: list[str], rows: list[int], shares: list[range], columns: int, bias: bool,
    dtype: torch.dtype, make: MakeLinear,
) -> Linear:  # fmt: skip
    """Merged projections, of whose outputs (rows) this rank has its shares."""
    weight = checkpoint.take_rows([f"{name}.weight" for name in names], rows, shares, (columns,), dtype)
    if not bias:
        return make(weight, None)
    return make(weight, checkpoint.take_rows([f"{name}.bias" for name in names], rows, shares, (), dtype))


def _row_parallel(
    checkpoint: Checkpoint, group: ParallelGroup, name: str, shape: tuple[int, int], share: range, bias: bool,
    dtype: torch.dtype, make: MakeLinear,
) -> Linear:  # fmt: skip
    """A projection of whose inputs (columns) this rank has its share: outputs are to be summed over the ranks."""
    weight = checkpoint.take(f"{name}.weight", shape, dtype, columns=share)
    # Added once: by rank 0.
    added = checkpoint.take(f"{name}.bias", shape[:1], dtype) if bias else None
    return make(weight, added if group.rank == 0 else None)


def _times(heads: range, head_dim: int) -> range:
    """The rows of a projection that belong to ``heads``."""
    return range(heads.start * head_dim, heads.stop * head_dim)

"""A layer's experts (Mixtral, Qwen 3 MoE): a router chooses a few small MLPs for each token (Shazeer et al. 2017).

Expert parallel: a rank of the group holds some experts whole. Each rank routes all tokens, computes those that chose
one of its experts, and the sum over the ranks is the layer's output.
"""

import torch
import torch.nn.functional as F

from engine.linear import Linear, MakeLinear
from engine.models.llama_config import LlamaConfig
from engine.models.registry import NATIVE
from engine.parallel import ParallelGroup
from engine.weights import Checkpoint


class ExpertsLayer:
    """This rank's experts of one layer. ``prefix``: the layer's name in the checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: LlamaConfig,
        group: ParallelGroup,
        prefix: str,
        dtype: torch.dtype,
        make: MakeLinear,
    ) -> None:
        experts, names = config.experts, NATIVE[config.architecture].experts
        assert experts is not None and names is not None
        self._config = experts
        hidden, inner = config.hidden_size, experts.inner
        block = f"{prefix}.{names.block}"
        self._router = checkpoint.take(f"{block}.gate.weight", (experts.count, hidden), dtype)
        self._mine = group.part(experts.count)
        self._gate_up: list[Linear] = []
        self._down: list[Linear] = []
        for number in range(experts.count):
            expert = f"{block}.experts.{number}"
            gate, up, down = (f"{expert}.{name}.weight" for name in (names.gate, names.up, names.down))
            if number not in self._mine:
                checkpoint.skip(gate, up, down)
                continue
            whole = [range(inner)] * 2
            self._gate_up.append(make(checkpoint.take_rows([gate, up], [inner] * 2, whole, (hidden,), dtype), None))
            self._down.append(make(checkpoint.take(down, (hidden, inner), dtype), None))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x [tokens, hidden]`` -> the part of this rank's experts in the output, ``[tokens, hidden]``."""
        chosen, weights = self._route(x)
        # Tokens sorted by expert: each expert that has any computes its own in one product.
        order = chosen.flatten().argsort(stable=True)
        ends = torch.bincount(chosen.flatten(), minlength=self._config.count).cumsum(0).tolist()
        first = ends[self._mine.start - 1] if self._mine.start else 0
        order = order[first : ends[self._mine.stop - 1]] if len(self._mine) else order[:0]
        rows = order // self._config.per_token
        made = self._compute(x[rows], [end - first for end in ends])
        made *= weights.flatten()[order, None]
        return torch.zeros_like(x).index_add_(0, rows, made)

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's experts and their weights, ``[tokens, per_token]``, as in transformers: softmax over all experts
        in fp32, then the likeliest."""
        probabilities = torch.softmax(F.linear(x, self._router).float(), -1)
        weights, chosen = probabilities.topk(self._config.per_token, -1)
        if self._config.norm_topk_prob:
            weights /= weights.sum(-1, keepdim=True)
        return chosen, weights.to(x.dtype)

    def _compute(self, x: torch.Tensor, ends: list[int]) -> torch.Tensor:
        """``x [chosen, hidden]``, sorted by expert; ``ends``: where each expert's rows end."""
        out = torch.empty_like(x)
        start = 0
        for place, number in enumerate(self._mine):
            if start == (end := ends[number]):
                continue
            out[start:end] = self._down[place](self._gate_up[place].silu_mul(x[start:end]))
            start = end
        return out

"""Torch's views on one rank's KV pool."""

import torch

from engine.core.kv_layout import KVLayout

_STORED = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "int8": torch.int8, "fp8": torch.float8_e4m3fn,
}  # fmt: skip


class KVCache:
    """``memory`` (uint8, one dimension, of whole blocks) as blocks of ``layout``; shares it, copies nothing.

    ``bytes``: ``[block, block_bytes]``.
    ``data``: ``[block, layer, k|v, kv_head, token, head_dim]`` of the stored dtype; of a quantised one strided, since
    scales lie between the records.
    ``scales``: ``[block, layer, k|v, kv_head]`` fp32, strided, of a quantised dtype; else None. A record that begins
    anew has scale 0 and values 0.
    """

    def __init__(self, layout: KVLayout, memory: torch.Tensor) -> None:
        self.layout = layout
        self.bytes = memory.view(-1, layout.block_bytes)
        self.num_blocks = len(self.bytes)
        records = self.bytes.view(self.num_blocks, layout.num_layers, 2, layout.num_kv_heads, layout.record_bytes)
        values = layout.record_values * layout.item_bytes
        data = records[..., :values].view(_STORED[layout.dtype])
        self.data = data.view(*data.shape[:-1], layout.block_size, layout.head_dim)
        self.scales: torch.Tensor | None = None
        if layout.quantized:
            self.scales = records[..., values:].view(torch.float32)[..., 0]

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return _STORED[self.layout.dtype]

    def clear(self, blocks: torch.Tensor) -> None:
        """Zero ``blocks`` (int64), scales included."""
        self.bytes.index_fill_(0, blocks, 0)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Block ``source[i]`` -> block ``target[i]``, int64; no block is both."""
        self.bytes.index_copy_(0, target, self.bytes.index_select(0, source))

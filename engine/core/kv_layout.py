"""How KV blocks lie in memory: block-major, so that a block is one piece over all layers.

``[block, layer, k|v, kv_head, token, head_dim]``. A block moves between workers as one piece; one layer of it, and a
range of heads of one layer's K or V, are each one piece too.
"""

import hashlib
from dataclasses import astuple, dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of one rank's KV blocks."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    """Tokens in a block."""
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"KV dtype must be one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}")
        if min(self.num_layers, self.num_kv_heads, self.head_dim, self.block_size) < 1:
            raise ValueError(f"a KV layout has no empty side: {self}")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_size

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer, K and V, in one block."""
        return self.block_bytes // self.num_layers

    def shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        return (num_blocks, self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def fingerprint(self) -> str:
        """Equal for pools whose blocks can be exchanged byte by byte."""
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()[:16]

"""How KV blocks lie in memory: block-major, so that a block is one piece over all layers.

``[block, layer, k|v, kv_head]`` records, each ``[token, head_dim]``. A block moves between workers as one piece; one
layer of it, and a range of heads of one layer's K or V, are each one piece too. A record of a quantised dtype carries
its scale behind its values, so the scale goes wherever the record goes.
"""

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Dtypes that a model computes in, and that a KV cache can have as they are."""
QUANTIZED_MAX = {"int8": 127.0, "fp8": 448.0}
"""Quantised KV dtypes, of one byte a value: value = scale * stored, and the largest number that is stored.
``fp8`` is e4m3 without infinities (OCP 8-bit floating point, 2023)."""
SCALE_BYTES = 16
"""Behind the values of a quantised record: its scale, fp32, and padding that keeps records aligned."""


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
        if self.dtype not in DTYPE_BYTES and self.dtype not in QUANTIZED_MAX:
            known = ", ".join([*DTYPE_BYTES, *QUANTIZED_MAX])
            raise ValueError(f"KV dtype must be one of {known}, got {self.dtype!r}")
        if min(self.num_layers, self.num_kv_heads, self.head_dim, self.block_size) < 1:
            raise ValueError(f"a KV layout has no empty side: {self}")
        if self.quantized and self.record_values % SCALE_BYTES:
            raise ValueError(
                f"{self.dtype} KV needs head_dim * block_size to be a multiple of {SCALE_BYTES}, "
                f"got {self.head_dim} * {self.block_size}"
            )

    @property
    def quantized(self) -> bool:
        return self.dtype in QUANTIZED_MAX

    @property
    def item_bytes(self) -> int:
        """Of one stored value."""
        return 1 if self.quantized else DTYPE_BYTES[self.dtype]

    @property
    def record_values(self) -> int:
        return self.block_size * self.head_dim

    @property
    def record_bytes(self) -> int:
        """Of one head's K or V in one layer of one block, with its scale."""
        return self.record_values * self.item_bytes + (SCALE_BYTES if self.quantized else 0)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer, K and V, in one block."""
        return 2 * self.num_kv_heads * self.record_bytes

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

"""Promise: however much is swapped at once, every block arrives, and little memory is needed in between."""

import numpy as np
import torch
from pytest import MonkeyPatch

from engine.core.kv_layout import KVLayout
from engine.host_blocks import HostBlocks
from engine.kv_cache import KVCache

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")
BLOCKS = 50


def test_blocks_go_out_and_come_back_a_few_at_a_time(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr("engine.host_blocks.BYTES_AT_ONCE", 7 * LAYOUT.block_bytes)
    cache = KVCache(LAYOUT, torch.randint(0, 255, (BLOCKS * LAYOUT.block_bytes,), dtype=torch.uint8))
    before = cache.bytes.clone()
    host = HostBlocks(BLOCKS, LAYOUT.block_bytes)
    largest = 0

    def watched(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(index))
        return tensor[index]

    monkeypatch.setattr(torch.Tensor, "index_select", watched)
    slots, back = np.random.default_rng(1).permuted([range(BLOCKS)] * 2, axis=1)
    host.swap_out(cache, np.stack([np.arange(BLOCKS), slots], 1).astype(np.int32))
    host.swap_in(cache, np.stack([slots, back], 1).astype(np.int32))
    assert torch.equal(cache.bytes[torch.from_numpy(back)], before)
    assert largest == 7

"""What the kernels promise, as plain torch: slow, obvious, on any device, and without Triton.

A layer of the KV cache is ``data [block, k|v, kv_head, token, head_dim]`` with, for the quantised dtypes,
``scales [block, k|v, kv_head]`` (fp32); see ``engine.kv_cache``. A slot is ``block * block_size + token``.
"""

import torch

from engine.core import kv_layout

QUANTIZED_MAX = {
    torch.int8: kv_layout.QUANTIZED_MAX["int8"],
    torch.float8_e4m3fn: kv_layout.QUANTIZED_MAX["fp8"],
}
"""Stored dtypes whose values carry a scale, and the largest number that is stored."""


def quantize(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values / scale`` as ``dtype`` stores it: rounded to nearest even, kept within its range; 0 where scale is 0."""
    largest = QUANTIZED_MAX[dtype]
    ratio = torch.where(scale > 0, values.float() / torch.where(scale > 0, scale, 1.0), 0.0).clamp(-largest, largest)
    return (ratio.round() if dtype is torch.int8 else ratio).to(dtype)


def dequantize(data: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A layer's values, ``[block, k|v, kv_head, token, head_dim]``."""
    return data.to(dtype) if scales is None else data.to(dtype) * scales[..., None, None].to(dtype)


def write_kv(
    data: torch.Tensor, scales: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write a step's ``key``, ``value [tokens, kv_heads, head_dim]`` into their ``slots [tokens]``; below 0: nowhere.

    Of a quantised dtype a record (one head's K or V in one block) has one scale, and for each record that the step
    writes to:

    1. A step that writes a record's first token begins it anew: its scale is 0 and all its values are 0.
    2. The new scale is the larger of the old one and (largest magnitude among the new values) / (largest number that
       the dtype stores). So it never falls while the record is being filled.
    3. Where it grew, what is stored is rounded again: ``stored * (old / new)``.
    4. The new values are stored as ``value / new``. All rounding is to nearest even.
    """
    size = data.shape[3]
    for block in torch.unique(slots[slots >= 0] // size).tolist():
        chosen = (slots >= 0) & (slots // size == block)
        places = slots[chosen] % size
        for side, source in ((0, key), (1, value)):
            new = source[chosen].transpose(0, 1)  # [kv_heads, tokens, head_dim]
            if scales is None:
                data[block, side][:, places] = new.to(data.dtype)
                continue
            record, scale = data[block, side].float(), scales[block, side].clone()
            if bool((places == 0).any()):
                record.zero_()
                scale.zero_()
            grown = torch.maximum(scale, new.float().abs().amax((1, 2)) / QUANTIZED_MAX[data.dtype])
            ratio = torch.where(grown > scale, scale / grown, 1.0)[:, None, None]
            # On the CPU fp8 has no indexed store, so the record is put together in fp32 and stored whole.
            record = quantize(record * ratio, torch.ones(()), data.dtype).float()
            record[:, places] = quantize(new, grown[:, None, None], data.dtype).float()
            data[block, side] = record.to(data.dtype)
            scales[block, side] = grown


def paged_attention(
    query: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    block_tables: torch.Tensor,
    num_tokens: torch.Tensor,
    num_computed: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention of rows that follow each other in ``query [tokens, heads, head_dim]``, in fp64.

    Row ``i`` has ``num_tokens[i]`` queries behind ``num_computed[i]`` cached tokens, and all their keys are in the
    cache. A query at position p sees the keys j with ``p - window < j <= p``. -> ``[tokens, heads * head_dim]``.
    """
    keys, values = dequantize(data, scales).unbind(1)
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    group = query.shape[1] // data.shape[2]
    first = 0
    for row, (count, computed) in enumerate(zip(num_tokens.tolist(), num_computed.tolist(), strict=True)):
        if count == 0:
            continue
        length = computed + count
        blocks = block_tables[row, : -(-length // data.shape[3])].long()
        k, v = (
            side[blocks].transpose(0, 1).flatten(1, 2)[:, :length].repeat_interleave(group, 0)
            for side in (keys, values)
        )
        scores = torch.einsum("qhd,hkd->hqk", query[first : first + count].double(), k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        positions = torch.arange(computed, length, device=query.device)[:, None]
        seen = torch.arange(length, device=query.device)[None]
        visible = seen <= positions
        if window is not None:
            visible &= seen > positions - window
        weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), -1)
        out[first : first + count] = torch.einsum("hqk,hkd->qhd", weights, v)
        first += count
    return out.flatten(1)


def quantize_blocks(
    source: torch.Tensor, blocks: torch.Tensor, counts: torch.Tensor, data: torch.Tensor, scales: torch.Tensor
) -> None:
    """``source [block, layer, k|v, head, token, head_dim]``, its ``blocks[i]`` with ``counts[i]`` tokens in them, into
    record set ``i`` of the quantised ``data`` and ``scales``; tokens behind the count become 0."""
    values = source[blocks.long()].float()
    behind = torch.arange(values.shape[4], device=values.device)[None] >= counts[:, None]
    values = values.masked_fill(behind[:, None, None, None, :, None], 0.0)
    scales.copy_(values.abs().amax((4, 5)) / QUANTIZED_MAX[data.dtype])
    data.copy_(quantize(values, scales[..., None, None], data.dtype))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm over the last dimension, of ``x``'s dtype."""
    wide = x.double()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()).to(x.dtype)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``residual += x``, in its dtype, and its norm."""
    residual.copy_((residual.double() + x.double()).to(residual.dtype))
    return rms_norm(residual, weight, eps)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``x [tokens, heads, head_dim]`` rotated, halves paired; ``cos``, ``sin [positions, head_dim / 2]``."""
    first, second = x.double().chunk(2, -1)
    c, s = cos[positions].double()[:, None], sin[positions].double()[:, None]
    return torch.cat((first * c - second * s, second * c + first * s), -1).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of ``[tokens, gate | up]``."""
    gate, up = gate_up.double().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def sample_row(logits: torch.Tensor, number: float, temperature: float, top_k: int, top_p: float, min_p: float) -> int:
    """One row's token, as ``engine.sampler`` draws it: ``number`` is looked up in the probabilities that top-k (0: off)
    and top-p (1: off) leave, cumulated in order of the vocabulary. -1 where the logits are not numbers."""
    best = logits.max()
    if not bool(best.isfinite()):
        return -1
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax((logits.float() / temperature).double(), -1)
    probabilities = torch.where(probabilities < min_p * probabilities.max(), 0.0, probabilities)
    likeliest, order = probabilities.sort(descending=True, stable=True)
    if top_k:
        likeliest[top_k:] = 0
    if top_p < 1:
        before = likeliest.cumsum(-1) - likeliest
        keep = before < top_p * likeliest.sum()
        keep[0] = True
        likeliest = torch.where(keep, likeliest, 0.0)
    kept = torch.zeros_like(likeliest).scatter(-1, order, likeliest)
    cumulated = kept.cumsum(-1)
    place = int(torch.searchsorted(cumulated, (number * cumulated[-1])[None], right=True))
    return min(place, int(kept.nonzero().max()))

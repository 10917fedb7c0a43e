"""From logits to tokens on the device: min-p, top-k, top-p and the draw, as ``engine.sampler`` does them.

Nothing is sorted. Going down from a row's likeliest token, its probabilities cumulate; what is looked for is the token
at which the cumulated count or mass reaches a goal:

1. top-k: the k-th token. What is down to it is the mass that top-p takes its share of.
2. top-p: the first token at which that share is reached.

Each is a bisection over the logits' values that reads the row once a step and snaps to values that occur, so it ends.
Tokens of equal logits come in order of the vocabulary. Of the tokens that are left, with mass M, the one drawn is the
first in the vocabulary's order at which the mass is above ``number * M``: by likelihood, two that are all but equal
would change places by rounding. One program a row: no row's token depends on another row.
"""

import torch
import triton
import triton.language as tl

TILE = 4096


@triton.jit
def _load(logits, at, vocab, temperature, best, TILE: tl.constexpr):
    """Tokens, their logits over the temperature relative to the best, and e to that."""
    index = at + tl.arange(0, TILE)
    z = tl.div_rn(tl.load(logits + index, mask=index < vocab, other=-float("inf")), temperature) - best
    return index, z, tl.exp(z)


@triton.jit
def _down_to(logits, vocab, temperature, best, floor, value, TILE: tl.constexpr):
    """Of the tokens that min-p leaves: count and mass of those at or above ``value``, of those at it, the smallest
    value at or above it, and the largest below it."""
    count = tl.zeros((TILE,), tl.int32)
    mass = tl.zeros((TILE,), tl.float64)
    ties = tl.zeros((TILE,), tl.int32)
    above = tl.full((TILE,), float("inf"), tl.float32)
    below = tl.full((TILE,), -float("inf"), tl.float32)
    for at in range(0, vocab, TILE):
        _index, z, e = _load(logits, at, vocab, temperature, best, TILE)
        alive = (e > 0) & (e >= floor)
        reached = alive & (z >= value)
        count += reached.to(tl.int32)
        mass += tl.where(reached, e, 0.0).to(tl.float64)
        ties += (reached & (z == value)).to(tl.int32)
        above = tl.minimum(above, tl.where(reached, z, float("inf")))
        below = tl.maximum(below, tl.where(alive & (z < value), z, -float("inf")))
    return tl.sum(count, 0), tl.sum(mass, 0), tl.sum(ties, 0), tl.min(above, 0), tl.max(below, 0)


@triton.jit
def _search(logits, vocab, temperature, best, floor, low, goal, COUNTS: tl.constexpr, TILE: tl.constexpr):
    """The largest value down to which the count (``COUNTS``) or mass reaches ``goal``, given that it does so down to
    ``low``, a value that occurs. -> (value, mass above it, tokens at it, count above it)."""
    top = 0.0  # the likeliest's value; invariant: the goal is reached down to low, and not above top
    while low < top:
        middle = low + (top - low) * 0.5
        if middle <= low:
            middle = top
        count, mass, ties, above, below = _down_to(logits, vocab, temperature, best, floor, middle, TILE)
        measure = mass
        if COUNTS:
            measure = count.to(tl.float64)
        if measure >= goal:
            low = above
        else:
            top = below
    count, mass, ties, above, below = _down_to(logits, vocab, temperature, best, floor, low, TILE)
    at_it = tl.exp(low).to(tl.float64)
    return low, mass - ties * at_it, ties, count - ties


@triton.jit
def sample_kernel(
    logits, numbers, temperatures, top_ks, top_ps, min_ps, tokens, stride, vocab, TILE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    highest = tl.full((TILE,), -float("inf"), tl.float32)
    bad = tl.zeros((TILE,), tl.int32)
    for at in range(0, vocab, TILE):
        index = at + tl.arange(0, TILE)
        x = tl.load(logits + index, mask=index < vocab, other=-float("inf"))
        bad += (x != x).to(tl.int32)
        highest = tl.maximum(highest, x)
    best = tl.max(highest, 0)
    if (tl.sum(bad, 0) > 0) | (tl.abs(best) == float("inf")):
        tl.store(tokens + row, -1)
        return
    temperature = tl.load(temperatures + row)
    if temperature == 0:
        found = tl.full((TILE,), vocab, tl.int32)
        for at in range(0, vocab, TILE):
            index = at + tl.arange(0, TILE)
            x = tl.load(logits + index, mask=index < vocab, other=-float("inf"))
            found = tl.minimum(found, tl.where(x == best, index, vocab))
        tl.store(tokens + row, tl.min(found, 0))
        return
    number = tl.load(numbers + row)
    top_k, top_p, floor = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
    best = tl.div_rn(best, temperature)
    count, total, _ties, low, _below = _down_to(logits, vocab, temperature, best, floor, -float("inf"), TILE)
    equals = count  # of the tokens at low, the smallest value that stays, so many stay
    if (top_k > 0) & (top_k < count):
        goal = top_k.to(tl.float64)
        low, above, ties, before = _search(logits, vocab, temperature, best, floor, low, goal, True, TILE)
        equals = top_k - before
        total = above + equals * tl.exp(low).to(tl.float64)
    if top_p < 1:
        goal, smallest = top_p * total, low
        low, above, ties, _before = _search(logits, vocab, temperature, best, floor, low, goal, False, TILE)
        each = tl.exp(low).to(tl.float64)
        # The first of the tokens at this value with which the goal is reached, and no more than top-k leaves.
        needed = tl.maximum(tl.minimum(tl.ceil((goal - above) / each), ties), 1.0).to(tl.int32)
        equals = tl.where(low == smallest, tl.minimum(needed, equals), needed)
        total = above + equals * each
    goal = number * total
    mass = tl.zeros((), tl.float64)
    seen = 0
    last = tl.full((TILE,), 0, tl.int32)
    found = tl.full((TILE,), vocab, tl.int32)
    for at in range(0, vocab, TILE):
        index, z, e = _load(logits, at, vocab, temperature, best, TILE)
        ties = ((z == low) & (e >= floor)).to(tl.int32)
        stays = (e > 0) & (e >= floor) & ((z > low) | ((ties > 0) & (seen + tl.cumsum(ties, 0) <= equals)))
        kept = tl.where(stays, e, 0.0).to(tl.float64)
        found = tl.minimum(found, tl.where(stays & (mass + tl.cumsum(kept, 0) > goal), index, vocab))
        last = tl.maximum(last, tl.where(stays, index, 0))
        mass += tl.sum(kept, 0)
        seen += tl.sum(ties, 0)
    # A number just below 1 may lose to the rounding of the sum.
    tl.store(tokens + row, tl.minimum(tl.min(found, 0), tl.max(last, 0)))


def sample(
    logits: torch.Tensor,
    numbers: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """``logits [rows, vocab]`` fp32, after penalties and biases -> tokens ``[rows]`` int32, -1 where a row's logits are
    not numbers.

    Each row has its own ``number`` in [0, 1) and ``top_p`` (fp64), ``temperature`` (fp32; 0: the likeliest token, the
    first of equals), ``top_k`` (int32; 0: off) and ``min_p`` (fp32; 0: off); ``top_p`` 1: off.
    """
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int32, device=logits.device)
    sample_kernel[(rows,)](
        logits, numbers, temperatures, top_k, top_p, min_p, tokens, logits.stride(0), vocab,
        TILE=min(TILE, triton.next_power_of_2(vocab)), num_warps=16,
    )  # fmt: skip
    return tokens

"""From the messages' vocabulary to the engine's and back."""

from collections.abc import Sequence as Seq

from engine.core.blocks import BlockPool
from engine.core.outputs import TokenLogprobs
from engine.core.prefix import BlockHashes
from engine.core.scheduler import Scheduler
from engine.core.sequence import Sequence
from kv_transfer.core.events import Blocks
from messages.codec import unpack_tokens
from messages.common import BlockCounts, CacheCounts, Generation, Logprobs
from messages.ids import RequestId

NOT_NUMBERS = "the model's logits are not numbers"
"""Detail of a failed attempt."""


def misfit(generation: Generation, pool: BlockPool, vocab_size: int, max_model_len: int) -> str:
    """Why this worker can never run ``generation``; empty where it can."""
    for tokens in (unpack_tokens(generation.prompt), unpack_tokens(generation.generated)):
        if len(tokens) and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size):
            return f"token ids must be in [0, {vocab_size})"
    if generation.num_tokens > max_model_len:
        return f"{generation.num_tokens} tokens are more than the {max_model_len} that this worker can hold"
    longest = min(max_model_len, len(generation.prompt) // 4 + generation.sampling.max_tokens)
    if -(-longest // pool.block_size) > pool.counts().total:
        return f"{longest} tokens are more than this worker's KV pool holds"
    return ""


def sequence(
    request: RequestId,
    generation: Generation,
    *,
    blocks: Blocks | None = None,
    num_computed_tokens: int = 0,
    hand_over: bool = False,
    hashes: BlockHashes | None = None,
) -> Sequence:
    """The engine's sequence for a request."""
    return Sequence(
        request,
        unpack_tokens(generation.prompt),
        generation.sampling,
        generated=unpack_tokens(generation.generated),
        blocks=blocks,
        num_computed_tokens=num_computed_tokens,
        hand_over=hand_over,
        salt=generation.cache_salt,
        hashes=hashes,
    )


def wire_logprobs(tokens: Seq[TokenLogprobs] | None) -> Logprobs | None:
    """The engine's log-probabilities as a message part."""
    if tokens is None:
        return None
    return Logprobs(
        sampled=tuple(token.logprob for token in tokens),
        ranks=tuple(token.rank for token in tokens),
        top_ids=tuple(token.top_ids for token in tokens),
        top_logprobs=tuple(token.top_logprobs for token in tokens),
    )


def block_counts(pool: BlockPool) -> BlockCounts:
    counts = pool.counts()
    return BlockCounts(free=counts.free, held=counts.held, cached=counts.cached, total=counts.total)


def cache_counts(pool: BlockPool, scheduler: Scheduler) -> CacheCounts:
    return CacheCounts(pool.prefix_cache_queries, pool.prefix_cache_hits, scheduler.stats.preemptions)

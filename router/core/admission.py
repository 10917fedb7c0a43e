"""When a worker has room for one more request; the reasons are in docs/decisions/008-the-router-admits.md.

A request counts on its decode (or colocated) worker from ``Placed`` to ``Finished``, with its prompt and at most
``OUTPUT_COUNTED`` tokens of its answer. There is room while the requests are fewer than the worker's ``max_num_seqs``
and their tokens are within its KV pool. A worker with nothing placed on it has room for any one request.
"""

from messages.gateway_to_router import PlacementWanted
from router.core.views import WorkerView

OUTPUT_COUNTED = 1024
"""Tokens of an answer that are counted at most: most limits are never reached, and those of clients that set none are
as long as the context. An answer that grows longer is the worker's to fit in, by preemption."""


def expected_tokens(wanted: PlacementWanted, block_size: int) -> int:
    """What a request is expected to take of a KV pool, in whole blocks."""
    tokens = wanted.num_tokens + min(wanted.max_new_tokens, OUTPUT_COUNTED)
    return -(-tokens // block_size) * block_size


def has_room(worker: WorkerView, tokens: int, *, settling: bool = False) -> bool:
    """Whether a request that takes ``tokens`` of the pool may be placed now; a pool of unknown size is no limit.

    ``settling``: not all that an earlier router has placed may be known here, so what the worker says counts too.
    """
    placed, taken = len(worker.requests), worker.tokens
    if settling:
        report = worker.report
        if report is None:
            return False
        placed = max(placed, report.running + report.waiting + worker.unreported)
        taken = max(taken, report.blocks.held * worker.block_size + worker.unreported_tokens)
    if placed == 0:
        return True
    if placed >= worker.max_num_seqs:
        return False
    pool = worker.pool_tokens
    return pool == 0 or taken + tokens <= pool

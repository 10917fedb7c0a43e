"""Back to the prefill worker of an earlier attempt: its prefix cache still has what it computed."""

from messages.gateway_to_router import Computed
from router.core.views import WorkerView


def stays(previous: WorkerView, best: WorkerView, computed: Computed) -> bool:
    """Whether ``previous`` should have the next attempt too, rather than ``best``, the least loaded.

    Not once its process is another one, nor where its queue is longer by more than what need not be computed again.
    """
    same = (previous.worker, previous.epoch) == (computed.worker, computed.epoch)
    return same and previous.tokens <= best.tokens + computed.num_tokens

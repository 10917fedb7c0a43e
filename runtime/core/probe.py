"""A test of a hand-over, before there is traffic: blocks of no sequence, over the real transport, verified and acked.

The prefill worker takes blocks that nobody owns and hands them over as it would those of a prompt; decode takes them
into such blocks of its own, verifies and frees them. Blocks without content go first, then those that were found in the
prefix cache least recently. Where either lacks room now, or work waits there, nothing is moved: traffic comes first.
"""

from typing import NamedTuple

from kv_transfer.core.events import TransferKey
from messages.codec import pack_tokens
from messages.common import Generation, WorkerAddress
from messages.gateway_to_worker import Prefill
from messages.ids import Attempt, RequestId
from messages.sampling import SamplingParams
from messages.tickets import mint

NO_ROOM = "no room for a probe now"
"""In the problem of a probe that gave way to traffic."""
NOTHING_CAME = "nothing came of it"
"""In the problem of a probe that was waited for in vain."""


class ProbeWanted(NamedTuple):
    """Event at a prefill worker: hand ``num_blocks`` over to ``decode``; answered by ``ProbeEnded``."""

    request: RequestId
    """A name that nothing else has."""
    decode: WorkerAddress
    num_blocks: int

    @property
    def key(self) -> TransferKey:
        return TransferKey(self.request, Attempt(1))


class ProbeStopped(NamedTuple):
    """Event: who asked waits no longer; answered by ``ProbeEnded`` too."""

    request: RequestId
    detail: str


class ProbeEnded(NamedTuple):
    """Action: tell who asked. Seconds are NaN where a probe did not come so far."""

    request: RequestId
    problem: str
    """Empty where all was verified and acked."""
    num_bytes: int = 0
    answer_seconds: float = float("nan")
    """From the open to the accept."""
    push_seconds: float = float("nan")
    """From the first push to the last byte."""
    whole_seconds: float = float("nan")
    """From the open to the ack."""


def probe_order(wanted: ProbeWanted, prefill: WorkerAddress, block_size: int, cluster_key: bytes) -> Prefill:
    """The order of a prompt that nobody computes. Its salt is its own: nobody finds it in a cache."""
    tokens = pack_tokens([0] * (wanted.num_blocks * block_size))
    generation = Generation(tokens, SamplingParams(max_tokens=2), cache_salt=wanted.request.encode()[-32:])
    ticket = mint(cluster_key, wanted.request, Attempt(1), prefill, wanted.decode)
    return Prefill(wanted.request, Attempt(1), prefill.mailbox, generation, wanted.decode, ticket)

"""Parts that several messages share."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from messages.codec import Tokens, check_packed, count_tokens
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.sampling import MAX_LOGPROBS, MAX_TOKEN_ID, SamplingParams

MAX_SEQUENCE = 2**22
"""Tokens in one sequence that the protocol can name; the model's context is far below."""

MAX_SIDE = 4096
"""Of the layers, heads, ... of a KV block."""
MAX_RANKS = 256
"""Of one worker."""
MAX_WAYS = 8
"""Transports that one rank offers."""

Side = Annotated[int, Meta(ge=1, le=MAX_SIDE)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Detail = Annotated[str, Meta(max_length=2_000)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Seconds = Annotated[float, Meta(ge=0)]
Rate = Annotated[float, Meta(ge=0, le=1e18)]
"""A second; 0 while it is not known."""
TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]
PackedTokens = Annotated[Tokens, Meta(max_length=4 * MAX_SEQUENCE)]
MAX_DESCRIPTION = 2**20
PackedBlocks = Annotated[bytes, Meta(max_length=4 * MAX_SEQUENCE)]


class Message(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A message between two processes: tagged with its own name, unknown fields refused."""


class Part(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A piece of a message, encoded without field names."""


class Role(StrEnum):
    """What a worker's pool is sent. Every worker has the same engine."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"
    """Prefill and decode in one worker, no hand-over."""


class KVShard(Part, frozen=True):
    """One tensor-parallel rank's part of a worker's KV: what peers must know of it to exchange blocks.

    A block is ``[layer, k|v, head]`` records of ``block_size`` tokens each; see ``engine.core.kv_layout``.
    """

    num_layers: Side
    head_dim: Side
    block_size: Side
    """Tokens in a block."""
    dtype: Literal["float32", "bfloat16", "float16", "int8", "fp8"]
    total_heads: Side
    """KV heads of the model."""
    first_head: Annotated[int, Meta(ge=0, lt=MAX_SIDE)]
    num_heads: Side
    """This rank holds the model's KV heads ``first_head``, ... so many; the same ones as another rank may."""

    def __post_init__(self) -> None:
        if self.first_head + self.num_heads > self.total_heads:
            raise ValueError(f"KV heads from {self.first_head} on, {self.num_heads} of them, of {self.total_heads}")


class KVEndpoint(Part, frozen=True):
    """Where one tensor-parallel rank of a worker keeps its KV, by one transport."""

    transport: Name
    address: Annotated[str, Meta(max_length=256)]
    """What a peer needs. Of a receiver: a shared-memory name, a ZeroMQ endpoint. Of a sender: where its pool stands;
    empty for transports whose receivers do not look."""
    shard: KVShard
    num_blocks: Count


class KVWay(Part, frozen=True):
    """A transport that a rank of a worker offers; see ``KVEndpoint``."""

    transport: Name
    address: Annotated[str, Meta(max_length=256)] = ""


class KVRank(Part, frozen=True):
    """One tensor-parallel rank of a worker: its KV, and the ways into it and out of it."""

    shard: KVShard
    num_blocks: Count
    host: Name
    """Two ranks have the same where each process can map the other's memory."""
    ways: Annotated[tuple[KVWay, ...], Meta(max_length=MAX_WAYS)] = ()


class WorkerAddress(Part, frozen=True):
    """One incarnation of a worker, and how to reach it."""

    worker: WorkerId
    epoch: Epoch
    mailbox: Address
    kv: Annotated[tuple[KVRank, ...], Meta(max_length=MAX_RANKS)] = ()
    """One for each tensor-parallel rank; empty where none is to be sent to it."""


class Generation(Part, frozen=True):
    """The work itself: everything that any worker needs to start or to resume a sequence."""

    prompt: PackedTokens
    sampling: SamplingParams
    generated: PackedTokens = b""
    """Tokens that earlier attempts delivered; they count as output, not as prompt."""
    cache_salt: Annotated[bytes, Meta(max_length=32)] = b""
    """KV is shared only between requests of the same salt: the gateway makes it, so that no two tenants have one."""
    traced: bool = False
    """Whether who works on it tells the gateway what it did when: ``Timeline``."""
    description: Annotated[bytes, Meta(max_length=MAX_DESCRIPTION)] = b""
    """What another gateway must know to go on with the answer: gateways read it, nobody else does. Empty where the
    request dies with its gateway."""
    logprobs: "Logprobs | None" = None
    """Of ``generated``, where they are wanted and another gateway may need them."""
    prompt_logprobs: "Logprobs | None" = None
    """The same, where an earlier attempt has made them."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt holds no token")
        check_packed(self.prompt)
        check_packed(self.generated)

    @property
    def num_tokens(self) -> int:
        return count_tokens(self.prompt) + count_tokens(self.generated)

    def extended_by(self, token: int) -> "Generation":
        """The same work with one more generated token."""
        return msgspec.structs.replace(self, generated=self.generated + token.to_bytes(4, "little"))


class Ticket(Part, frozen=True):
    """The router's word that this attempt may move KV from ``prefill`` to ``decode``; see ``messages.tickets``."""

    prefill: WorkerId
    prefill_epoch: Epoch
    decode: WorkerId
    decode_epoch: Epoch
    mac: Annotated[bytes, Meta(min_length=32, max_length=32)]


class Logprobs(Part, frozen=True):
    """Log-probabilities of consecutive tokens, one entry a token."""

    sampled: tuple[float, ...]
    """Of the token itself, natural logarithm."""
    ranks: tuple[int, ...]
    """1 is the likeliest token."""
    top_ids: tuple[Annotated[tuple[int, ...], Meta(max_length=MAX_LOGPROBS)], ...]
    top_logprobs: tuple[Annotated[tuple[float, ...], Meta(max_length=MAX_LOGPROBS)], ...]

    @classmethod
    def joined(cls, parts: Iterable["Logprobs"]) -> "Logprobs":
        """Those of consecutive pieces as one."""
        every = list(parts)
        return cls(
            sampled=tuple(value for part in every for value in part.sampled),
            ranks=tuple(value for part in every for value in part.ranks),
            top_ids=tuple(value for part in every for value in part.top_ids),
            top_logprobs=tuple(value for part in every for value in part.top_logprobs),
        )


class BlockCounts(Part, frozen=True):
    """A block pool's accounting: ``free + held + cached == total``."""

    free: Count
    held: Count
    cached: Count
    total: Count


class CacheCounts(Part, frozen=True):
    """What a worker's prefix cache was good for, since the worker started; the names are vLLM's."""

    prefix_cache_queries: Count = 0
    """Tokens of sequences that were looked up."""
    prefix_cache_hits: Count = 0
    """Those of them whose KV was there."""
    preemptions: Count = 0
    """Times that a sequence had to make room for an older one."""


class AbortReason(StrEnum):
    """Why a worker's end of a hand-over did not come to its ack. Each is a field of ``AbortCounts``."""

    REFUSED = "refused"
    """The decode worker gave no room."""
    YIELDED = "yielded"
    """The decode worker computes the prompt itself."""
    WITHDRAWN = "withdrawn"
    """This worker did not want it any more: the gateway has aborted the attempt, a step has failed, or the
    first token was the last."""
    PEER = "peer"
    """The other end gave it up."""
    PEER_LOST = "peer_lost"
    """The other end has left the membership."""
    TRANSPORT = "transport"
    """The blocks could not be written."""
    TIMEOUT = "timeout"
    """Nothing moved for too long, or what was missing did not come."""
    INTEGRITY = "integrity"
    """Blocks were still bad after their repairs, or the two ends disagreed on which there are."""


class AbortCounts(Part, frozen=True):
    """Hand-overs that were given up, by ``AbortReason``."""

    refused: Count = 0
    yielded: Count = 0
    withdrawn: Count = 0
    peer: Count = 0
    peer_lost: Count = 0
    transport: Count = 0
    timeout: Count = 0
    integrity: Count = 0


class TransferCounts(Part, frozen=True):
    """One worker's end of its hand-overs, counted since the worker started, but for the two that say now."""

    in_flight: Count = 0
    """Now."""
    seconds: Seconds = 0.0
    """Of those that were acked. Sender: from the first push to the last byte. Receiver: from the promise to the ack."""
    hidden_bytes: Count = 0
    """Of what was sent and acked: what had left before the prompt was computed."""
    repairs: Count = 0
    """Times that blocks were asked for again."""
    quarantined_blocks: Count = 0
    """Now."""
    quarantine_seconds: Seconds = 0.0
    """Each quarantine from its begin to its end, or to now."""
    aborts: AbortCounts = AbortCounts()


class DecisionCounts(Part, frozen=True):
    """Prompts by the reason why they were handed over, or computed by their decode worker (``never``, ``costs_less``,
    ``no_prefill``), since the start; see ``runtime.core.disaggregation``."""

    always: Count = 0
    never: Count = 0
    too_long: Count = 0
    unmeasured: Count = 0
    decode_busy: Count = 0
    costs_more: Count = 0
    costs_less: Count = 0
    too_late: Count = 0
    no_prefill: Count = 0


class FailReason(StrEnum):
    """Why a worker gave up an attempt."""

    REFUSED = "refused"
    """The decode worker did not take the hand-over (layout, ticket, capacity)."""
    PEER_LOST = "peer_lost"
    """The decode worker has left the membership."""
    TRANSFER = "transfer"
    """The KV did not arrive whole in time."""
    SLOW = "slow"
    """The KV is still on its way, but another way is quicker."""
    CAPACITY = "capacity"
    """The sequence can never fit this worker's pool."""
    ENGINE = "engine"
    """The engine failed in a step that this sequence was part of; alone or elsewhere it may succeed."""
    STOPPING = "stopping"
    """The worker is shutting down."""
    ORPHANED = "orphaned"
    """The gateway was taken for lost, and nobody has adopted the request in time."""
    UNKNOWN = "unknown"
    """The worker has had it, and does not know what has become of it."""

    @property
    def retryable(self) -> bool:
        """Whether another attempt on other workers may succeed."""
        return self is not FailReason.CAPACITY


class AttemptMessage(Message, frozen=True):
    """Every message about a request names its attempt, so that a newer one can fence it."""

    request: RequestId
    attempt: Annotated[Attempt, Meta(ge=1, le=2**31)]

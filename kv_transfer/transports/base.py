"""The seam of every KV transport.

A rank of a worker has one KV pool: ``num_blocks`` rows of ``block_bytes`` bytes. A ``Receiver`` lets peers write into
reserved rows of it; a ``Sender`` pushes rows of it, or a range of heads of them, into a peer's. Where the peer stores
another dtype the sender converts, so what travels is what the peer stores. Both work in the background and report
through ``on_event``, which may be called from any thread. The decisions (when to push what, whom to believe) stand in
``kv_transfer.core.session``.

Contract:

- ``Sender.push`` never blocks on the peer. It is answered by exactly one ``Pushed`` or ``PushFailed``, unless the key
  is cancelled first. Pushes of one key keep their order.
- A push with ``layers`` is live: its blocks are final, layer by layer, as ``layers`` says. No layer is read before, and
  it does not keep pushes of other keys waiting. It may leave in any pieces, or whole when the last layer is there. If
  the step fails it is ``PushFailed``, unless it is cancelled first.
- ``Sender.cancel(key)`` is answered by exactly one ``Cancelled``: from then on nothing is written for that key,
  which is not pushed again (a new attempt has another key).
- The caller keeps the pushed source blocks unchanged until then, but for the step of a live push.
- What goes wrong with a push (no such peer, blocks out of range, heads or dtypes that do not go together, a peer that
  takes nothing) is ``PushFailed``.
  ``forget`` fails what was still to be pushed to that peer. After ``shutdown`` nothing is reported.
- A two-sided receiver (``one_sided = False``) writes itself: it drops whatever comes for a key that is not open, and
  after ``close(key)`` has returned nothing lands for that key. It reports with ``Landed`` each block of which all the
  heads that were announced to ``open`` have arrived, and all layers of them.
- A one-sided receiver (``one_sided = True``) does not see the writes: no ``Landed``; what was pushed before the peer's
  end message has landed when that message arrives. After ``close`` a late writer could still write, so the caller must
  keep the blocks in quarantine until the sender has confirmed, or is gone (``writer_gone``).
"""

from collections.abc import Callable
from typing import Protocol

from engine.layer_gate import StepLayers
from kv_transfer.core.events import (
    Blocks,
    Cancelled,
    Landed,
    Pool,
    Pushed,
    PushFailed,
    TransferKey,
    TransportEvent,
)
from kv_transfer.core.lanes import Heads
from messages.common import KVEndpoint

__all__ = [
    "Blocks",
    "Cancelled",
    "Heads",
    "Landed",
    "OnEvent",
    "Pool",
    "PoolMemory",
    "PushFailed",
    "Pushed",
    "Receiver",
    "Sender",
    "StepLayers",
    "TransferKey",
    "TransportError",
    "TransportEvent",
]

OnEvent = Callable[[TransportEvent], None]


class TransportError(Exception):
    """The peer cannot be written to; becomes ``PushFailed``."""


class Receiver(Protocol):
    """Lets peers write into this worker's pool."""

    one_sided: bool
    endpoint: KVEndpoint
    """What a sender needs to know."""

    def open(self, key: TransferKey, first: int, blocks: Blocks, lanes: tuple[Heads, ...]) -> None:
        """From now on the sequence's block ``first + i`` may land in pool block ``blocks[i]``: each of ``lanes`` of it
        in a push of its own."""

    def close(self, key: TransferKey) -> None:
        """Nothing more shall land for ``key``; unknown keys are ignored."""

    def writer_gone(self, writer: KVEndpoint) -> bool:
        """Whether the process with the pool at ``writer`` is certain to be gone, so that it can write no more."""

    def shutdown(self) -> None:
        """Stop receiving; joins threads and closes sockets."""


class Sender(Protocol):
    """Pushes blocks of this rank's pool into a peer's."""

    def push(
        self,
        key: TransferKey,
        to: KVEndpoint,
        heads: Heads,
        first: int,
        source: Blocks,
        target: Blocks,
        layers: StepLayers | None = None,
    ) -> None:
        """Copy ``heads`` of pool block ``source[i]`` into the peer's block ``target[i]``: the sequence's block
        ``first + i``. ``layers``: of the step that makes them final, and is to run next, runs, or has run; then this is
        called in the thread that runs steps."""

    def cancel(self, key: TransferKey) -> None:
        """Stop pushing for ``key``; pushes not yet begun are dropped."""

    def forget(self, to: KVEndpoint) -> None:
        """The peer is gone: let go of its socket or mapping."""

    def shutdown(self) -> None:
        """Stop sending; joins threads, closes sockets, unmaps peers."""


class PoolMemory(Protocol):
    """The bytes behind a pool: allocated once, reused for every sequence."""

    pool: Pool

    def release(self) -> None:
        """Give the memory back; nobody may touch ``pool`` afterwards."""

"""What happened in a run, as it is seen from outside the cores: the evidence that ``checker.py`` judges.

The simulator and ``baton chaos`` write the same records, each where it can see them; the checker draws no conclusion
from a kind of record that a history lacks. A record is a fact, never a verdict: it is written by who injects
faults, carries messages, plays the clients and moves blocks, not by the code that is judged.

In a file each record is a MessagePack array; see ``messages.record_file``.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, get_args

import msgspec
from msgspec import Struct

from messages.common import FailReason, Role
from messages.ids import Attempt, Epoch, RequestId, WorkerId
from messages.record_file import read_records, write_record
from messages.sampling import FinishReason, SamplingParams


class Record(Struct, frozen=True, tag=True, array_like=True, gc=False):
    """``at``: seconds, of a clock that never goes back and that all records of a history share."""

    at: float


class Incarnation(Struct, frozen=True, array_like=True, gc=False):
    """One life of a process: its name in the topology, and the epoch that it drew."""

    name: str
    epoch: Epoch


# Clients


class Asked(Record, frozen=True, gc=False):
    """A client asks for one sequence (each of ``n`` samples is one)."""

    request: RequestId
    prompt: tuple[int, ...]
    params: SamplingParams
    stop: tuple[str, ...] = ()
    """Stop strings, which are the gateway's business."""
    tenant: str = "default"
    gateway: str = ""
    """That was asked; empty where there is one."""


class Got(Record, frozen=True, gc=False):
    """The client got tokens, or text where it sees no tokens."""

    request: RequestId
    index: int
    """Output position of the first token, as the client counts them."""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = None
    """Of ``tokens``, one each; None where they were not asked for."""
    text: str = ""
    event: str = ""
    """The id of the SSE event."""
    attempt: Attempt | None = None
    """Whose message made the gateway deliver this; None where nobody can see it."""
    source: Incarnation | None = None
    """The worker that sent that message."""


class Ended(Record, frozen=True, gc=False):
    """The client was told that the sequence is whole."""

    request: RequestId
    reason: FinishReason
    prompt_tokens: int | None = None
    """The usage, as the client was told it; None where it was not."""
    completion_tokens: int | None = None


class Failed(Record, frozen=True, gc=False):
    """The client got an error in place of (the rest of) its answer. ``status`` 0 and no ``code``: it was not told
    which, the connection broke, or closed without an end."""

    request: RequestId
    status: int
    """The HTTP status that belongs to the error, also where the stream had begun."""
    code: str
    retry_after: float | None = None
    detail: str = ""


class Left(Record, frozen=True, gc=False):
    """The client went away without having got its end."""

    request: RequestId


class Attached(Record, frozen=True, gc=False):
    """The client goes on with its stream at ``gateway``, having got tokens up to position ``index``."""

    request: RequestId
    gateway: str
    index: int


# Attempts, as the gateway's messages show them


class AttemptBegun(Record, frozen=True, gc=False):
    """The gateway asks for a placement of this attempt, for the first time."""

    request: RequestId
    attempt: Attempt
    moving: bool = False
    """Its predecessor goes on until it is placed; any other attempt ends its predecessor at once."""


class AttemptPlaced(Record, frozen=True, gc=False):
    """The gateway has got the router's answer, and goes to these workers."""

    request: RequestId
    attempt: Attempt
    prefill: Incarnation | None
    """None where ``decode`` does both."""
    decode: Incarnation


class AttemptGivenUp(Record, frozen=True, gc=False):
    """The gateway heard that a worker gives this attempt up."""

    request: RequestId
    attempt: Attempt
    source: Incarnation
    reason: FailReason


class Offered(Record, frozen=True, gc=False):
    """Tokens reached a gateway. A ``Got`` follows where it delivers some of them."""

    request: RequestId
    attempt: Attempt
    source: Incarnation
    index: int
    count: int
    """Tokens in the chunk."""
    last: bool
    """It says why the sequence ended."""


# Processes and what befalls them


class Started(Record, frozen=True, gc=False):
    """A process is ready: a worker, a router or a gateway."""

    process: Incarnation
    kind: str
    """``worker``, ``router`` or ``gateway``."""
    role: Role | None = None
    """Of a worker; it can be told another one, which is another ``Started`` of the same incarnation."""
    num_blocks: int = 0
    """Of a worker's KV pool."""
    block_size: int = 0
    max_num_seqs: int = 0


class Stopped(Record, frozen=True, gc=False):
    """A process has ended in good order: it was drained and told to."""

    process: Incarnation


class Killed(Record, frozen=True, gc=False):
    """A process is gone without a word."""

    process: Incarnation


class Frozen(Record, frozen=True, gc=False):
    """A process stands still, and does not know it."""

    process: Incarnation


class Thawed(Record, frozen=True, gc=False):
    process: Incarnation


class Cut(Record, frozen=True, gc=False):
    """Nothing gets from ``source`` to ``target`` any more (names of processes); the other way is another record."""

    source: str
    target: str


class Healed(Record, frozen=True, gc=False):
    """The end of a ``Cut``."""

    source: str
    target: str


class Injected(Record, frozen=True, gc=False):
    """Another fault has begun: a slow link, a bit flip, a full pool, a jump of the wall clock, a step that fails."""

    fault: str
    process: str = ""
    """Where; empty for everywhere."""
    until: float | None = None
    """When it is over; None for what takes no time."""
    detail: str = ""
    target: str = ""
    """Of a link from ``process``: where to."""


class Draining(Record, frozen=True, gc=False):
    """A worker was told to take nothing new and to give away what it has."""

    process: Incarnation


class DeclaredLost(Record, frozen=True, gc=False):
    """The router takes this incarnation of a worker for lost, and tells everyone."""

    process: Incarnation
    detail: str = ""


class Crashed(Record, frozen=True, gc=False):
    """An exception that nobody handled, or a task destroyed while it was pending."""

    process: str
    detail: str


# The network; written where somebody wants to read the story of a run, for each message costs a record


class Sent(Record, frozen=True, gc=False):
    number: int
    """Of this message in the run; a copy that the network makes has the same."""
    source: str
    target: str
    kind: str
    """The message's type."""
    request: RequestId | None = None
    attempt: Attempt | None = None


class Delivered(Record, frozen=True, gc=False):
    number: int


class Dropped(Record, frozen=True, gc=False):
    number: int
    why: str = ""


# Blocks


class Owner(Struct, frozen=True, array_like=True, gc=False):
    """Who holds blocks of a pool; one that two hold is counted with each."""

    request: RequestId
    attempt: Attempt
    num_blocks: int
    quarantined: bool = False
    """Nobody owns them any more, but a sender that was given up could still write into them."""


class Blocks(Record, frozen=True, gc=False):
    """A worker's block pool at one moment."""

    worker: Incarnation
    free: int
    held: int
    cached: int
    total: int
    owners: tuple[Owner, ...] | None = None
    """None where only the counts can be seen."""


class LedgerEntry(Struct, frozen=True, array_like=True, gc=False):
    request: RequestId
    attempt: Attempt
    workers: tuple[WorkerId, ...]
    """On which the router counts it."""


class Ledger(Record, frozen=True, gc=False):
    """What the router counts as placed at one moment."""

    router: Incarnation
    entries: tuple[LedgerEntry, ...]


class Wrote(Record, frozen=True, gc=False):
    """KV of a transfer was written into blocks of a worker's pool."""

    worker: Incarnation
    """Whose pool it is."""
    source: Incarnation
    request: RequestId
    attempt: Attempt
    blocks: tuple[int, ...]
    owners: tuple[tuple[RequestId, Attempt] | None, ...]
    """For each of ``blocks``, the attempt that it was promised to at that moment; None: to nobody."""


class Read(Record, frozen=True, gc=False):
    """A step read KV blocks of a sequence. ``wanted``: for each block a fingerprint of the tokens (and the salt) whose
    KV the sequence must find there; ``found``: of what stood there."""

    worker: Incarnation
    request: RequestId
    attempt: Attempt
    blocks: tuple[int, ...]
    wanted: tuple[int, ...]
    found: tuple[int, ...]
    verified: bool = True
    """Whether the worker had computed them itself, or acked their digests, before."""


class Idle(Record, frozen=True, gc=False):
    """No client waits, no fault is active, and every bound for letting go has passed: what ``Blocks`` and ``Ledger``
    hold from here on, up to the next ``Asked``, was leaked."""


Anything = (
    Asked | Got | Ended | Failed | Left | Attached
    | AttemptBegun | AttemptPlaced | AttemptGivenUp | Offered
    | Started | Stopped | Killed | Frozen | Thawed | Cut | Healed | Injected | Draining | DeclaredLost | Crashed
    | Sent | Delivered | Dropped
    | Blocks | Ledger | Wrote | Read | Idle
)  # fmt: skip
History = list[Anything]
"""In the order of time."""

KINDS: tuple[type[Record], ...] = get_args(Anything)

_decoder: msgspec.msgpack.Decoder[Anything] = msgspec.msgpack.Decoder(Anything)
_encode = msgspec.msgpack.Encoder().encode


class HistoryFile:
    """Writes records as they happen; a context manager. ``flush`` after each record that a crash must not lose."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")

    def append(self, record: Anything) -> None:
        write_record(self._file, _encode(record))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "HistoryFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def save(path: Path, records: Iterable[Anything]) -> None:
    with HistoryFile(path) as file:
        for record in records:
            file.append(record)


def load(path: Path) -> History:
    """The records of a file, but for one that was not written to its end; ``msgspec.DecodeError`` for anything else."""
    with path.open("rb") as file:
        return [_decoder.decode(record) for record in read_records(file)]

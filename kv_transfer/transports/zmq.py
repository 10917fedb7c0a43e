"""Between hosts: a DEALER a peer at the sender, one ROUTER at the receiver, which writes into its own pool.

A push, end to end:

1. The sender's thread cuts it into messages, of a few MiB where the way is fast: a header, and views of the pool, which
   libzmq reads in place; or, of few layers, or where the receiver keeps other heads or another dtype, of a buffer that
   is used again once it has been taken.
2. No more than ``WINDOW_BYTES`` are under way to one peer, so that memory is bounded at both ends.
3. The receiver's thread checks sizes against the header, and the header against the rows that are open for its key. It
   copies into those rows under the lock that ``close`` takes, and answers ``Taken``; what it cannot use it drops.
4. At ``Taken`` for a push's last message libzmq has long been done with the source blocks: ``Pushed``.
5. A peer that takes nothing for ``STALLED_AFTER`` seconds loses its socket, and every push to it fails. So a cancel is
   answered in time over a dead link too, and only when libzmq reads the blocks no more.

A reconnect loses what was under way: the session asks for it again.
"""

import contextlib
import ctypes
import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import zmq

from engine.cpu import pieces
from kv_transfer.core.frames import (
    MAX_PART_BYTES,
    MAX_PARTS,
    DataHeader,
    Taken,
    decode_header,
    decode_taken,
    whole_blocks,
)
from kv_transfer.core.lanes import Layers, layout_of
from kv_transfer.core.plan import plan
from kv_transfer.curve import OVERHEAD, CurveKeys, Unreachable, bind, connect
from kv_transfer.transports.base import (
    Blocks,
    Cancelled,
    Heads,
    Landed,
    OnEvent,
    Pool,
    PushFailed,
    TransferKey,
    TransportError,
)
from kv_transfer.transports.copying import (
    STEP_FAILED,
    STOP_WITHIN,
    BackgroundSender,
    Cancel,
    Command,
    Forget,
    Job,
    Landings,
    Look,
    Stop,
    blocks_in,
    lanes_out_of,
    next_job,
)
from kv_transfer.transports.records import LaneCopy, unpack
from messages.codec import BadMessage, encode
from messages.common import KVEndpoint, KVShard

MESSAGE_BYTES = 4 << 20
"""Payload of one message, on a way that is fast; a larger block is a message of its own."""
LEAST_MESSAGE_BYTES = 256 << 10
"""The same on a way that is slow, or not known yet: so that even there something is taken often."""
SLOW = 0.25
"""Seconds between two answers on a way whose messages are too large."""
PACK_BELOW = 64 << 10
"""Blocks smaller than this are packed into one part: a part each would cost more than the copy."""
JOIN_BELOW = 1 << 20
"""Neighbouring blocks that are smaller than this go as one part: to look for them costs as much as sending a part."""
WINDOW_BYTES = 16 << 20
WINDOW_MESSAGES = 32
STALLED_AFTER = 2.0
"""Seconds without an answer of a peer that owes one."""
TURN_MS = 500
"""Milliseconds between looks at the clock while something is under way."""
KEPT_FOR = 30.0
"""Seconds after its last push for which a link is kept at least, and twice as long at most: what another transport's
failure has opened shall not stay open for good."""
MESSAGES_A_TURN = 64
IN_PLACE_FROM = 256 << 10
"""Blocks' ranges of layers that are smaller than this are packed: a part each would cost more than the copy."""
BUFFER_BYTES = 64 << 10
"""The smallest buffer that a message is packed into."""


class ZmqSender(BackgroundSender[LaneCopy]):
    """Reports ``Pushed`` when the receiver has taken, or dropped, the blocks."""

    def __init__(
        self,
        pool: Pool,
        shard: KVShard,
        on_event: OnEvent,
        stalled_after: float = STALLED_AFTER,
        kept_for: float = KEPT_FOR,
        curve: CurveKeys | None = None,
    ) -> None:
        super().__init__(lanes_out_of(pool, shard), on_event, "kv-zmq-send")
        self._pool = pool
        self._curve = curve
        self._stalled_after = stalled_after
        self._kept_for = kept_for
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # libzmq starts its threads with the first socket. Not when another transport has failed, which is no time to
        # find that there is no room for them.
        self._context.socket(zmq.PUSH).close(linger=0)
        zmq.Frame(bytes(1), copy=False)  # and so does pyzmq, its thread that lets go of what was sent uncopied
        self._wake = _Wake()
        self._links: dict[str, _Link] = {}
        self._cancelling: Counter[TransferKey] = Counter()
        self._thread.start()

    def shutdown(self) -> None:
        super().shutdown()
        self._wake.close()

    def _post(self, command: Command) -> None:
        super()._post(command)
        self._wake()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake.fd, zmq.POLLIN)
        try:
            while self._obey():
                now = time.monotonic()
                for link in list(self._links.values()):
                    self._turn(link, now)
                self._close_unused(now)
                self._confirm_cancels()
                for link in self._links.values():
                    poller.register(link.socket, link.interest)
                poller.poll(self._patience)
                for link in self._links.values():
                    poller.unregister(link.socket)
                self._wake.clear()
        finally:
            for link in self._links.values():
                link.close()
            self._context.term()

    @property
    def _patience(self) -> int | None:
        """Milliseconds after which something has to be looked at although nothing has come."""
        if any(link.busy for link in self._links.values()):
            return TURN_MS
        return int(self._kept_for * 1e3) if self._links else None

    def _close_unused(self, now: float) -> None:
        for address, link in list(self._links.items()):
            if link.unused and now - link.used_at > self._kept_for:
                link.close()
                del self._links[address]

    def _obey(self) -> bool:
        """Carry out the commands that wait; False at ``Stop``."""
        with contextlib.suppress(queue.Empty):
            while True:
                match self._commands.get_nowait():
                    case Job() as job:
                        self._accept(job)
                    case Look():
                        pass
                    case Cancel(key):
                        self._cancelling[key] += 1
                        for link in self._links.values():
                            link.drop(key)
                    case Forget(address):
                        self._fail(address, "the peer is gone")
                    case Stop():
                        return False
        return True

    def _accept(self, job: Job) -> None:
        try:
            job.check(len(self._pool))
            lane = self._lane(job)
            if not len(job.source):
                self._on_event(job.pushed)
                return
            address = job.to.address
            if address not in self._links:
                self._links[address] = _Link(self._context, address, self._pool, self._curve)
            link = self._links[address]
            link.jobs[job] = lane
            link.used_at = time.monotonic()
        except TransportError as error:
            self._on_event(PushFailed(job.key, str(error)))

    def _turn(self, link: "_Link", now: float) -> None:
        if link.idle:
            link.moved_at = now
        try:
            for job in link.hear(now):
                if job.key not in self._cancelling:
                    self._on_event(job.pushed)
            for job in link.drop_failed():
                self._on_event(PushFailed(job.key, STEP_FAILED))
            link.send()
        except zmq.ZMQError as error:
            self._fail(link.address, f"cannot send to {link.address}: {error}")
            return
        link.idle = not link.busy
        if link.busy and now - link.moved_at > self._stalled_after:
            self._fail(link.address, f"{link.address} has taken nothing for {self._stalled_after:.0f} s")

    def _fail(self, address: str, detail: str) -> None:
        """Close the link to ``address``, if there is one, and fail what was on it."""
        link = self._links.pop(address, None)
        for job in link.close() if link else ():
            if job.key not in self._cancelling:
                self._on_event(PushFailed(job.key, detail))

    def _confirm_cancels(self) -> None:
        """Answer the cancels of keys that have nothing under way any more."""
        if self._cancelling:
            under_way = {sent.job.key for link in self._links.values() for sent in link.under_way}
            for key in [key for key in self._cancelling if key not in under_way]:
                for _ in range(self._cancelling.pop(key)):
                    self._on_event(Cancelled(key))


class _Sent(NamedTuple):
    """A message that the peer has not taken yet."""

    number: int
    job: Job
    size: int
    last: bool
    """Of its job."""
    tracker: zmq.MessageTracker
    buffer: Pool | None
    """What the message was packed into."""


class _Link:
    """One peer: what is to go there, and what is under way."""

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", address: str, pool: Pool, curve: CurveKeys | None
    ) -> None:
        self.address = address
        self.jobs: dict[Job, LaneCopy] = {}
        """In the order of their pushes."""
        self.under_way: deque[_Sent] = deque()
        self.moved_at = 0.0
        """When the peer last took something, or first had something to take."""
        self.used_at = 0.0
        """When something was last to go there."""
        self.idle = True
        """Whether there was nothing to take, nor to send, at the end of the last turn."""
        self._pool = pool
        self._buffers: dict[int, list[Pool]] = {}
        """Free ones, by size."""
        self._message_bytes = LEAST_MESSAGE_BYTES
        self._number = 0
        self._bytes = 0
        self._full = False  # or not connected
        self.socket: Any = None
        try:
            self.socket = context.socket(zmq.DEALER)
            _set(self.socket, LINGER=0, IMMEDIATE=1, SNDHWM=WINDOW_MESSAGES, RCVHWM=WINDOW_MESSAGES, MAXMSGSIZE=1024,
                 HEARTBEAT_IVL=1000, HEARTBEAT_TIMEOUT=10_000, RECONNECT_IVL_MAX=1000)  # fmt: skip
            connect(self.socket, address, curve)
        except BaseException as error:
            if self.socket is not None:
                self.socket.close(0)  # else the context would wait for it at the end
            if not isinstance(error, zmq.ZMQError | Unreachable):
                raise
            raise TransportError(f"cannot connect to {address}: {error}") from error

    @property
    def busy(self) -> bool:
        """Whether the peer has something to take; not where all waits for layers."""
        return bool(self.under_way) or next_job(self.jobs) is not None

    @property
    def unused(self) -> bool:
        return not self.jobs and not self.under_way

    @property
    def interest(self) -> int:
        return zmq.POLLIN | (zmq.POLLOUT if self._full else 0)

    def drop(self, key: TransferKey) -> None:
        """Send no more for ``key``; what is under way stays so."""
        self.jobs = {job: lane for job, lane in self.jobs.items() if job.key != key}

    def drop_failed(self) -> list[Job]:
        """Send no more of the pushes whose step has failed, which these are."""
        failed = [job for job in self.jobs if job.failed]
        for job in failed:
            del self.jobs[job]
        return failed

    def hear(self, now: float) -> Iterator[Job]:
        """Take the peer's answers; the pushes that are complete."""
        taken = -1
        with contextlib.suppress(zmq.Again):
            while True:
                frame = self.socket.recv(zmq.NOBLOCK)
                with contextlib.suppress(BadMessage):  # not from a receiver of ours; the stall will show
                    taken = max(taken, decode_taken(frame).number)
        if self.under_way and self.under_way[0].number <= taken:
            self._fit(now - self.moved_at)
        while self.under_way and self.under_way[0].number <= min(taken, self._number - 1):
            sent = self.under_way.popleft()
            self._bytes -= sent.size
            if sent.buffer is not None:
                self._buffers[len(sent.buffer)].append(sent.buffer)
            self.moved_at = now
            sent.job.taken(sent.size)
            if sent.last:
                yield sent.job

    def _fit(self, waited: float) -> None:
        """Messages shall be answered so often that a slow way is no dead one, and cost little on a fast one."""
        if waited > SLOW:
            self._message_bytes = max(LEAST_MESSAGE_BYTES, self._message_bytes // 2)
        elif waited < SLOW / 4:
            self._message_bytes = min(MESSAGE_BYTES, 2 * self._message_bytes)

    def send(self) -> None:
        """Send what the window lets through."""
        self._full = False
        while len(self.under_way) < WINDOW_MESSAGES and (job := next_job(self.jobs)) is not None:
            if job.failed:  # since this turn has begun; the next one drops it
                return
            lane = self.jobs[job]
            layers = job.next_layers(lane.num_layers)
            num_layers = layers.end - layers.first
            block_bytes = num_layers * lane.layer_bytes
            end = min(job.begun + blocks_in(self._message_bytes, block_bytes), len(job.source))
            size = (end - job.begun) * block_bytes
            if self.under_way and self._bytes + size > WINDOW_BYTES:
                return
            header = DataHeader(
                *job.key, number=self._number, first=job.first + job.begun, count=end - job.begun,
                block_bytes=block_bytes, first_layer=layers.first, num_layers=num_layers,
                first_head=lane.heads.first, num_heads=lane.heads.num,
            )  # fmt: skip
            source = job.source[job.begun : end]
            all_layers = num_layers == lane.num_layers
            in_place = lane.whole and block_bytes >= (PACK_BELOW if all_layers else IN_PLACE_FROM)
            buffer = None if in_place else self._buffer(size)
            parts = (
                self._parts(lane, source, layers) if buffer is None else [_packed(lane, source, layers, buffer[:size])]
            )
            try:
                tracker = self.socket.send_multipart([encode(header), *parts], zmq.NOBLOCK, copy=False, track=True)
            except zmq.Again:
                self._full = True
                if buffer is not None:
                    self._buffers[len(buffer)].append(buffer)
                return
            job.went(end, size)
            last = job.done == lane.num_layers
            self.under_way.append(_Sent(self._number, job, size, last, tracker, buffer))
            self._number += 1
            self._bytes += size
            if last:
                del self.jobs[job]

    def _buffer(self, size: int) -> Pool:
        """One of at least ``size`` bytes, of a size that comes again; no more of them than the window lets through."""
        free = self._buffers.setdefault(max(BUFFER_BYTES, 1 << (size - 1).bit_length()), [])
        return free.pop() if free else np.empty(max(BUFFER_BYTES, 1 << (size - 1).bit_length()), np.uint8)

    def _parts(self, lane: LaneCopy, source: Blocks, layers: Layers) -> list[Pool]:
        """Views of a whole lane's blocks."""
        if layers != lane.layers or lane.row_bytes >= JOIN_BELOW:
            begin, end = (lane.layer_bytes * layer for layer in layers)
            return [self._pool[block, begin:end] for block in source.tolist()]
        runs = plan(source, np.arange(len(source), dtype=np.int32), max_blocks=len(source))
        return [
            self._pool[start : start + count].reshape(-1)
            for start, count in zip(runs.source.tolist(), runs.length.tolist(), strict=True)
        ]

    def close(self) -> Iterable[Job]:
        """Close the socket, and wait until libzmq reads the pool no more; the pushes that were not complete."""
        self.socket.close(0)
        for sent in self.under_way:
            with contextlib.suppress(zmq.NotDone):
                sent.tracker.wait(STOP_WITHIN)
        return list(dict.fromkeys((*(sent.job for sent in self.under_way), *self.jobs)))


def _packed(lane: LaneCopy, source: Blocks, layers: Layers, into: Pool) -> Pool:
    lane.pack(into.reshape(len(source), -1), source, layers)
    return into


class ZmqReceiver:
    """Two-sided: its thread alone writes into the pool, and only into rows that are open."""

    one_sided = False

    def __init__(
        self, pool: Pool, host: str, shard: KVShard, on_event: OnEvent, curve: CurveKeys | None = None
    ) -> None:
        """Listen on a free port of ``host``, an IP address of this machine; ``Exposed`` where that needs ``curve``."""
        block_bytes = pool.shape[1]
        if block_bytes > MAX_PART_BYTES:
            raise ValueError(f"transport zmq takes blocks of up to {MAX_PART_BYTES} bytes, not {block_bytes}")
        _keep_freed_memory()
        pieces.prepare()
        self._pool = pool
        self._on_event = on_event
        self._landings = Landings(pool, shard.num_layers)
        self.malformed = 0
        """Messages that no sender of ours sends; dropped."""
        self.dropped = 0
        """Messages for blocks that are not open; dropped."""
        self._wake = _Wake()
        self._stopping = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: Any = self._context.socket(zmq.ROUTER)
        _set(self._socket, LINGER=0, RCVHWM=WINDOW_MESSAGES, SNDHWM=2 * WINDOW_MESSAGES,
             MAXMSGSIZE=max(MESSAGE_BYTES, block_bytes) + OVERHEAD, HEARTBEAT_IVL=1000,
             HEARTBEAT_TIMEOUT=3000)  # fmt: skip
        try:
            address = bind(self._context, self._socket, host, curve)
        except BaseException:
            self._wake.close()
            self._socket.close(0)
            self._context.term()
            raise
        self.endpoint = KVEndpoint("zmq", address, shard, len(pool))
        self._thread = threading.Thread(target=self._run, name="kv-zmq-receive", daemon=True)
        self._thread.start()

    def open(self, key: TransferKey, first: int, blocks: Blocks, lanes: tuple[Heads, ...]) -> None:
        self._landings.open(key, first, blocks, lanes)

    def close(self, key: TransferKey) -> None:
        self._landings.close(key)

    def writer_gone(self, writer: KVEndpoint) -> bool:
        """Nobody has to know: this process writes itself."""
        return False

    def shutdown(self) -> None:
        self._stopping.set()
        self._wake()
        self._thread.join(STOP_WITHIN)
        if self._thread.is_alive():
            raise TimeoutError(f"{self._thread.name} did not stop within {STOP_WITHIN:.0f} s")
        self._wake.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake.fd, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        try:
            while not self._stopping.is_set():
                poller.poll()
                self._wake.clear()
                with contextlib.suppress(zmq.Again):
                    for _ in range(MESSAGES_A_TURN):
                        self._receive()
        finally:
            self._socket.close(0)
            self._context.term()

    def _receive(self) -> None:
        """Take one message, or raise ``zmq.Again``."""
        identity = self._socket.recv(zmq.NOBLOCK)
        parts: list[zmq.Frame] = []
        too_many = False
        while self._socket.get(zmq.RCVMORE):
            part = self._socket.recv(zmq.NOBLOCK, copy=False)
            too_many = too_many or len(parts) > MAX_PARTS
            if not too_many:
                parts.append(part)
        try:
            header = decode_header(parts[0].buffer) if parts and not too_many else None
        except BadMessage:
            header = None
        if header is None:
            self.malformed += 1
            return
        self._take(header, parts[1:])
        with contextlib.suppress(zmq.ZMQError):  # who has gone needs no answer
            self._socket.send_multipart([identity, encode(Taken(header.number))], zmq.NOBLOCK)

    def _take(self, header: DataHeader, parts: list[zmq.Frame]) -> None:
        shard = self.endpoint.shard
        block_bytes = layout_of(shard, header.heads).layer_bytes * header.num_layers
        data = [np.frombuffer(part.buffer, np.uint8) for part in parts]
        if header.block_bytes != block_bytes or not whole_blocks(header, [part.size for part in data]):
            self.malformed += 1
            return

        def copy(rows: Blocks) -> None:
            for part in data:
                here = part.reshape(-1, block_bytes)
                unpack(here, self._pool, shard, header.heads, header.layers, rows[: len(here)])
                rows = rows[len(here) :]

        landed = self._landings.land(header.key, header.heads, header.layers, header.first, header.count, copy)
        if landed is None:
            self.dropped += 1
        elif len(landed):
            self._on_event(Landed(header.key, landed))


class _Wake:
    """Wakes a thread that polls ``fd``; harmless after ``close``."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1


def _set(socket: Any, **options: int) -> None:
    for name, value in options.items():
        socket.set(getattr(zmq, name), value)


def _keep_freed_memory() -> None:
    """Have malloc reuse the megabytes that libzmq takes and frees for each part, instead of asking the kernel.

    Fresh pages cost more than the data in them. glibc only; elsewhere it is merely slower. See mallopt(3).
    """
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 32 << 20)  # the most that it takes
        mallopt(trim_threshold, 256 << 20)

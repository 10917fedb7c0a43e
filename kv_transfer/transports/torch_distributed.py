"""torch.distributed between two ranks, for networks that it knows best: NCCL between GPUs, gloo on CPUs.

A push, end to end:

1. The sender has a link a peer, with a thread of its own. The first push makes it: a TCP connection to the receiver,
   and a group of two ranks that meet over it.
2. The link's thread packs a few MiB of a push into a buffer, says what it is over the connection, and sends the buffer
   through the group. No more than ``WINDOW`` of them are under way, so memory is bounded at both ends.
3. The receiver has a thread a connection. It reads the header, receives into a buffer of its own, copies that into the
   rows that are open for the key, under the lock that ``close`` takes, and answers ``Taken``; or drops it.
4. At ``Taken`` for a push's last buffer: ``Pushed``.

Neither the connection nor the group is encrypted, or asks who is there: so all of it is on loopback, or refused.

The connection is what makes a group safe to wait for: a peer that dies closes it, one that is silent for
``stalled_after`` seconds is given up. Then the group is aborted, every push on the link fails, and the next push makes
a link anew. Threads of other peers notice nothing of it.
"""

import socket
import threading
import time
from collections import Counter, deque
from typing import Any

import torch

from engine.cpu import pieces
from kv_transfer.core.frames import DataHeader, Taken, decode_header
from kv_transfer.core.lanes import layout_of
from kv_transfer.curve import Exposed, is_loopback
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
    Call,
    Cancel,
    Forget,
    Job,
    Landings,
    Look,
    Stop,
    lanes_out_of,
)
from kv_transfer.transports.records import LaneCopy, unpack
from kv_transfer.transports.torch_group import (
    Buffer,
    Group,
    check_backend,
    hang_up,
    prepare,
    readable,
    receive_frame,
    send_frame,
)
from kv_transfer.transports.torch_link import MESSAGE_BYTES, STALLED_AFTER, Link
from messages.codec import BadMessage
from messages.common import KVEndpoint, KVShard

POSTED = 2
"""Buffers that a receiver has ready for one peer."""
MAX_PEERS = 128
"""Of one receiver. Over gloo each takes 6 file descriptors, 3 threads and ``POSTED`` buffers; most systems give a
process 1024 file descriptors."""
_CPU = torch.device("cpu")


class TorchDistributedSender(BackgroundSender[LaneCopy]):
    """Reports ``Pushed`` when the receiver has taken, or dropped, the blocks."""

    def __init__(
        self,
        pool: Pool,
        shard: KVShard,
        on_event: OnEvent,
        *,
        device: torch.device = _CPU,
        stalled_after: float = STALLED_AFTER,
    ) -> None:
        """``device``: what the group sends from; its kind names the backend."""
        check_backend(device)
        super().__init__(lanes_out_of(pool, shard), on_event, "kv-nccl-send")
        self._pool = pool
        self._device, self._stalled_after = device, stalled_after
        self._links: dict[str, Link] = {}
        self._ending: list[Link] = []
        self._jobs: list[Job] = []
        """Pushes on links that are not answered yet."""
        self._cancelling: Counter[TransferKey] = Counter()
        self._thread.start()

    def _run(self) -> None:
        while True:
            match self._commands.get():
                case Job() as job:
                    self._begin(job)
                case Look():
                    self._look_again()
                case Cancel(key):
                    self._cancelling[key] += 1
                    self._drop([job for job in self._jobs if job.key == key])
                case Forget(address):
                    self._fail(address, "the peer is gone")
                case Call(call):
                    call()
                case Stop():
                    break
            self._confirm_cancels()
        links = [*self._links.values(), *self._ending]
        for link in links:
            link.stop()
        for link in links:
            link.thread.join(STOP_WITHIN)

    def _look_again(self) -> None:
        """More layers are there, or a step has failed."""
        failed = [job for job in self._jobs if job.failed]
        self._drop(failed)
        for job in failed:
            self._on_event(PushFailed(job.key, STEP_FAILED))
        for link in self._links.values():
            link.look()

    def _drop(self, jobs: list[Job]) -> None:
        """Send no more of ``jobs``."""
        self._jobs = [job for job in self._jobs if job not in jobs]
        for link in self._links.values():
            link.drop(jobs)

    def _begin(self, job: Job) -> None:
        if job.failed:  # nobody will tell of this step again
            self._on_event(PushFailed(job.key, STEP_FAILED))
            return
        try:
            job.check(len(self._pool))
            lane, address = self._lane(job), job.to.address
            if not len(job.source):
                self._on_event(job.pushed)
                return
            if address not in self._links:
                self._links[address] = Link(
                    address, self._device, self._stalled_after, self._post, moved=self._moved, ended=self._ended
                )
        except TransportError as error:
            self._on_event(PushFailed(job.key, str(error)))
            return
        self._jobs.append(job)
        self._links[address].add(job, lane)

    def _moved(self, link: Link, complete: Job | None) -> None:
        if complete in self._jobs:  # else cancelled, or failed
            self._jobs.remove(complete)
            self._on_event(complete.pushed)

    def _ended(self, link: Link, detail: str) -> None:
        if link in self._ending:
            self._ending.remove(link)
        if self._links.get(link.address) is link:
            self._fail(link.address, detail)
            self._ending.remove(link)

    def _fail(self, address: str, detail: str) -> None:
        """Let the link to ``address`` end, and fail what is to go there."""
        link = self._links.pop(address, None)
        if link is not None:
            link.stop()
            self._ending.append(link)
        gone = [job for job in self._jobs if job.to.address == address]
        self._jobs = [job for job in self._jobs if job not in gone]
        for job in gone:
            self._on_event(PushFailed(job.key, detail))

    def _confirm_cancels(self) -> None:
        """Answer the cancels of keys that have nothing under way any more."""
        if self._cancelling:
            under_way = {key for link in (*self._links.values(), *self._ending) for key in link.keys_under_way()}
            for key in [key for key in self._cancelling if key not in under_way]:
                for _ in range(self._cancelling.pop(key)):
                    self._on_event(Cancelled(key))


class TorchDistributedReceiver:
    """Two-sided: the threads of its connections write into the pool, and only into rows that are open."""

    one_sided = False

    def __init__(
        self,
        pool: Pool,
        host: str,
        shard: KVShard,
        on_event: OnEvent,
        *,
        device: torch.device = _CPU,
        stalled_after: float = STALLED_AFTER,
    ) -> None:
        """Listen on a free port of ``host``, a loopback address; ``Exposed`` for any other."""
        check_backend(device)
        if not is_loopback(host):
            raise Exposed(f"transport nccl is not encrypted, so it is not for {host}; set kv.transport to auto or zmq")
        pieces.prepare()
        self._pool, self._shard, self._on_event = pool, shard, on_event
        self._device, self._stalled_after = device, stalled_after
        self._landings = Landings(pool, shard.num_layers)
        self.dropped = 0
        """Buffers for blocks that are not open; dropped."""
        self.malformed = 0
        """Connections that said what no sender of ours says; closed."""
        self._lock = threading.Lock()
        self._stopped = False
        self._connections: dict[socket.socket, threading.Thread] = {}
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self._host = host
        at = f"[{host}]" if ":" in host else host
        address = f"tcp://{at}:{self._listener.getsockname()[1]}"
        self.endpoint = KVEndpoint("nccl", address, shard, len(pool))
        self._thread = threading.Thread(target=self._accept, name="kv-nccl-accept", daemon=True)
        self._thread.start()

    def open(self, key: TransferKey, first: int, blocks: Blocks, lanes: tuple[Heads, ...]) -> None:
        self._landings.open(key, first, blocks, lanes)

    def close(self, key: TransferKey) -> None:
        self._landings.close(key)

    def writer_gone(self, writer: KVEndpoint) -> bool:
        """Nobody has to know: this process writes itself."""
        return False

    def shutdown(self) -> None:
        with self._lock:
            self._stopped = True
            threads = [self._thread, *self._connections.values()]
            for connection in (self._listener, *self._connections):
                hang_up(connection)
        for thread in threads:
            thread.join(STOP_WITHIN)
            if thread.is_alive():
                raise TimeoutError(f"{thread.name} did not stop within {STOP_WITHIN:.0f} s")

    def _accept(self) -> None:
        with self._listener:
            while True:
                try:
                    connection, _ = self._listener.accept()
                except OSError:  # hung up, or no file descriptor is left
                    if self._stopped:
                        return
                    time.sleep(0.1)  # nothing tells when there is one again
                    continue
                thread = threading.Thread(target=self._serve, args=(connection,), name="kv-nccl-receive", daemon=True)
                with self._lock:
                    if self._stopped or len(self._connections) == MAX_PEERS:
                        connection.close()
                        continue
                    try:
                        thread.start()
                    except RuntimeError:  # no thread is left; its sender sees the connection close
                        connection.close()
                        continue
                    self._connections[connection] = thread

    def _serve(self, connection: socket.socket) -> None:
        """One sender, until it hangs up, falls silent in the middle of a push, or talks nonsense."""
        group = None
        try:
            prepare(connection)
            group = Group(1, connection, self._host, self._device, self._stalled_after)
            self._receive(connection, group)
        except BadMessage:
            self.malformed += 1
        except (OSError, RuntimeError):  # the sender sees the connection close, and fails its pushes
            pass
        finally:
            if group is not None:
                group.abort()
            with self._lock:
                self._connections.pop(connection, None)
            connection.close()

    def _receive(self, connection: socket.socket, group: Group) -> None:
        free: list[Buffer] = []
        posted: deque[tuple[DataHeader, Buffer, Any]] = deque()
        while True:
            if len(posted) < POSTED and readable(connection, wait=not posted):  # a sender may say nothing for long
                header = receive_frame(connection, decode_header, time.monotonic() + self._stalled_after)
                size = self._size(header)
                fits = [buffer for buffer in free if len(buffer.host) >= size]
                if fits:
                    free.remove(fits[0])
                buffer = fits[0] if fits else Buffer(max(size, MESSAGE_BYTES), self._device)
                posted.append((header, buffer, group.receive(buffer.wire[:size])))
                continue
            header, buffer, work = posted.popleft()
            group.finish(work, self._stalled_after)
            self._take(header, buffer.to_host(self._size(header)))
            free.append(buffer)
            send_frame(connection, Taken(header.number), time.monotonic() + self._stalled_after)

    def _size(self, header: DataHeader) -> int:
        """Bytes that come behind ``header``; raises ``BadMessage`` if they cannot be what this pool stores."""
        block_bytes = layout_of(self._shard, header.heads).layer_bytes * header.num_layers
        size = header.count * block_bytes
        if header.block_bytes != block_bytes or size > max(MESSAGE_BYTES, block_bytes):
            raise BadMessage(f"{header.count} blocks of {header.block_bytes} bytes, where they have {block_bytes}")
        return size

    def _take(self, header: DataHeader, data: Pool) -> None:
        def copy(rows: Blocks) -> None:
            unpack(data.reshape(header.count, -1), self._pool, self._shard, header.heads, header.layers, rows)

        landed = self._landings.land(header.key, header.heads, header.layers, header.first, header.count, copy)
        if landed is None:
            self.dropped += 1
        elif len(landed):
            self._on_event(Landed(header.key, landed))

"""A sender's way to one peer of the ``nccl`` transport; see ``torch_distributed``."""

import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from kv_transfer.core.frames import DataHeader, decode_taken
from kv_transfer.core.lanes import Layers
from kv_transfer.curve import Unreachable, check_address
from kv_transfer.transports.base import TransferKey, TransportError
from kv_transfer.transports.copying import Call, Job, blocks_in, next_job
from kv_transfer.transports.records import LaneCopy
from kv_transfer.transports.torch_group import Buffer, Group, hang_up, prepare, receive_frame, send_frame
from messages.codec import BadMessage

MESSAGE_BYTES = 4 << 20
"""Sent at once; a larger block goes alone."""
WINDOW = 4
"""Buffers under way to one peer."""
STALLED_AFTER = 5.0
"""Seconds that a peer may take to the next answer, or to the meeting."""
_ADDRESS = re.compile(r"tcp://(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/]+)):(\d{1,5})")
_ERRORS = (OSError, RuntimeError, BadMessage, TransportError)
"""Of a link: torch.distributed's are RuntimeErrors."""


class _Sent(NamedTuple):
    """A buffer that the peer has not taken yet."""

    number: int
    job: Job
    layers: Layers
    first: int
    """Place of its first block in the job."""
    end: int
    size: int
    last: bool
    """Of its job."""
    buffer: Buffer


class Link:
    """One peer: what is to go there, and what is under way. Its thread alone uses the connection and the group."""

    def __init__(
        self,
        address: str,
        device: torch.device,
        stalled_after: float,
        post: Callable[[Call], None],
        *,
        moved: Callable[["Link", Job | None], None],
        ended: Callable[["Link", str], None],
    ) -> None:
        """``moved`` when the peer has taken a buffer, with the push that is complete with it; ``ended`` at last, and
        why. Both are posted. Raises ``TransportError`` where no thread can be had."""
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise TransportError(f"{address!r} is no address of an nccl receiver")
        try:
            check_address(address, None)
        except Unreachable as error:
            raise TransportError(f"{address} is not on loopback, and transport nccl is not encrypted") from error
        self.address = address
        self._to = match[1] or match[2], int(match[3])
        self._device, self._stalled_after = device, stalled_after
        self._post, self._moved, self._ended = post, moved, ended
        self._changed = threading.Condition()
        self._stopped = False
        self._jobs: dict[Job, LaneCopy] = {}
        self._under_way: deque[_Sent] = deque()
        self._works: deque[Any] = deque()
        self._buffers: list[Buffer] = []
        self._number = 0
        self._connection: socket.socket | None = None
        self.thread = threading.Thread(target=self._run, name="kv-nccl-link", daemon=True)
        try:
            self.thread.start()
        except RuntimeError as error:
            raise TransportError(f"cannot send to {address}: {error}") from error

    def add(self, job: Job, lane: LaneCopy) -> None:
        with self._changed:
            self._jobs[job] = lane
            self._changed.notify()

    def look(self) -> None:
        """More layers are there."""
        with self._changed:
            self._changed.notify()

    def drop(self, jobs: Iterable[Job]) -> None:
        """Send no more of ``jobs``; what is under way stays so."""
        with self._changed:
            for job in jobs:
                self._jobs.pop(job, None)
            self._changed.notify()

    def keys_under_way(self) -> set[TransferKey]:
        with self._changed:
            return {sent.job.key for sent in self._under_way}

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
            if self._connection is not None:
                hang_up(self._connection)

    def _run(self) -> None:
        group, detail = None, "the peer is gone"
        try:
            with socket.create_connection(self._to, self._stalled_after) as connection:
                with self._changed:
                    self._connection = connection
                prepare(connection)
                group = Group(0, connection, connection.getsockname()[0], self._device, self._stalled_after)
                while self._turn(connection, group):
                    pass
        except TimeoutError:
            detail = f"{self.address} has taken nothing for {self._stalled_after:g} s"
        except _ERRORS as error:
            detail = f"cannot send to {self.address}: {error}"
        finally:
            self._works.clear()
            if group is not None:
                group.abort()
            with self._changed:
                self._connection = None
                self._under_way.clear()
                self._jobs.clear()
            self._post(Call(lambda: self._ended(self, detail)))

    def _turn(self, connection: socket.socket, group: Group) -> bool:
        """Send the next buffer, or hear of one; False when it is time to stop."""
        with self._changed:
            # Asked once a look: a step may fail, and its push be ready no more, between two answers.
            job = self._ready()
            while job is None and not self._under_way and not self._stopped:
                self._changed.wait()
                job = self._ready()
            if self._stopped:
                return False
            if job is not None:
                lane, sent = self._next(job)
        if job is None:
            self._hear(connection, group)
            return True
        count, layers = sent.end - sent.first, sent.layers
        lane.pack(sent.buffer.host[: sent.size].reshape(count, -1), job.source[sent.first : sent.end], layers)
        header = DataHeader(
            *job.key, number=sent.number, first=job.first + sent.first, count=count, block_bytes=sent.size // count,
            first_layer=layers.first, num_layers=layers.end - layers.first,
            first_head=lane.heads.first, num_heads=lane.heads.num,
        )  # fmt: skip
        send_frame(connection, header, time.monotonic() + self._stalled_after)
        self._works.append(group.send(sent.buffer.to_wire(sent.size)))
        return True

    def _ready(self) -> Job | None:
        """A push that can go on now. One whose step has failed is about to be dropped."""
        if len(self._under_way) == WINDOW:
            return None
        job = next_job(self._jobs)
        return None if job is None or job.failed else job

    def _next(self, job: Job) -> tuple[LaneCopy, _Sent]:
        """What to send of ``job`` now; it is under way from here on."""
        lane, first = self._jobs[job], job.begun
        layers = job.next_layers(lane.num_layers)
        block_bytes = (layers.end - layers.first) * lane.layer_bytes
        end = min(first + blocks_in(MESSAGE_BYTES, block_bytes), len(job.source))
        size = (end - first) * block_bytes
        fits = [buffer for buffer in self._buffers if len(buffer.host) >= size]
        if fits:
            self._buffers.remove(fits[0])
        buffer = fits[0] if fits else Buffer(max(size, MESSAGE_BYTES), self._device)
        job.went(end, size)
        sent = _Sent(self._number, job, layers, first, end, size, job.done == lane.num_layers, buffer)
        self._number += 1
        self._under_way.append(sent)
        if sent.last:
            del self._jobs[job]
        return lane, sent

    def _hear(self, connection: socket.socket, group: Group) -> None:
        taken = receive_frame(connection, decode_taken, time.monotonic() + self._stalled_after)
        sent = self._under_way[0]
        if taken.number != sent.number:
            raise TransportError(f"it has taken {taken.number} where {sent.number} was to come")
        group.finish(self._works.popleft(), self._stalled_after)
        with self._changed:
            self._under_way.popleft()
            self._buffers.append(sent.buffer)
        sent.job.taken(sent.size)
        complete = sent.job if sent.last else None
        self._post(Call(lambda: self._moved(self, complete)))

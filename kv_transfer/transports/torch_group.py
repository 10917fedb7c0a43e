"""What a link of the ``nccl`` transport is made of: a group of two ranks, what it sends from, and frames beside it."""

import contextlib
import os
import select
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from kv_transfer.core.frames import Meet, decode_meet
from kv_transfer.transports.base import Pool
from messages.codec import BadMessage, Decode, encode

MAX_FRAME = 4096
MAX_MET_FRAMES, MAX_MET_BYTES = 64, 64 << 10
"""That one end may say in a meeting: gloo says 170 bytes in one frame, NCCL has an id of 128 to tell."""
CONNECT_TRIES = 5
"""That gloo makes, each as long as its timeout, however sure it is that nobody is there."""
_GONE_AFTER = 30
"""Seconds until a connection goes whose other host has lost power, or the way to it."""


def check_backend(device: torch.device) -> None:
    """Raise ``ValueError`` where this torch has no backend for ``device``."""
    name, there = ("gloo", dist.is_gloo_available) if device.type == "cpu" else ("nccl", dist.is_nccl_available)
    if not dist.is_available() or not there():
        raise ValueError(f"transport nccl needs {name}, which this build of torch has not; set kv.transport to auto")


class Buffer:
    """``host``, as bytes; ``wire``, what the group sends: the same memory on a CPU."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.wire = torch.empty(size, dtype=torch.uint8, device=device)
        staged = self.wire if device.type == "cpu" else torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.host: Pool = staged.numpy()
        self._staged = staged

    def to_wire(self, size: int) -> torch.Tensor:
        if self.wire is not self._staged:
            self.wire[:size].copy_(self._staged[:size], non_blocking=True)
        return self.wire[:size]

    def to_host(self, size: int) -> Pool:
        if self.wire is not self._staged:
            self._staged[:size].copy_(self.wire[:size])
        return self.host[:size]


class _Meeting(dist.Store):  # type: ignore[name-defined,misc]
    """Two ranks' store over the connection between them: what one sets, the other reads.

    torch's own ``TCPStore`` is not used: it leaves a client in fifty unanswered here (torch 2.13), and is open to
    whoever can connect.
    """

    def __init__(self, connection: socket.socket, within: float) -> None:
        super().__init__()
        self._connection = connection
        self._deadline = time.monotonic() + within
        self._values: dict[str, bytes] = {}
        self._num_heard, self._bytes_heard = 0, 0
        self.error: Exception | None = None
        """What went wrong with the connection, which torch tells in words of its own."""

    def set(self, key: str, value: Any) -> None:
        self._values[key] = value.encode() if isinstance(value, str) else bytes(value)
        with self._noting():
            send_frame(self._connection, Meet(key, self._values[key]), self._deadline)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Until the deadline of the meeting, whatever torch would give a key."""
        with self._noting():
            while not self.check(keys):
                self._hear()

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    @property
    def left(self) -> float:
        """Seconds of the meeting."""
        return max(0.0, self._deadline - time.monotonic())

    def end(self) -> None:
        """Set no more, and leave nothing on the connection that the other has set."""
        self.set("", b"")
        del self._values[""]
        self.wait([""])

    def _hear(self) -> None:
        meet = receive_frame(self._connection, decode_meet, self._deadline)
        self._num_heard += 1
        self._bytes_heard += len(meet.key) + len(meet.value)
        if self._num_heard > MAX_MET_FRAMES or self._bytes_heard > MAX_MET_BYTES:
            raise BadMessage(f"{self._num_heard} frames of {self._bytes_heard} bytes in a meeting")
        self._values[meet.key] = meet.value

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = error
            raise


class Group:
    """Two ranks: 0 sends, 1 receives. Raises ``RuntimeError`` when the other is lost."""

    def __init__(self, rank: int, connection: socket.socket, host: str, device: torch.device, within: float) -> None:
        """Meet the other rank over ``connection``, whose errors come as they are; nothing is left of a meeting that
        fails."""
        self._within = within
        self._device = device
        self._group: Any = None
        store = _Meeting(connection, within)
        try:
            self._make(rank, store, host)
            # The first message is what makes NCCL connect.
            first = torch.zeros(1, dtype=torch.uint8, device=device)
            self.finish(self.send(first) if rank == 0 else self.receive(first), store.left)
            store.end()
        except BaseException as error:
            self.abort()
            if store.error is not None and store.error is not error:
                raise store.error from error
            raise
        finally:
            store.error = None  # its traceback holds the store, and with it gloo's threads and files, until a full gc

    def _make(self, rank: int, store: Any, host: str) -> None:
        timeout = timedelta(seconds=self._within / CONNECT_TRIES)
        if self._device.type == "cpu":
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = timeout
            options._threads = 1  # for collectives, of which there are none
            # A device for each group: gloo's listener keeps what waits for a connection that did not come in time, so
            # a device that outlives its group calls into freed memory when it comes after all (torch 2.13).
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
            self._group = dist.ProcessGroupGloo(store, rank, 2, options)
        else:
            # NCCL's own watchdog would end the process where this transport ends a link.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, rank, 2, options)

    def send(self, tensor: torch.Tensor) -> Any:
        return self._group.send([tensor], 1, 0)

    def receive(self, tensor: torch.Tensor) -> Any:
        return self._group.recv([tensor], 0, 0)

    def finish(self, work: Any, within: float) -> None:
        """Wait for what ``send`` or ``receive`` began. gloo's wait ends in time by itself; NCCL's is only the
        stream's, so that is watched."""
        work.wait(timedelta(seconds=within))
        if self._device.type == "cpu":
            return
        with torch.cuda.device(self._device):  # else of the device that is this thread's, where nothing is under way
            done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        deadline = time.monotonic() + within
        while not done.query():
            if time.monotonic() > deadline:
                raise RuntimeError(f"NCCL has not moved for {within:g} s")
            time.sleep(0.0001)  # a look at the device, not at another thread

    def abort(self) -> None:
        """Give up what is under way."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def prepare(connection: socket.socket) -> None:
    """Send small frames at once, and notice a host that is gone within ``_GONE_AFTER`` seconds."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _GONE_AFTER // 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _GONE_AFTER // 6)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GONE_AFTER * 1000)  # of what is sent


def hang_up(connection: socket.socket) -> None:
    """Wake whoever reads from it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def readable(connection: socket.socket, *, wait: bool) -> bool:
    """Whether there is something to read, or the end; ``wait`` until there is."""
    poll = select.poll()  # select takes no file descriptor beyond 1023
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(None if wait else 0))


def send_frame(connection: socket.socket, message: Any, deadline: float) -> None:
    """Raises ``TimeoutError`` when it has not gone by ``deadline``, of the monotonic clock."""
    body = encode(message)
    _wait_until(connection, deadline)
    connection.sendall(len(body).to_bytes(4, "little") + body)


def receive_frame(connection: socket.socket, decode: Decode, deadline: float) -> Any:
    """Raises ``ConnectionError`` at the end, ``BadMessage``, and ``TimeoutError`` when the whole frame has not come by
    ``deadline``, of the monotonic clock."""
    size = int.from_bytes(_receive_bytes(connection, 4, deadline), "little")
    if size > MAX_FRAME:
        raise BadMessage(f"a frame of {size} bytes")
    return decode(_receive_bytes(connection, size, deadline))


def _receive_bytes(connection: socket.socket, size: int, deadline: float) -> bytes:
    got = b""
    while len(got) < size:
        _wait_until(connection, deadline)
        part = connection.recv(size - len(got))
        if not part:
            raise ConnectionError("the peer has closed the connection")
        got += part
    return got


def _wait_until(connection: socket.socket, deadline: float) -> None:
    """For the next call alone; ``recv`` would begin anew with each byte."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    connection.settimeout(left)

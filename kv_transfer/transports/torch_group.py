"""What a link of the ``nccl`` transport is made of: a group of two ranks, what it sends from, and frames beside it."""

import contextlib
import os
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
CONNECT_TRIES = 5
"""That gloo makes, each as long as its timeout, however sure it is that nobody is there."""


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

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._connection = connection
        self._values: dict[str, bytes] = {}
        self.error: Exception | None = None
        """What went wrong with the connection, which torch tells in words of its own."""

    def set(self, key: str, value: Any) -> None:
        self._values[key] = value.encode() if isinstance(value, str) else bytes(value)
        with self._noting():
            send_frame(self._connection, Meet(key, self._values[key]))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """As long as the connection is set to wait."""
        with self._noting():
            while not self.check(keys):
                self._hear()

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def end(self) -> None:
        """Set no more, and leave nothing on the connection that the other has set."""
        self.set("", b"")
        del self._values[""]
        self.wait([""])

    def _hear(self) -> None:
        meet = receive_frame(self._connection, decode_meet)
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
        """Meet the other rank over ``connection``, whose errors come as they are."""
        self._within = within
        self._device = device
        self._group: Any = None
        store = _Meeting(connection)
        try:
            self._make(rank, store, host)
            # The first message is what makes NCCL connect.
            first = torch.zeros(1, dtype=torch.uint8, device=device)
            self.finish(self.send(first) if rank == 0 else self.receive(first), within / CONNECT_TRIES)
            store.end()
        except BaseException as error:
            self.abort()
            if store.error is not None and store.error is not error:
                raise store.error from error
            raise

    def _make(self, rank: int, store: Any, host: str) -> None:
        timeout = timedelta(seconds=self._within / CONNECT_TRIES)
        if self._device.type == "cpu":
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = timeout
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


def send_frame(connection: socket.socket, message: Any) -> None:
    body = encode(message)
    connection.sendall(len(body).to_bytes(4, "little") + body)


def receive_frame(connection: socket.socket, decode: Decode) -> Any:
    """Raises ``ConnectionError`` at the end, ``BadMessage``, and ``TimeoutError`` as the connection is set."""
    size = int.from_bytes(_receive_bytes(connection, 4), "little")
    if size > MAX_FRAME:
        raise BadMessage(f"a frame of {size} bytes")
    return decode(_receive_bytes(connection, size))


def _receive_bytes(connection: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        part = connection.recv(size - len(got))
        if not part:
            raise ConnectionError("the peer has closed the connection")
        got += part
    return got

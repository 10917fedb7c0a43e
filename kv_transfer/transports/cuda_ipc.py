"""Both workers on GPUs of one host: the sender's GPU copies straight into the receiver's pool, which CUDA maps for it.

1. A worker's pool is one allocation, exported once (``CudaMemory``). Its address is in the endpoint.
2. The first push to a peer opens the peer's pool; it stays open until the peer is forgotten or gone.
3. A push notes, by an event, how far the stream is that computes KV: the copy waits for it on the GPU. A live push
   needs no more: a step on a GPU tells of its layers when they have run (``engine.rank``).
4. The copy runs on a stream of its own, in one kernel for all blocks, layers and heads of a piece. When the GPU has
   done it, and not before, the blocks count as pushed, and a cancel is answered: nothing is under way between pieces.

The receiver takes no part, and cannot refuse a write: see ``one_sided`` in ``base``. It promises only blocks whose last
step it has seen the end of, and is told that they have landed by the sender's host: so neither end's streams need to
know of the other's. Where the receiver dies, a copy that has begun goes to memory that CUDA keeps while it is open
here, and the next piece fails.
"""

import logging
import select
from collections.abc import Callable
from functools import partial

import torch

from engine.device_memory import DeviceMemory, PeerDeviceMemory
from engine.shared_memory import SharedMemoryError, owner_gone
from kv_transfer.core.lanes import Layers, layout_of
from kv_transfer.transports.base import Blocks, Heads, OnEvent, StepLayers, TransferKey, TransportError
from kv_transfer.transports.copying import Call, CopyingSender
from kv_transfer.transports.device_lane import DeviceLane
from messages.common import KVEndpoint, KVShard

log = logging.getLogger(__name__)

STEP_BYTES = 256 << 20
"""Copied at once: a cancel waits for no more than this. Less would leave a GPU idle between the pieces."""


class CudaMemory:
    """A KV pool on a GPU, ``pool [num_blocks, block_bytes]`` of uint8, zeroed, that other processes of the same user on
    this host can write into: they open ``address``. Raises ``SharedMemoryError`` where that cannot be had."""

    def __init__(self, num_blocks: int, block_bytes: int, device: torch.device) -> None:
        if num_blocks < 1 or block_bytes < 1:
            raise ValueError(f"a KV pool needs blocks: {num_blocks} of {block_bytes} bytes")
        self._memory = DeviceMemory(num_blocks * block_bytes, device)
        self.address = self._memory.address
        self.pool = self._memory.tensor.view(num_blocks, block_bytes)

    def release(self) -> None:
        """No peer can open the pool any more. The GPU's memory goes with the process: a peer may have it open."""
        self._memory.close()
        self.pool = self.pool[:0]


class CudaIpcReceiver:
    """Only says where the pool is."""

    one_sided = True

    def __init__(self, memory: CudaMemory, shard: KVShard) -> None:
        self.endpoint = KVEndpoint("cuda_ipc", memory.address, shard, len(memory.pool))

    def open(self, key: TransferKey, first: int, blocks: Blocks, lanes: tuple[Heads, ...]) -> None:
        """Nothing to do: the sender was told the blocks."""

    def close(self, key: TransferKey) -> None:
        """Nothing can be done: the caller keeps the blocks in quarantine."""

    def writer_gone(self, writer: KVEndpoint) -> bool:
        """A process that is gone has closed its GPU, which ends what it had launched."""
        return writer.transport == "cuda_ipc" and owner_gone(writer.address)

    def shutdown(self) -> None:
        """Nothing runs; the memory is its owner's to release."""


class CudaIpcSender(CopyingSender[DeviceLane]):
    """Reports ``Pushed`` when the blocks stand in the peer's pool."""

    def __init__(self, pool: torch.Tensor, shard: KVShard, on_event: OnEvent) -> None:
        """``pool``: on a GPU, written by its default stream; it need not be exported to send from it."""
        if not pool.is_cuda:
            raise ValueError(f"transport cuda_ipc needs a pool on a GPU, not on {pool.device}")
        self._written_on = torch.cuda.default_stream(pool.device)
        self._stream = _CopyStream(pool.device)
        super().__init__(
            len(pool),
            partial(DeviceLane, pool, shard),
            on_event,
            "kv-cuda-ipc",
            partial(_Peer, stream=self._stream),
            STEP_BYTES,
        )

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
        written = torch.cuda.Event()  # type: ignore[no-untyped-call]
        written.record(self._written_on)
        self._post(Call(partial(self._stream.come_after, written)))
        super().push(key, to, heads, first, source, target, layers)


class _CopyStream:
    """Where copies run, behind what has written the blocks; for one thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # A wait that spins would take a core from the model.
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def come_after(self, written: torch.cuda.Event) -> None:
        """What ``run`` launches from now on waits for this, on the GPU."""
        self._stream.wait_event(written)

    def run(self, copy: Callable[[], None]) -> None:
        """Have ``copy`` launch what it will; returns when the GPU has done it, also where it raises."""
        with torch.cuda.stream(self._stream):
            try:
                copy()
            finally:
                self._done.record(self._stream)
                self._done.synchronize()


class _Peer:
    def __init__(self, to: KVEndpoint, stream: _CopyStream) -> None:
        self._stream = stream
        block_bytes = layout_of(to.shard).block_bytes
        try:
            self._memory = PeerDeviceMemory(to.address, to.num_blocks * block_bytes, stream.device)
        except (SharedMemoryError, RuntimeError) as error:  # the latter torch's, of a GPU that has failed
            raise TransportError(f"the KV pool: {error}") from error
        self._pool = self._memory.tensor.view(to.num_blocks, block_bytes)
        self._process = select.poll()
        self._process.register(self._memory.process, select.POLLIN)

    @property
    def gone(self) -> bool:
        return bool(self._process.poll(0))

    def write(
        self, key: TransferKey, first: int, target: Blocks, lane: DeviceLane, source: Blocks, layers: Layers
    ) -> None:
        if self.gone:
            raise TransportError("the process of the KV pool has died")
        if not len(source):
            return
        try:
            self._stream.run(lambda: lane.write(self._pool, target, source, layers))
        except (RuntimeError, ValueError) as error:  # torch's: no memory, a fault; Triton's: the GPU does not reach it
            raise TransportError(f"the GPU could not copy: {error}") from error

    def release(self) -> None:
        self._pool = self._pool[:0]
        try:
            self._memory.close()
        except SharedMemoryError as error:  # a GPU that has failed: each step of the worker hears of that
            log.warning("a peer's KV pool could not be closed: %s", error)

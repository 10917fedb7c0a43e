"""The transports by name: the one place that knows them all."""

import logging
import secrets
from functools import partial

from engine.shared_memory import SharedMemoryError, mapping_host
from kv_transfer.curve import CurveKeys
from kv_transfer.transports.base import OnEvent, Pool, PoolMemory, Receiver, Sender
from kv_transfer.transports.inproc import InprocReceiver, InprocSender
from kv_transfer.transports.memory import PrivateMemory, SharedMemory
from kv_transfer.transports.shm import ShmReceiver, ShmSender
from kv_transfer.transports.switched import Links, SwitchedSender
from kv_transfer.transports.torch_distributed import TorchDistributedReceiver, TorchDistributedSender
from kv_transfer.transports.zmq import ZmqReceiver, ZmqSender
from messages.common import KVShard

log = logging.getLogger(__name__)

TRANSPORTS = ("inproc", "shm", "nccl", "zmq")
AUTO = "auto"
"""Every transport that the pool and this machine allow; see ``kv_transfer.core.ways``."""
_PROCESS = secrets.token_hex(16)


def allocate_pool(transport: str, num_blocks: int, block_bytes: int) -> PoolMemory:
    """Memory for a KV pool that ``transport``, or ``AUTO``, can move blocks in and out of; zeroed, ``release`` it at
    the end. Raises ``ValueError`` where memory cannot be shared and ``transport`` needs that."""
    if transport == AUTO:
        try:
            mapping_host()
        except SharedMemoryError as error:
            log.warning("KV goes over zmq even to workers on this host, since memory cannot be shared: %s", error)
            return PrivateMemory(num_blocks, block_bytes)
        return SharedMemory(num_blocks, block_bytes)
    _check(transport)
    if transport == "shm":
        try:
            mapping_host()
        except SharedMemoryError as error:
            raise ValueError(f"transport shm cannot be had here: {error}; set kv.transport to auto or zmq") from error
        return SharedMemory(num_blocks, block_bytes)
    return PrivateMemory(num_blocks, block_bytes)


def host_of(memory: PoolMemory) -> str:
    """``KVRank.host`` of a rank with this pool."""
    return mapping_host() if isinstance(memory, SharedMemory) else _PROCESS


def make_senders(
    transport: str,
    memory: PoolMemory,
    shard: KVShard,
    on_event: OnEvent,
    links: Links | None = None,
    curve: CurveKeys | None = None,
) -> dict[str, Sender]:
    """A sender for each transport that ``transport`` or ``AUTO`` means; see ``make_sender``. With ``links`` faults can
    be put into them while they work."""
    if links is None:
        return {name: make_sender(name, memory.pool, shard, on_event, curve) for name in _offered(transport, memory)}
    return {
        name: SwitchedSender(memory.pool, partial(make_sender, name, shard=shard, curve=curve), on_event, links)
        for name in _offered(transport, memory)
    }


def make_receivers(
    transport: str, host: str, memory: PoolMemory, shard: KVShard, on_event: OnEvent, curve: CurveKeys | None = None
) -> dict[str, Receiver]:
    """A receiver for each transport that ``transport`` or ``AUTO`` means; see ``make_receiver``."""
    return {name: make_receiver(name, host, memory, shard, on_event, curve) for name in _offered(transport, memory)}


def make_sender(
    transport: str, pool: Pool, shard: KVShard, on_event: OnEvent, curve: CurveKeys | None = None
) -> Sender:
    """A sender out of ``pool``, whose blocks are those of ``shard``; ``shutdown`` it before the pool is released.
    ``curve``: for what leaves over zmq."""
    _check(transport)
    match transport:
        case "inproc":
            return InprocSender(pool, shard, on_event)
        case "shm":
            return ShmSender(pool, shard, on_event)
        case "nccl":
            return TorchDistributedSender(pool, shard, on_event)
        case _:
            return ZmqSender(pool, shard, on_event, curve=curve)


def make_receiver(
    transport: str,
    host: str,
    memory: PoolMemory,
    shard: KVShard,
    on_event: OnEvent,
    curve: CurveKeys | None = None,
) -> Receiver:
    """A receiver into ``memory``, whose blocks are those of ``shard``, reachable at ``host``; ``shutdown`` it before
    the pool is released. Raises ``ValueError`` where ``host`` is not loopback and what comes would not be encrypted:
    only zmq is, with ``curve``."""
    _check(transport)
    match transport:
        case "inproc":
            return InprocReceiver(memory.pool, shard, on_event)
        case "shm":
            if not isinstance(memory, SharedMemory):
                raise ValueError("transport shm needs a pool that allocate_pool made for shm")
            return ShmReceiver(memory, shard)
        case "nccl":
            return TorchDistributedReceiver(memory.pool, host, shard, on_event)
        case _:
            return ZmqReceiver(memory.pool, host, shard, on_event, curve)


def _offered(transport: str, memory: PoolMemory) -> tuple[str, ...]:
    if transport != AUTO:
        return (transport,)
    return ("shm", "zmq") if isinstance(memory, SharedMemory) else ("zmq",)


def _check(transport: str) -> None:
    if transport not in TRANSPORTS:
        raise ValueError(f"unknown KV transport {transport!r}; there are {', '.join(TRANSPORTS)}")

"""The transports by name: the one place that knows them all."""

from kv_transfer.transports.base import OnEvent, Pool, PoolMemory, Receiver, Sender
from kv_transfer.transports.inproc import InprocReceiver, InprocSender
from kv_transfer.transports.memory import PrivateMemory, SharedMemory
from kv_transfer.transports.shm import ShmReceiver, ShmSender
from kv_transfer.transports.zmq import ZmqReceiver, ZmqSender
from messages.common import KVShard

TRANSPORTS = ("inproc", "shm", "zmq")


def allocate_pool(transport: str, num_blocks: int, block_bytes: int) -> PoolMemory:
    """Memory for a KV pool that ``transport`` can move blocks in and out of; zeroed, ``release`` it at the end."""
    _check(transport)
    if transport == "shm":
        return SharedMemory(num_blocks, block_bytes)
    return PrivateMemory(num_blocks, block_bytes)


def make_sender(transport: str, pool: Pool, shard: KVShard, on_event: OnEvent) -> Sender:
    """A sender out of ``pool``, whose blocks are those of ``shard``; ``shutdown`` it before the pool is released."""
    _check(transport)
    match transport:
        case "inproc":
            return InprocSender(pool, shard, on_event)
        case "shm":
            return ShmSender(pool, shard, on_event)
        case _:
            return ZmqSender(pool, shard, on_event)


def make_receiver(transport: str, host: str, memory: PoolMemory, shard: KVShard, on_event: OnEvent) -> Receiver:
    """A receiver into ``memory``, whose blocks are those of ``shard``, reachable at ``host``; ``shutdown`` it before
    the pool is released."""
    _check(transport)
    match transport:
        case "inproc":
            return InprocReceiver(memory.pool, shard, on_event)
        case "shm":
            if not isinstance(memory, SharedMemory):
                raise ValueError("transport shm needs a pool that allocate_pool made for shm")
            return ShmReceiver(memory, shard)
        case _:
            return ZmqReceiver(memory.pool, host, shard, on_event)


def _check(transport: str) -> None:
    if transport not in TRANSPORTS:
        raise ValueError(f"unknown KV transport {transport!r}; there are {', '.join(TRANSPORTS)}")

"""A router without a network, a clock that tests turn, and the messages it takes."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from messages.common import BlockCounts, KVRank, KVWay, Role, WorkerAddress
from messages.gateway_to_router import ClusterStateWanted, Finished, PlacementWanted, Prefilled
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.router_to_gateway import ClusterState, Placed
from messages.seals import Sealed, seal
from messages.worker_to_router import Register, Report
from router.core.machine import Router, RouterSettings, Tick
from runtime.core.actions import Send, WakeAt
from tests.kv_transfer.kv_pair import shard_of_bytes

KEY = b"k" * 32
GATEWAY = Address("tcp://gateway:1")


BLOCKS = 1000


def register(worker: str, role: Role, epoch: int = 1, max_model_len: int = 4096, *, max_num_seqs: int = 8,
             blocks: int = BLOCKS) -> Register:  # fmt: skip
    kv = (
        ()
        if role is not Role.DECODE
        else (KVRank(shard_of_bytes(64), blocks, "host", (KVWay("shm", f"pool-{worker}"),)),)
    )
    address = WorkerAddress(WorkerId(worker), Epoch(epoch), Address(f"tcp://{worker}.{epoch}:1"), kv)
    return Register(
        address=address, role=role, max_num_seqs=max_num_seqs, max_model_len=max_model_len, incarnation=epoch
    )  # fmt: skip


def report(worker: str, number: int, epoch: int = 1, *, blocks: int = BLOCKS, running: int = 1) -> Report:
    return Report(
        worker=WorkerId(worker), epoch=Epoch(epoch), number=number, steps=number, running=running, waiting=2,
        blocks=BlockCounts(free=blocks - 10, held=10, cached=0, total=blocks),
        kv_bytes_sent=0, kv_bytes_received=0, transfers=0,
    )  # fmt: skip


def wanted(request: str, attempt: int = 1, tokens: int = 10, *, avoid: tuple[str, ...] = (), gateway: Address = GATEWAY,
           max_new_tokens: int = 20, cut: Iterable[tuple[str, str]] = ()) -> PlacementWanted:  # fmt: skip
    return PlacementWanted(
        request=RequestId(request), attempt=Attempt(attempt), gateway=gateway, tenant="t", num_tokens=tokens,
        max_new_tokens=max_new_tokens, avoid=tuple(map(WorkerId, avoid)),
        cut=tuple((WorkerId(prefill), WorkerId(decode)) for prefill, decode in cut),
    )  # fmt: skip


def prefilled(request: str, attempt: int = 1) -> Prefilled:
    return Prefilled(request=RequestId(request), attempt=Attempt(attempt))


def finished(request: str, attempt: int = 1) -> Finished:
    return Finished(request=RequestId(request), attempt=Attempt(attempt))


class World:
    """A router, its clock, and what it sent; integrity is checked after every event."""

    def __init__(self, **settings: Any) -> None:
        self.router = Router(RouterSettings(cluster_key=KEY, **({"settle": 0.0} | settings)))
        self.now = 0.0
        self.wakes: list[float] = []
        self.gateways = {GATEWAY: None}
        """That live."""

    def handle(self, event: Any) -> list[Send]:
        """What ``event`` leads to; the sender of one that needs a seal knows the key, unless it has put on its own."""
        if isinstance(event, Sealed) and not event.mac:
            event = seal(KEY, event)
        actions = self.router.handle(event, self.now)
        self.router.check_integrity()
        self.wakes += [action.time for action in actions if isinstance(action, WakeAt)]
        return [action for action in actions if isinstance(action, Send)]

    def answer(self, event: Any) -> msgspec.Struct:
        """The one message that an event leads to."""
        (send,) = self.handle(event)
        return send.message

    def place(self, request: str, attempt: int = 1, **options: Any) -> Placed:
        placed = self.answer(wanted(request, attempt, **options))
        assert isinstance(placed, Placed), placed
        return placed

    def state(self) -> ClusterState:
        state = self.answer(ClusterStateWanted(gateway=GATEWAY))
        assert isinstance(state, ClusterState)
        return state

    def sleep(self, seconds: float, *reporting: str, numbers: Iterator[int] = itertools.count(1)) -> list[Send]:  # noqa: B008
        """Let time pass; ``reporting`` workers report every 100 ms, and asked-for ticks come on time. So do the
        questions of the gateways."""
        sends: list[Send] = []
        until = self.now + seconds
        while self.now < until - 1e-9:
            self.now = min(until, self.now + 0.1)
            number = next(numbers)
            for gateway in self.gateways:
                self.handle(ClusterStateWanted(gateway=gateway))
            for worker in reporting:
                sends += self.handle(report(worker, number))
            if self.wakes and min(self.wakes) <= self.now:
                self.wakes.clear()
                sends += self.handle(Tick())
        return sends

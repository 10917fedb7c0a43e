"""The simulated processes: real cores in shells that turn virtual messages and times into events, and back.

Each process has a monotonic clock of its own, which began at some other time. What is frozen does nothing, and does not
know: messages pile up, and what was due happens when it goes on.
"""

from collections import deque
from collections.abc import Iterable
from functools import partial
from random import Random
from typing import Any, Protocol

from msgspec import structs

from engine.core.ownership import BlockState
from kv_transfer.core.events import Blocks as PoolBlocks
from kv_transfer.core.events import Pool
from messages.common import KVEndpoint, WorkerAddress
from messages.gateway_to_router import GatewayDied
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.router_to_gateway import WorkerLost
from messages.router_to_worker import PeerLost
from messages.worker_to_router import Register, WorkerDied
from router.core.drains import Drain, Flip, Refused, Undrain
from router.core.machine import Router, RouterSettings, Tick
from runtime.core.actions import Send, WakeAt
from simulator.clock import Alarm, Call, Clock
from simulator.history import (
    Blocks,
    DeclaredLost,
    History,
    Incarnation,
    Ledger,
    LedgerEntry,
    Owner,
    Read,
    Started,
    Wrote,
)
from simulator.model import BLOCK, Truth
from simulator.network import Network
from simulator.rank import Landing, Rank
from simulator.worker import MAX_NUM_SEQS, Worker, WorkerShape

TURN = 0.0001
"""Seconds from a message to the turn of the loop that takes it."""
LAYER = 0.004
"""Seconds that a layer takes, and then each token of the step: """
TOKEN = 0.0005
THREAD = 0.0002
"""Seconds that a transport's thread, or a digest, takes at a time; a push for each block besides: """
BLOCK_COPY = 0.0003
DIES_SLOWLY = 0.3
"""Seconds for which the other ranks of a worker whose rank 0 was killed go on."""
NEVER = float("inf")
SLACK = 1e-9
"""Seconds by which everything comes late, so that nothing comes early by the rounding between two clocks."""


class Surface(Protocol):
    """What a process sees of the world."""

    clock: Clock
    network: Network
    history: History
    rng: Random
    truth: Truth
    one_sided: bool
    pace: float
    """Times as long as else for a step."""
    ranks: dict[str, Rank]
    """By where they say that they are; those whose process is there."""

    def worker(self, name: str) -> "WorkerProcess | None":
        """The process of that name, if it is there."""

    def tell(self, record: Any) -> None: ...


class Process:
    """``address``: where it listens."""

    def __init__(self, world: Surface, name: str, epoch: Epoch, address: Address, origin: float) -> None:
        """``origin``: what its own clock shows when the run begins."""
        self.world, self.name, self.epoch, self.address = world, name, epoch, address
        self.incarnation = Incarnation(name, epoch)
        self.alive, self.frozen = True, False
        self._origin = origin
        self._deferred: list[Call] = []
        self._wake: Alarm | None = None
        world.network.bind(address, self)

    @property
    def now(self) -> float:
        """By its own clock."""
        return self._origin + self.world.clock.now

    def after(self, delay: float, call: Call) -> Alarm:
        clock = self.world.clock
        return clock.at(clock.now + delay + SLACK, partial(self._happen, call))

    def _happen(self, call: Call) -> None:
        if self.frozen:
            self._deferred.append(call)
        elif self.alive:
            call()

    def wake_at(self, time: float, call: Call) -> None:
        """Have ``call`` happen at ``time`` of its own clock; what was asked for before is forgotten."""
        if self._wake is not None:
            self._wake.off()
        self._wake = None if time == NEVER else self.after(time - self.now, call)

    def deliver(self, message: Any) -> None:
        self._happen(partial(self.hear, message))

    def hear(self, message: Any) -> None:
        raise NotImplementedError

    def land(self, landing: Landing) -> None:
        raise NotImplementedError

    def send(self, to: Address, message: Any) -> None:
        self.world.network.send(self.name, to, message)

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False
        deferred, self._deferred = self._deferred, []
        for call in deferred:
            self._happen(call)

    def die(self, *, comes_back: bool = False) -> None:
        """``comes_back``: another process will listen at the same address."""
        self.alive = False
        self._deferred.clear()
        self.world.network.unbind(self.address, comes_back=comes_back)


class RouterProcess(Process):
    def __init__(
        self, world: Surface, name: str, epoch: Epoch, address: Address, origin: float, settings: RouterSettings
    ) -> None:
        super().__init__(world, name, epoch, address, origin)
        self.router = Router(settings, epoch)
        self._told: set[tuple[str, Epoch]] = set()

    def hear(self, message: Any) -> None:
        if isinstance(message, Register):
            self._told.discard((message.address.worker, message.address.epoch))  # it may get lost once more
        self.perform(self.router.handle(message, self.now))

    def worker_died(self, worker: WorkerId, epoch: Epoch, detail: str) -> None:
        """The supervisor's word, which comes by a call."""
        self._happen(partial(self.hear, WorkerDied(worker=worker, epoch=epoch, detail=detail)))

    def gateway_died(self, gateway: Address, detail: str) -> None:
        """The same of a gateway."""
        self._happen(partial(self.hear, GatewayDied(gateway=gateway, detail=detail)))

    def obey(self, order: Drain | Undrain | Flip) -> bool:
        """An operator's order; whether it is not refused."""
        try:
            self.hear(order)
        except Refused:
            return False
        return True

    def is_drained(self, worker: Incarnation) -> bool:
        """Whether it says that nothing is left there."""
        try:
            known = self.router.standing(WorkerId(worker.name))
        except Refused:  # it is a new router, which has not heard of it yet
            return False
        return bool(known["drained"]) and known["epoch"] == worker.epoch

    def perform(self, actions: Iterable[Any]) -> None:
        for action in actions:
            match action:
                case Send(to, message):
                    if isinstance(message, WorkerLost):
                        self._declared(message.worker, message.epoch, message.detail)
                    elif isinstance(message, PeerLost):
                        self._declared(message.peer.worker, message.peer.epoch, message.detail)
                    self.send(to, message)
                case WakeAt(time):
                    if self._wake is None or self._wake.call is None or time < self._wake.time + self._origin:
                        self.wake_at(time, self._tick)

    def _tick(self) -> None:
        self._wake = None
        self.perform(self.router.handle(Tick(), self.now))

    def _declared(self, worker: str, epoch: Epoch, detail: str) -> None:
        if (worker, epoch) not in self._told:
            self._told.add((worker, epoch))
            self.world.tell(DeclaredLost(self.world.clock.now, Incarnation(worker, epoch), detail))

    def look(self) -> Ledger:
        """What it counts as placed."""
        entries = [
            LedgerEntry(request, entry.attempt, tuple(each.worker for each in (entry.prefill, entry.decode) if each))
            for request, entry in self.router._ledger._entries.items()
        ]
        return Ledger(self.world.clock.now, self.incarnation, tuple(entries))


class WorkerProcess(Process):
    """Rank 0 and the others; it is the ``Surroundings`` of its worker."""

    def __init__(
        self, world: Surface, name: str, epoch: Epoch, address: Address, origin: float, shape: WorkerShape, number: int
    ) -> None:
        """``number``: of this process among those of its name."""
        super().__init__(world, name, epoch, address, origin)
        self.truth, self.one_sided = world.truth, world.one_sided
        self.role = shape.role
        """As it registers."""
        self.failing = 0.0
        """How likely a step is to fail now."""
        self.worker = Worker(self, WorkerId(name), shape, epoch=epoch, mailbox=address, incarnation=number)
        self._filled: list[PoolBlocks] = []
        """Blocks that are somebody else's, who is none of this worker's."""
        self._inbox: deque[Any] = deque()
        self._turning: Alarm | None = None
        self._busy: dict[int, bool] = {}
        self._ends = {rank.number: NEVER for rank in self.worker.ranks}
        """When the process of a rank is gone; virtual time."""
        for rank in self.worker.ranks:
            world.ranks[self._place(rank.number)] = rank
        self.worker.perform([self.worker.machine.membership.register()])
        self.soon()

    def _place(self, rank: int) -> str:
        return f"{self.name}/{self.epoch}/{rank}"

    def send(self, to: Address, message: Any) -> None:
        if isinstance(message, Register) and message.role is not self.role:
            self.role = message.role
            self.tell_started()
        super().send(to, message)

    def tell_started(self) -> None:
        """For the history: it is ready, in the role that it has now."""
        shape = self.worker.shape
        sizes = (shape.num_blocks, BLOCK, MAX_NUM_SEQS)
        self.world.tell(Started(self.world.clock.now, self.incarnation, "worker", self.role, *sizes))

    # Its loop

    def hear(self, message: Any) -> None:
        self._inbox.append(message)
        self.soon()

    def soon(self) -> None:
        """A turn of the loop, unless a step runs."""
        if self.worker.plan is None and self._turning is None:
            self._turning = self.after(TURN, self.turn)

    def turn(self) -> None:
        """Take what has come; begin a step where there is something to compute."""
        self._turning = None
        worker, inbox = self.worker, self._inbox
        while inbox:
            worker.take(inbox.popleft())
        worker.turn()
        self.threads()
        if worker.plan is not None:
            self._next_layer()
        elif worker.inbox:  # a rank has answered at once
            self.soon()
        else:
            self.wake_at(worker.machine.wake_at, self.turn)

    def _next_layer(self) -> None:
        plan = self.worker.plan
        assert plan is not None
        self.after(self.world.pace * (LAYER + TOKEN * int(plan.num_tokens.sum())), self._layer)

    def _layer(self) -> None:
        worker, inbox = self.worker, self._inbox
        while inbox and worker.takes:
            worker.take(inbox.popleft())
        worker.turn()
        self.threads()
        if worker.plan is None:
            self.turn()
        else:
            self._next_layer()

    def threads(self) -> None:
        """Have the ranks' threads go on that have something to do."""
        for rank in self.worker.ranks:
            if not self._busy.get(rank.number) and rank.ways:
                self._busy[rank.number] = True
                delay = THREAD
                if rank.jobs:
                    target = rank.jobs[0].to.address.partition("/")[0]
                    slowness = self.world.network.weather(self.name, target).slowness
                    if slowness > 1:
                        self.world.network.strikes("slowness", self.name, target)
                    delay += BLOCK_COPY * slowness
                self.world.clock.at(self.world.clock.now + delay, partial(self._thread, rank))

    def _thread(self, rank: Rank) -> None:
        if self.frozen:
            self._deferred.append(partial(self._thread, rank))
            return
        self._busy[rank.number] = False
        if self.world.clock.now >= self._ends[rank.number]:
            return
        ways = rank.ways
        if ways:
            ways[self.world.rng.randrange(len(ways)) if len(ways) > 1 else 0]()
        if self.alive and self.worker.inbox:
            self.soon()
        self.threads()

    # What its worker sees

    def send_data(self, landing: Landing) -> None:
        name = landing.to.address.partition("/")[0]
        self.world.network.send_data(self.name, name, partial(self._receiver, landing.to), landing)

    def _receiver(self, to: KVEndpoint) -> "WorkerProcess | None":
        name, epoch, _ = to.address.split("/")
        process = self.world.worker(name)
        return process if process is not None and process.epoch == int(epoch) else None

    def land(self, landing: Landing) -> None:
        self._happen(partial(self._land, landing))

    def _land(self, landing: Landing) -> None:
        rank = self.world.ranks.get(landing.to.address)
        if rank is not None:
            rank.land(landing.key, landing.heads, landing.layers, landing.first, landing.rows)
            self.soon()

    def rank_at(self, endpoint: KVEndpoint) -> Rank | None:
        return self.world.ranks.get(endpoint.address)

    def named(self, address: WorkerAddress) -> Worker | None:
        process = self.world.worker(address.worker)
        return process.worker if process is not None and process.epoch == address.epoch else None

    def gone(self, endpoint: KVEndpoint) -> bool:
        return endpoint.address not in self.world.ranks

    def spoil(self, to: KVEndpoint, pool: Pool, rows: Any) -> None:
        target, network, rng = to.address.partition("/")[0], self.world.network, self.world.rng
        weather, places = network.weather(self.name, target), rows.tolist()
        if weather.flip and rng.random() < weather.flip:
            network.strikes("flip", self.name, target)
            pool[rng.choice(places), rng.randrange(pool.shape[1])] ^= 1 << rng.randrange(8)
        if weather.stale and rng.random() < weather.stale:
            network.strikes("stale", self.name, target)
            pool[rng.choice(places)] = 0x55
        if weather.swap and len(places) > 1 and rng.random() < weather.swap:
            network.strikes("swap", self.name, target)
            one, other = rng.sample(places, 2)
            pool[[one, other]] = pool[[other, one]]

    def step_fails(self) -> bool:
        fails = self.failing > 0 and self.world.rng.random() < self.failing
        if fails:
            self.world.network.strikes("fail", "", self.name)
        return fails

    def judge(self, record: Read | Wrote) -> None:
        self.world.tell(structs.replace(record, at=self.world.clock.now))

    def blocks_at_once(self) -> int:
        return self.world.rng.randint(1, 4)

    def fill(self, part: float) -> bool:
        """Have somebody take ``part`` of the blocks that are to be had; whether there were any."""
        pool = self.worker.blocks
        blocks = pool.allocate(int(pool.num_free * part))
        if blocks is None or not len(blocks):
            return False
        self._filled.append(blocks)
        return True

    def empty(self) -> None:
        """All of these are free again."""
        filled, self._filled = self._filled, []
        for blocks in filled:
            self.worker.blocks.free(blocks)
        if filled:
            self.soon()

    # Its end

    def leave(self) -> None:
        """It was told to stop, and says good-bye."""
        self.worker.perform(self.worker.machine.leave(self.now))
        self._end(0.0)

    def die(self, *, comes_back: bool = False) -> None:
        """Rank 0 is gone at once; the others may write for a moment yet."""
        worker = self.worker
        self.empty()
        if worker.plan is None:  # what a step copies is held for it besides
            worker.machine.check_integrity()
        for rank in worker.ranks[1:]:
            while rank.commands:  # what it had been told it goes on with
                rank.perform(rank.commands.popleft())
        self._end(DIES_SLOWLY)

    def _end(self, lingers: float) -> None:
        super().die()
        clock = self.world.clock
        for rank in self.worker.ranks:
            self._ends[rank.number] = clock.now + (lingers if rank.number else 0.0)
            clock.at(self._ends[rank.number], partial(self._rank_ends, rank.number))
        self.threads()

    def _rank_ends(self, rank: int) -> None:
        del self.world.ranks[self._place(rank)]

    # What is looked at

    def look(self) -> Blocks:
        """Its pool, and who holds what."""
        counts = self.worker.blocks.counts()
        now = self.world.clock.now
        return Blocks(now, self.incarnation, counts.free, counts.held, counts.cached, counts.total, self._owners())

    def _owners(self) -> tuple[Owner, ...]:
        worker, owners = self.worker, []
        for leg in worker.machine.prefill._legs.values():
            if not leg.opened:
                owners.append(Owner(leg.order.request, leg.order.attempt, len(leg.seq.block_table)))
        for key, handoff in worker.handoffs._open.items():
            owners.append(Owner(*key, len(handoff.seq.block_table)))
        for request, run in worker.machine.decode._runs.items():
            owners.append(Owner(request, run.attempt, len(run.seq.block_table)))
        for key, each in worker.reservations._open.items():
            owners.append(Owner(*key, each.num_blocks, each.blocks_are is BlockState.QUARANTINED))
        if worker.plan is not None and len(worker.plan.moves.copies):  # nobody may have them before they are copied
            owners.append(Owner(RequestId("of the step"), Attempt(0), len(worker.plan.moves.copies)))
        if self._filled:
            owners.append(Owner(RequestId("of somebody else"), Attempt(0), sum(map(len, self._filled))))
        return tuple(owner for owner in owners if owner.num_blocks)

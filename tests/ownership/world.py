"""A prefill and two decode workers whose processes, links, clocks and memories do what a schedule says.

The machines, their pools, fan-outs, landings, lane copies and digests are the real ones; sockets, threads, clock and
model are not. KV is a function of a token, its prefix and its head, so whoever reads a block can tell whether it is
right. The world looks at every write and at every read:

- a write lands only in blocks that the receiver's pool calls landing, promised again or quarantined;
- what a writer could still write into is none of them free, cached or held;
- a sequence reads its own KV and nothing else, from its first step on.
"""

from collections import deque
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, NamedTuple

import numpy as np

from kv_transfer.core.events import Pool, TransferKey
from messages.codec import pack_tokens, unpack_tokens
from messages.common import Generation, KVEndpoint, Role, WorkerAddress
from messages.gateway_to_worker import Abort, EndAck, Prefill
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.router_to_worker import PeerLost
from messages.sampling import SamplingParams
from messages.seals import seal
from messages.tickets import mint
from messages.worker_to_gateway import AttemptFailed, TokenBatch
from runtime.core.disaggregation import Disaggregation, Policy
from simulator.history import Read, Wrote
from simulator.model import VOCABULARY, Truth
from simulator.rank import Landing, Rank
from simulator.worker import KEY, Worker, WorkerShape

ROUTER, GATEWAY = Address("tcp://router"), Address("tcp://gateway")
NUM_BLOCKS = {"prefill": 24, "decode": 14}
NEVER = float("inf")


class Faults(NamedTuple):
    """Which kinds a schedule has; a probability each where it is not a switch."""

    loss: float = 0.0
    corrupt: float = 0.0
    reorder: bool = False
    deaths: bool = False
    aborts: bool = False
    silence: bool = False
    step: bool = False
    offers: bool = False
    """No fault: decode offers to compute every prompt itself."""


@dataclass(slots=True)
class Request:
    """What its client sees."""

    request: RequestId
    prompt: tuple[int, ...]
    max_tokens: int
    attempt: int = 0
    tokens: list[int] = field(default_factory=list)
    over: bool = False
    pair: tuple[str, str] = ("", "")


class World:
    def __init__(self, seed: int, faults: Faults, *, one_sided: bool, prefill_ranks: int, decode_ranks: int) -> None:
        self.rng = Random(seed)
        self.faults, self.one_sided = faults, one_sided
        self.now = 0.0
        self.truth = Truth()
        self.degrees = {"prefill": prefill_ranks, "decode": decode_ranks}
        self.epochs = 0
        self.workers: dict[str, Worker] = {}
        self.remains: list[Rank] = []
        """Ranks that outlive the first of their worker that died."""
        for name in ("prefill-0", "decode-0", "decode-1"):
            self.start(name)
        self.links: dict[Address, deque[Any]] = {}
        self.data: deque[Landing] = deque()
        self.late: deque[Landing] = deque()
        """Data that has found another, slower way."""
        self.news: deque[PeerLost] = deque()
        self.requests: dict[RequestId, Request] = {}
        self.acked = self.corrupted = self.deaths = 0

    # Processes

    def start(self, name: str) -> None:
        self.epochs += 1
        role = name.partition("-")[0]
        shape = WorkerShape(
            role=Role(role),
            num_blocks=NUM_BLOCKS[role],
            router=ROUTER,
            ranks=self.degrees[role],
            rule=Disaggregation(policy=Policy.NEVER if self.faults.offers else Policy.ALWAYS),
        )
        mailbox = Address(f"tcp://{name}")
        self.workers[name] = Worker(self, WorkerId(name), shape, epoch=Epoch(self.epochs), mailbox=mailbox)

    def named(self, address: WorkerAddress) -> Worker | None:
        worker = self.workers[address.worker]
        return worker if worker.address.epoch == address.epoch else None

    def rank_at(self, endpoint: KVEndpoint) -> Rank | None:
        name, epoch, rank = endpoint.address.split("/")
        worker = self.workers[name]
        return worker.ranks[int(rank)] if worker.address.epoch == int(epoch) else None

    def gone(self, endpoint: KVEndpoint) -> bool:
        name, epoch, number = endpoint.address.split("/")
        ranks = [*self.workers[name].ranks, *self.remains]
        return not any(
            rank.worker.name == name and rank.worker.address.epoch == int(epoch) and rank.number == int(number)
            for rank in ranks
        )

    def die(self, name: str) -> None:
        """Rank 0 dies; the others are still there for a moment. Another process takes its name."""
        self.deaths += 1
        old = self.workers[name]
        if old.plan is None:  # what a step copies is held for it besides
            old.machine.check_integrity()
        self.remains += old.ranks[1:]
        for rank in old.ranks[1:]:
            while rank.commands:  # what it had been told it goes on with
                rank.perform(rank.commands.popleft())
        self.links.pop(old.address.mailbox, None)
        self.start(name)
        lost = seal(KEY, PeerLost(peer=old.address, dead=True, detail="killed"))
        self.news.append(lost)
        for request in self.requests.values():
            if not request.over and name in request.pair:
                self.place(request)

    def tell(self, lost: PeerLost) -> None:
        for worker in self.workers.values():
            if worker.address != lost.peer:
                self.links.setdefault(worker.address.mailbox, deque()).append(lost)

    # Links

    def send(self, to: Address, message: Any) -> None:
        if to == GATEWAY:
            self.hear(message)
        elif to != ROUTER:
            for _ in range(self.times()):
                self.links.setdefault(to, deque()).append(message)

    def send_data(self, landing: Landing) -> None:
        for _ in range(self.times()):
            (self.late if self.faults.reorder and self.rng.random() < 0.2 else self.data).append(landing)

    def times(self) -> int:
        """How often what is sent arrives."""
        chance = self.rng.random()
        return 0 if chance < self.faults.loss else 2 if chance < 1.5 * self.faults.loss else 1

    def spoil(self, _to: KVEndpoint, pool: Pool, rows: Any) -> None:
        if self.faults.corrupt and self.rng.random() < self.faults.corrupt:
            self.corrupted += 1
            pool[self.rng.choice(rows.tolist()), self.rng.randrange(pool.shape[1])] ^= 1 << self.rng.randrange(8)

    def step_fails(self) -> bool:
        return self.faults.step and self.rng.random() < 0.05

    def blocks_at_once(self) -> int:
        return self.rng.randint(1, 3)

    def judge(self, record: Read | Wrote) -> None:
        if isinstance(record, Read):
            assert record.verified and record.found == record.wanted, f"a sequence reads wrong KV on a worker: {record}"
            return
        own = (record.request, record.attempt)
        if any(owner != own for owner in record.owners):
            worker = next(rank.worker for rank in self.ranks() if rank.worker.incarnation == record.worker)
            worker.check_writable(TransferKey(*own), np.array(record.blocks), again=not self.one_sided)

    def ranks(self) -> list[Rank]:
        return [*self.remains, *(rank for worker in self.workers.values() for rank in worker.ranks)]

    def taken(self, queue: deque[Any]) -> Any:
        if self.faults.reorder and len(queue) > 1:
            queue.rotate(-self.rng.randrange(len(queue)))
        return queue.popleft()

    # The gateway

    def ask(self) -> None:
        rng = self.rng
        length, common = rng.randint(1, 22), rng.randrange(2)
        own = rng.randint(0, length)
        prompt = tuple((common + 3 * place) % VOCABULARY for place in range(own))
        prompt += tuple(rng.randrange(VOCABULARY) for _ in range(length - own))
        request = Request(RequestId(f"{len(self.requests):032x}"), prompt, rng.randint(2, 3))
        self.requests[request.request] = request
        self.place(request)

    def place(self, request: Request, on: str = "") -> None:
        """A new attempt, on any decode worker or ``on`` this one; the workers of the last one hear of it from the new
        one, or not at all."""
        if request.attempt and self.rng.random() < 0.5:
            self.abort(request)
        request.attempt += 1
        decode = self.workers[on or self.rng.choice(("decode-0", "decode-1"))]
        prefill = self.workers["prefill-0"]
        request.pair = (prefill.name, decode.name)
        key = (request.request, Attempt(request.attempt))
        params = SamplingParams(max_tokens=request.max_tokens, temperature=0, ignore_eos=True)
        generation = Generation(pack_tokens(request.prompt), params, pack_tokens(request.tokens))
        ticket = mint(KEY, *key, prefill.address, decode.address)
        self.links.setdefault(prefill.address.mailbox, deque()).append(
            Prefill(*key, GATEWAY, generation, decode.address, ticket)
        )

    def abort(self, request: Request) -> None:
        for name in request.pair:
            self.send(self.workers[name].address.mailbox, Abort(request.request, Attempt(request.attempt)))

    def hear(self, message: Any) -> None:
        if isinstance(message, AttemptFailed):
            request = self.requests[message.request]
            if not request.over and message.attempt == request.attempt:
                self.place(request)
        elif isinstance(message, TokenBatch):
            for chunk in message.chunks:
                request = self.requests[chunk.request]
                if chunk.attempt == request.attempt and not request.over:
                    fresh = unpack_tokens(chunk.tokens).tolist()[len(request.tokens) - chunk.index :]
                    if len(request.tokens) >= chunk.index:
                        request.tokens += fresh
                    true = self.truth.answer(request.prompt, len(request.tokens))
                    assert request.tokens == true, f"{request} has got a wrong token"
                    request.over = chunk.finish is not None and len(request.tokens) == request.max_tokens
                if chunk.finish is not None:
                    self.acked += 1
                    ack = EndAck(chunk.request, chunk.attempt)
                    self.links.setdefault(self.workers[message.worker].address.mailbox, deque()).append(ack)

    # What happens

    def happen(self, number: int) -> None:
        """One of all the things that can: which, ``number`` says."""
        rng = self.rng
        rng.seed(number)  # so one that is left out of a schedule leaves the others what they were
        chance = rng.random()
        if chance < 0.03 and len(self.requests) < 3:
            self.ask()
        elif chance < 0.06:
            self.now += rng.choice((0.3, 0.6, 6.0))
        elif chance < 0.11:
            self.misfortune()
        elif chance < 0.35:
            rng.choice([*self.workers.values()]).turn()
        else:
            self.flow()
        for worker in self.workers.values():
            worker.check()

    def misfortune(self) -> None:
        """One of those that the schedule has."""
        rng, faults = self.rng, self.faults
        running = [request for request in self.requests.values() if not request.over]
        kinds = ["late"] + ["death"] * 2 * faults.deaths + ["silence"] * faults.silence
        kinds += ["abort", "again", "again"] * (faults.aborts and bool(running))
        match rng.choice(kinds):
            case "late":
                self.now += rng.choice((11.0, 130.0))
            case "death":
                self.die(rng.choice([*self.workers]))
            case "silence":
                peer = rng.choice([*self.workers.values()]).address
                self.tell(seal(KEY, PeerLost(peer=peer, dead=False, detail="silent")))
            case "abort":
                request = rng.choice(running)
                request.over = True
                self.abort(request)
            case "again":
                self.place(rng.choice(running))

    def flow(self) -> bool:
        """Something on its way gets a step further; False where nothing is."""
        ways: list[Any] = []
        for worker in self.workers.values():
            ways += [partial(self.arrive, worker)] if worker.takes and self.links.get(worker.address.mailbox) else []
            ways += [worker.hear] if worker.plan is None and worker.inbox else []
            for rank in worker.ranks:
                ways += rank.ways
        ways += [partial(self.arrive_data, self.data)] if self.data else []
        if self.late and (not ways or self.rng.random() < 0.05):
            ways = [partial(self.arrive_data, self.late)]
        ways += [self.bring_news] if self.news else []
        if self.remains and (not ways or self.rng.random() < 0.05):  # they die slowly
            ways = [self.end_remains, *(way for rank in self.remains for way in rank.ways)]
        if not ways:
            return False
        self.rng.choice(ways)()
        return True

    def bring_news(self) -> None:
        self.tell(self.news.popleft())

    def end_remains(self) -> None:
        self.remains.pop(self.rng.randrange(len(self.remains)))

    def arrive(self, worker: Worker) -> None:
        worker.take(self.taken(self.links[worker.address.mailbox]))

    def arrive_data(self, data: deque[Landing]) -> None:
        key, to, *landing = self.taken(data)
        rank = self.rank_at(to)
        if rank is not None:
            rank.land(key, *landing)

    # The end

    def settle(self) -> None:
        """No more faults: everything ends, everyone is answered, and nothing is held."""
        self.faults = Faults(reorder=self.faults.reorder, offers=self.faults.offers)
        for _ in range(4000):
            busy = False
            for worker in self.workers.values():
                while self.flow():
                    busy = True
                busy |= worker.plan is not None
                worker.turn()
                busy |= worker.plan is not None
                worker.check()
            if not busy and not self.flow() and not self.settled_or_waits():
                return
        raise AssertionError(f"nothing settles: {[worker.machine.inspect() for worker in self.workers.values()]}")

    def settled_or_waits(self) -> bool:
        """Let time pass where somebody waits for it; False where nobody does."""
        wake = min(worker.machine._deliveries.wake_at for worker in self.workers.values())
        for worker in self.workers.values():
            wake = min(wake, worker.handoffs.wake_at, worker.reservations.wake_at)
        if wake < NEVER:
            self.now = max(self.now, wake)
            return True
        waiting = [request for request in self.requests.values() if not request.over]
        for request in waiting:
            self.place(request)
        return bool(waiting)

    def check_settled(self) -> None:
        for request in self.requests.values():
            assert request.over, request
        for worker in self.workers.values():
            worker.machine.check_integrity()
            seen = worker.machine.inspect()
            left = {what: seen.get(what, 0) for what in ("held", "legs", "handoffs", "runs", "reservations")}
            assert not any(left.values()), f"{worker.name} has not let go of {left}"
            assert worker.fanout.idle, f"the ranks of {worker.name} are waited for"
            assert not any(rank.landings._open or rank.jobs for rank in worker.ranks), "somebody could still write"

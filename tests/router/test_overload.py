"""Promise: overload is queued, then turned away before the first token; what was accepted is computed once, to its end.

Sessions, router, a prefill and a decode worker are the real cores; the network, the steps and the clock are simulated.
"""

import heapq
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from decode_worker.core.reservation import Reservations
from engine.core.blocks import BlockPool
from engine.core.outputs import StepOutput
from engine.core.scheduler import Scheduler, SchedulerLimits
from gateway.core import session as gateway
from gateway.core.errors import Overloaded
from kv_transfer.core import session as transfer
from kv_transfer.core.digest import DIGEST_BYTES
from kv_transfer.core.events import Cancelled, Landed, Pushed
from messages.codec import pack_tokens
from messages.common import KVRank, KVWay, Role, WorkerAddress
from messages.ids import Address, Epoch, RequestId, WorkerId
from messages.sampling import SamplingParams
from messages.worker_to_gateway import TokenBatch
from prefill_worker.core.handoff import Handoffs
from router.core import machine as router
from runtime.core.actions import Send, WakeAt
from runtime.core.shared import WorkerSettings
from tests.kv_transfer.kv_pair import shard_of_bytes
from worker.core.machine import WorkerMachine

KEY = bytes(32)
ROUTER, GATEWAY = Address("R"), Address("G")
SHARD = shard_of_bytes(64)
PREFILL = WorkerAddress(WorkerId("p0"), Epoch(1), Address("P"))
DECODE = WorkerAddress(WorkerId("d0"), Epoch(2), Address("D"), (KVRank(SHARD, 4096, "h", (KVWay("zmq", "tcp://d"),)),))
SOURCE = (KVRank(SHARD, 4096, "h", (KVWay("zmq"),)),)
BLOCK = 16
LINK = 0.0005
"""Seconds that a message, or a transport's answer, takes."""
STEP = 0.03
"""Seconds that a step takes."""
IDLE = 0.005
"""Seconds after which a worker without work looks again."""
PROMPT = 100


class Simulation:
    """One pair of workers, one router, one gateway. Events are performed in the order of their time."""

    def __init__(self, *, slots: int, blocks: int = 4096, **settings: Any) -> None:
        self.now = 0.0
        self.prefilled_tokens = 0
        self.ended: dict[RequestId, gateway.Ended | gateway.Failed] = {}
        self.sessions: dict[RequestId, gateway.Session] = {}
        self.most_placed = 0
        self._events: list[tuple[float, int, Any]] = []
        self._order = itertools.count()
        self.router = router.Router(router.RouterSettings(cluster_key=KEY, block_size=BLOCK, **settings))
        limits = SchedulerLimits(max_num_seqs=slots, max_num_batched_tokens=2048, max_model_len=4096, prefill_chunk=512)
        common: dict[str, Any] = {
            "router": ROUTER, "cluster_key": KEY, "max_num_seqs": slots, "max_model_len": 4096,
            "vocab_size": 2048, "block_bytes": 1,
        }  # fmt: skip
        pool, self.decode_pool = BlockPool(4096, BLOCK), BlockPool(blocks, BLOCK)
        timeouts = transfer.TransferTimeouts()
        self.prefill = WorkerMachine(
            WorkerSettings(address=PREFILL, role=Role.PREFILL, **common),
            Scheduler(pool, limits, frozenset()), pool, Handoffs(PREFILL, SOURCE, pool, timeouts),
            Reservations(PREFILL.mailbox, SOURCE, pool, timeouts=timeouts),
        )  # fmt: skip
        self.decode = WorkerMachine(
            WorkerSettings(
                address=DECODE, role=Role.DECODE, **common
            ),
            Scheduler(self.decode_pool, limits, frozenset()), self.decode_pool,
            Handoffs(DECODE, DECODE.kv, self.decode_pool, timeouts),
            Reservations(DECODE.mailbox, DECODE.kv, self.decode_pool, timeouts=timeouts),
        )  # fmt: skip
        self._machines: dict[str, WorkerMachine] = {"P": self.prefill, "D": self.decode}
        for name, machine in self._machines.items():
            self._perform(name, [machine.membership.register()])
            self._at(0.0, lambda name=name: self._loop(name))

    def ask(self, count: int, max_tokens: int) -> list[RequestId]:
        """As many requests, at once, when the workers are known."""
        requests = [RequestId(f"{number:032x}") for number in range(len(self.sessions), len(self.sessions) + count)]
        for request in requests:
            session = gateway.Session(
                request, pack_tokens([int(request, 16) + 1] * PROMPT),
                SamplingParams(max_tokens=max_tokens, ignore_eos=True), gateway=GATEWAY, router=ROUTER, tenant="t",
                timeouts=gateway.SessionTimeouts(), max_attempts=4,
            )  # fmt: skip
            self.sessions[request] = session
            self._at(0.01, lambda session=session: self._perform(session.request, session.start(self.now)))
        return requests

    def run(self, until: float = 600.0) -> None:
        """Until every request has ended."""
        while len(self.ended) < len(self.sessions):
            self.now, _, event = heapq.heappop(self._events)
            assert self.now < until, f"{len(self.ended)} of {len(self.sessions)} ended in {until} s"
            event()
            self.most_placed = max(self.most_placed, self.router.inspect()["placed"])
        self.router.check_integrity()

    def _at(self, after: float, event: Any) -> None:
        heapq.heappush(self._events, (self.now + after, next(self._order), event))

    def _loop(self, name: str) -> None:
        machine = self._machines[name]
        self._perform(name, machine.tick(self.now))
        plan, actions = machine.schedule(self.now)
        self._perform(name, actions)
        if plan is None:
            self._at(IDLE, lambda: self._loop(name))
            return
        if name == "P":
            self.prefilled_tokens += int(plan.num_tokens.sum())

        def stepped() -> None:
            tokens = np.full(int(plan.samples.sum()), 5, np.int32)
            self._perform(name, machine.update(plan, StepOutput(tokens), self.now))
            self._loop(name)

        self._at(STEP, stepped)

    def _perform(self, source: str, actions: Iterable[Any]) -> None:
        for action in actions:
            match action:
                case Send(to, message):
                    self._at(LINK, lambda to=to, message=message: self._receive(to, message))
                case WakeAt(time):
                    self._at(max(0.0, time - self.now), lambda: self._wake(source))
                case transfer.Push():
                    indices = np.arange(action.first, action.first + len(action.source), dtype=np.int32)
                    self._answer("D", Landed(action.key, indices))
                    self._answer("P", Pushed(action.key, action.first, len(action.source)))
                case transfer.TakeDigests():
                    digests = bytes(DIGEST_BYTES * len(action.blocks))
                    self._answer(source, transfer.Digested(action.key, action.first, digests))
                case transfer.OpenLanding():
                    self._perform(source, self._machines[source].handle(transfer.LandingOpened(action.key), self.now))
                case transfer.CancelPushes():
                    self._answer(source, Cancelled(action.key))
                case gateway.Ended() | gateway.Failed():
                    assert source not in self.ended
                    self.ended[RequestId(source)] = action

    def _answer(self, name: str, event: Any) -> None:
        self._at(LINK, lambda: self._perform(name, self._machines[name].handle(event, self.now)))

    def _wake(self, name: str) -> None:
        if name in self.sessions:
            self._perform(name, self.sessions[RequestId(name)].handle(gateway.Tick(), self.now))
        else:
            self._perform(name, self.router.handle(router.Tick(), self.now))

    def _receive(self, to: Address, message: Any) -> None:
        if to in self._machines:
            self._perform(to, self._machines[to].handle(message, self.now))
        elif to == ROUTER:
            self._perform(to, self.router.handle(message, self.now))
        elif isinstance(message, TokenBatch):
            for chunk in message.chunks:
                event = gateway.Chunk(message.worker, chunk)
                self._perform(chunk.request, self.sessions[chunk.request].handle(event, self.now))
        else:
            self._perform(message.request, self.sessions[message.request].handle(message, self.now))


def test_four_times_as_many_requests_as_slots_all_end_complete_and_no_prompt_is_computed_twice() -> None:
    world = Simulation(slots=4)
    requests = world.ask(16, max_tokens=150)
    world.run()
    assert all(isinstance(end, gateway.Ended) for end in world.ended.values()), world.ended
    assert [world.sessions[request].num_generated for request in requests] == [150] * 16
    assert [world.sessions[request].attempt for request in requests] == [1] * 16
    assert world.prefilled_tokens == 16 * PROMPT
    assert world.most_placed == 4


def test_requests_for_more_memory_than_there_is_wait_for_it_and_none_is_computed_twice() -> None:
    """Slots for all of them, blocks for three."""
    world = Simulation(slots=16, blocks=3 * -(-(PROMPT + 150) // BLOCK))
    requests = world.ask(12, max_tokens=150)
    world.run()
    assert [world.sessions[request].num_generated for request in requests] == [150] * 12
    assert [world.sessions[request].attempt for request in requests] == [1] * 12
    assert world.prefilled_tokens == 12 * PROMPT
    assert world.most_placed == 3


def test_answers_of_minutes_in_front_turn_the_rest_away_in_time_and_without_a_token() -> None:
    """Steps of 30 ms and 3000 tokens: the second four would begin after 90 s."""
    world = Simulation(slots=4)
    requests = world.ask(8, max_tokens=3000)
    world.run()
    ends = [world.ended[request] for request in requests]
    assert [type(end) for end in ends] == [gateway.Ended] * 4 + [gateway.Failed] * 4
    assert [world.sessions[request].num_generated for request in requests] == [3000] * 4 + [0] * 4
    assert world.prefilled_tokens == 4 * PROMPT


def test_a_queue_beyond_its_limit_is_turned_away_before_any_token() -> None:
    world = Simulation(slots=4, max_waiting=6, retry_after=2.5)
    requests = world.ask(16, max_tokens=50)
    world.run()
    accepted, rejected = requests[:10], requests[10:]
    assert all(isinstance(world.ended[request], gateway.Ended) for request in accepted)
    assert [world.sessions[request].num_generated for request in accepted] == [50] * 10
    for request in rejected:
        end = world.ended[request]
        assert isinstance(end, gateway.Failed) and isinstance(end.error, Overloaded)
        assert (end.error.status, end.error.retry_after) == (429, 2.5)
        assert world.sessions[request].num_generated == 0
    assert world.prefilled_tokens == 10 * PROMPT

"""Sessions, router, prefill and decode workers: the real cores. The network, the steps and the clock are simulated, and
what happens to a process is up to the test."""

import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from decode_worker.core.reservation import Reservations
from engine.core.blocks import BlockPool
from engine.core.outputs import StepOutput
from engine.core.scheduler import Scheduler, SchedulerLimits
from gateway.core import session as gateway
from gateway.core.dispatch import Dispatch, Heard, Late
from kv_transfer.core import session as transfer
from kv_transfer.core.digest import DIGEST_BYTES
from kv_transfer.core.events import Cancelled, Landed, Pushed
from messages.codec import pack_tokens
from messages.common import KVRank, KVWay, Role, WorkerAddress
from messages.gateway_to_router import ClusterStateWanted, GatewayDied
from messages.ids import Address, Epoch, RequestId, WorkerId
from messages.router_to_gateway import ClusterState
from messages.sampling import SamplingParams
from messages.worker_to_router import WorkerDied
from prefill_worker.core.handoff import Handoffs
from router.core import machine as router
from runtime.core.actions import Send, WakeAt
from runtime.core.disaggregation import Disaggregation, Policy
from runtime.core.shared import WorkerSettings
from tests.kv_transfer.kv_pair import shard_of_bytes
from worker.core.machine import WorkerMachine

KEY = bytes(32)
ROUTER, GATEWAY = Address("R"), Address("G")
SHARD = shard_of_bytes(64)
BLOCK = 16
LINK = 0.0005
"""Seconds that a message, or a transport's answer, takes."""
STEP = 0.03
"""Seconds that a step takes."""
STATE_EVERY = 0.5
PROMPT = 100
TOLD_AFTER = 0.3
"""Seconds from a worker's death to its supervisor's word."""


class RelayWorld:
    """Events are performed in the order of their time. Workers are named p0, p1, ... and d0, d1, ..."""

    def __init__(
        self,
        *,
        prefill: int = 1,
        decode: int = 1,
        slots: int = 8,
        blocks: int = 4096,
        prefill_blocks: int = 4096,
        policy: Policy = Policy.AUTO,
        seed: int = 0,
        loss: float = 0.0,
        expected_output: int = 1024,
        **settings: Any,
    ) -> None:
        """``loss``: the part of all messages that do not arrive."""
        self.now = 0.0
        self.random = random.Random(seed)
        self.loss = loss
        self.prefilled_tokens = 0
        self.most_placed = 0
        self.ended: dict[RequestId, gateway.Ended | gateway.Failed] = {}
        self.ended_at: dict[RequestId, float] = {}
        self.sessions: dict[RequestId, gateway.Session] = {}
        self.came: dict[RequestId, list[float]] = {}
        """When each token came to the client."""
        self.step_seconds: dict[str, float] = {}
        """Of workers that are slower than others."""
        self.cut: set[tuple[str, str]] = set()
        """Directions in which nothing arrives."""
        self.frozen: dict[str, list[Callable[[], None]]] = {}
        """What waits until each of them goes on."""
        self.dead: set[str] = set()
        self.lost: list[tuple[float, str]] = []
        """When the gateway has heard that a worker is lost, and which."""
        self.late = 0
        """Chunks of requests that are over."""
        self._idle: dict[str, int] = {}
        self._events: list[tuple[float, int, Any]] = []
        self._order = itertools.count()
        self._epochs = itertools.count(1)
        disaggregation = Disaggregation(policy=policy)
        self._settings = router.RouterSettings(
            cluster_key=KEY, block_size=BLOCK, disaggregation=disaggregation, **settings
        )
        self.router = router.Router(self._settings, Epoch(next(self._epochs)))
        self._limits = SchedulerLimits(
            max_num_seqs=slots,
            max_num_batched_tokens=2048,
            max_model_len=4096,
            prefill_chunk=512,
            expected_output=expected_output,
        )
        self._common: dict[str, Any] = {
            "router": ROUTER, "cluster_key": KEY, "max_num_seqs": slots, "max_model_len": 4096, "vocab_size": 2048,
            "block_bytes": 1, "disaggregation": disaggregation,
        }  # fmt: skip
        self._blocks = {"p": prefill_blocks, "d": blocks}
        self.machines: dict[str, WorkerMachine] = {}
        self.pools: dict[str, BlockPool] = {}
        self._dispatch = Dispatch(GATEWAY, ROUTER)
        self._ask_for_state()
        self.names = (*(f"p{i}" for i in range(prefill)), *(f"d{i}" for i in range(decode)))
        for name in self.names:
            self.start(name)

    # What tests do

    def start(self, name: str) -> None:
        """A new process for the worker ``name``."""
        epoch = next(self._epochs)
        mailbox = f"{name}.{epoch}"
        kv = (KVRank(SHARD, 4096, "h", (KVWay("zmq", f"tcp://{mailbox}"),)),)
        pool = BlockPool(self._blocks[name[0]], BLOCK)
        timeouts = transfer.TransferTimeouts()
        address = WorkerAddress(WorkerId(name), Epoch(epoch), Address(mailbox), kv)
        role = Role.PREFILL if name[0] == "p" else Role.DECODE
        machine = WorkerMachine(
            WorkerSettings(address=address, role=role, incarnation=epoch, **self._common),
            Scheduler(pool, self._limits, frozenset()), pool, Handoffs(address, kv, pool, timeouts),
            Reservations(address.mailbox, kv, pool, timeouts=timeouts),
        )  # fmt: skip
        self.machines[mailbox], self.pools[mailbox] = machine, pool
        self._perform(mailbox, [machine.membership.register()])
        self.at(0.0, lambda: self._loop(mailbox))

    def mailbox(self, name: str) -> str:
        """Of the newest process of a worker; of the gateway or the router."""
        return (
            name if name in (GATEWAY, ROUTER) else next(m for m in reversed(self.machines) if m.split(".")[0] == name)
        )

    def pool(self, name: str) -> BlockPool:
        return self.pools[self.mailbox(name)]

    def kill(self, name: str, told_after: float | None = TOLD_AFTER) -> None:
        """SIGKILL; the supervisor's word comes a little later, or not at all."""
        mailbox = self.mailbox(name)
        self.dead.add(mailbox)
        if told_after is None:
            return
        event: Any = GatewayDied(gateway=GATEWAY, detail="killed")
        if name != GATEWAY:
            epoch = self.machines[mailbox].membership.address.epoch
            event = WorkerDied(worker=WorkerId(name), epoch=epoch, detail="killed")
        self.at(told_after, lambda: self._router_does(event))

    def freeze(self, name: str, seconds: float = float("inf")) -> None:
        """SIGSTOP, and SIGCONT so many seconds later."""
        mailbox = self.mailbox(name)
        self.frozen[mailbox] = []
        if seconds < float("inf"):
            self.at(seconds, lambda: self._thaw(mailbox))

    def restart_router(self, away: float = 0.5) -> None:
        """It is gone for so long; the new one knows nothing."""
        self.dead.add(ROUTER)

        def back() -> None:
            self.router = router.Router(self._settings, Epoch(next(self._epochs)))
            self.dead.discard(ROUTER)

        self.at(away, back)

    def ask(self, count: int, max_tokens: int, *, prompt: int = PROMPT, after: float = 0.01) -> list[RequestId]:
        """As many requests, at once, ``after`` so many seconds."""
        requests = [RequestId(f"{number:032x}") for number in range(len(self.sessions), len(self.sessions) + count)]
        for request in requests:
            session = gateway.Session(
                request, pack_tokens([int(request, 16) % 2000 + 1] * prompt),
                SamplingParams(max_tokens=max_tokens, ignore_eos=True), gateway=GATEWAY, router=ROUTER, tenant="t",
                timeouts=gateway.SessionTimeouts(), max_attempts=4,
            )  # fmt: skip
            self.sessions[request] = session
            self.came[request] = []
            self.at(after, lambda session=session: self._perform(session.request, session.start(self.now)))
        return requests

    def leave(self, request: RequestId) -> None:
        """Its client goes away."""
        self._perform(request, self.sessions[request].handle(gateway.ClientGone(), self.now))

    def run(self, until: float = 600.0) -> None:
        """Until every request has ended."""
        while len(self.ended) < len(self.sessions):
            assert self.now < until, f"{len(self.ended)} of {len(self.sessions)} ended in {until} s"
            self._next()
        self.router.check_integrity()

    def sleep(self, seconds: float) -> None:
        until = self.now + seconds
        while self._events and self._events[0][0] <= until:
            self._next()
        self.now = until
        self.router.check_integrity()

    def until(self, true: Callable[[], bool], within: float) -> float:
        """Seconds until something is so."""
        begun = self.now
        while not true():
            assert self.now - begun <= within, f"not within {within} s"
            self._next()
        return self.now - begun

    def decode_of(self, request: RequestId) -> str:
        """The decode worker that a request is, or was last, placed on."""
        placed = self.sessions[request].placed
        assert placed is not None, f"{request} is not placed"
        return placed.decode.worker

    def pauses(self, request: RequestId) -> float:
        """The longest time between two tokens of a stream."""
        came = self.came[request]
        return max((b - a for a, b in itertools.pairwise(came)), default=0.0)

    def held(self, name: str) -> int:
        """Blocks of a worker that have an owner."""
        counts = self.pool(name).counts()
        return counts.held

    # The world

    def at(self, after: float, event: Any) -> None:
        heapq.heappush(self._events, (self.now + after, next(self._order), event))

    def _next(self) -> None:
        self.now, _, event = heapq.heappop(self._events)
        event()
        self.most_placed = max(self.most_placed, self.router.inspect()["placed"])

    def _ask_for_state(self) -> None:
        if GATEWAY not in self.dead:
            self._perform(GATEWAY, [Send(ROUTER, ClusterStateWanted(gateway=GATEWAY))])
            self.at(STATE_EVERY, lambda: self._when_thawed(GATEWAY, self._ask_for_state))

    def _when_thawed(self, process: str, event: Callable[[], None]) -> None:
        """Now, or when ``process`` is not stopped any more; never if it is dead."""
        if process in self.frozen:
            self.frozen[process].append(event)
        elif process not in self.dead:
            event()

    def _thaw(self, process: str) -> None:
        for event in self.frozen.pop(process):
            self._when_thawed(process, event)

    def _loop(self, name: str) -> None:
        machine = self.machines[name]
        self._perform(name, machine.tick(self.now))
        plan, actions = machine.schedule(self.now)
        self._perform(name, actions)
        if plan is None:
            self._idle[name] = number = next(self._order)
            self.at(
                max(0.0, machine.wake_at - self.now), lambda: self._when_thawed(name, lambda: self._go_on(name, number))
            )
            return
        if name[0] == "p":
            self.prefilled_tokens += int(plan.num_tokens.sum())

        def stepped() -> None:
            tokens = np.full(int(plan.samples.sum()), 5, np.int32)
            self._perform(name, machine.update(plan, StepOutput(tokens), self.now))
            self._when_thawed(name, lambda: self._loop(name))

        seconds = self.step_seconds.get(name.split(".")[0], STEP)
        self.at(seconds, lambda: self._when_thawed(name, stepped))

    def _go_on(self, name: str, number: int | None = None) -> None:
        """Something has come for an idle worker; or it is time, if nothing has since."""
        if name in self._idle and number in (None, self._idle[name]):
            del self._idle[name]
            self._loop(name)

    def _tell(self, name: str, event: Any) -> None:
        self._perform(name, self.machines[name].handle(event, self.now))
        self._go_on(name)

    def _perform(self, source: str, actions: Iterable[Any]) -> None:
        for action in actions:
            match action:
                case Send(to, message):
                    self._send(source, to, message)
                case WakeAt(time):
                    self.at(max(0.0, time - self.now), lambda: self._wake(source))
                case transfer.Push():
                    peer = action.route.to[0].address.removeprefix("tcp://")
                    indices = np.arange(action.first, action.first + len(action.source), dtype=np.int32)
                    self._answer(source, peer, Landed(action.key, indices))
                    self._answer(source, source, Pushed(action.key, action.first, len(action.source)))
                case transfer.TakeDigests():
                    digests = bytes(DIGEST_BYTES * len(action.blocks))
                    self._answer(source, source, transfer.Digested(action.key, action.first, digests))
                case transfer.OpenLanding():
                    self._perform(source, self.machines[source].handle(transfer.LandingOpened(action.key), self.now))
                case transfer.CancelPushes():
                    self._answer(source, source, Cancelled(action.key))
                case gateway.Deliver():
                    self.came[RequestId(source)] += [self.now] * len(action.tokens)
                case gateway.Ended() | gateway.Failed():
                    assert source not in self.ended
                    self.ended[RequestId(source)] = action
                    self.ended_at[RequestId(source)] = self.now

    def _send(self, source: str, to: Address, message: Any) -> None:
        sender = GATEWAY if source in self.sessions else source
        ends = (sender.split(".")[0], to.split(".")[0])
        if ends not in self.cut and not (self.loss and self.random.random() < self.loss):
            self.at(LINK, lambda: self._when_thawed(to, lambda: self._receive(to, message)))

    def _answer(self, source: str, to: str, event: Any) -> None:
        if (source.split(".")[0], to.split(".")[0]) not in self.cut and to in self.machines:
            self.at(LINK, lambda: self._when_thawed(to, lambda: self._tell(to, event)))

    def _wake(self, name: str) -> None:
        if name in self.sessions:
            session = self.sessions[RequestId(name)]
            self._when_thawed(GATEWAY, lambda: self._perform(name, session.handle(gateway.Tick(), self.now)))
        else:
            self._router_does(router.Tick())

    def _router_does(self, event: Any) -> None:
        self._when_thawed(ROUTER, lambda: self._perform(ROUTER, self.router.handle(event, self.now)))

    def _receive(self, to: Address, message: Any) -> None:
        if to in self.machines:
            self._tell(to, message)
        elif to == ROUTER:
            self._perform(to, self.router.handle(message, self.now))
        elif isinstance(message, ClusterState):
            self._take(
                self._dispatch.state(
                    message, [each for each in self.sessions.values() if each.attempt and not each.status.over]
                )
            )
        else:
            self._take(self._dispatch.take(message, self.sessions))

    def _take(self, steps: Iterable[Heard | Late | Send]) -> None:
        for step in steps:
            match step:
                case Heard(request, event):
                    if isinstance(event, gateway.WorkerLost):
                        self.lost.append((self.now, event.worker))
                    self._perform(request, self.sessions[request].handle(event, self.now))
                case Late(answer):
                    self.late += 1
                    if answer is not None:
                        self._perform(GATEWAY, [answer])
                case Send():
                    self._perform(GATEWAY, [step])

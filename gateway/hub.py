"""All sessions of one gateway: messages to events, actions to messages. Lives on one event loop.

A batch of tokens costs each request in it one ``Session.handle`` and one call of its listener; nobody waits.
"""

import asyncio
import itertools
import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from gateway.auth import EVERYONE
from gateway.core.adoption import Action as AdoptionAction
from gateway.core.adoption import Adoption, Found, Missing
from gateway.core.adoption import Event as AdoptionEvent
from gateway.core.dispatch import Dispatch, Heard, Late, Message
from gateway.core.errors import GatewayError, InternalError, Unavailable
from gateway.core.limits import Limits
from gateway.core.quotas import Allowance, Quota
from gateway.core.session import (
    Action,
    ClientGone,
    Deliver,
    Ended,
    Event,
    Failed,
    Session,
    SessionTimeouts,
    ShutDown,
    StopMatched,
    Tick,
)
from gateway.core.traces import Traces
from gateway.metrics import Metrics
from gateway.recorded import RecordedSession
from messages.common import WorkerAddress
from messages.gateway_to_router import ClusterStateWanted, Finished, Holding
from messages.gateway_to_worker import Abort
from messages.ids import Address, RequestId, WorkerId
from messages.router_to_gateway import AdoptionAsked, ClusterState, Placed, WorkerLost
from messages.sampling import FinishReason, SamplingParams
from messages.worker_to_gateway import Adopted, NotHere, Timeline
from runtime.clock import clock_name
from runtime.core.actions import Send, WakeAt
from runtime.mailbox import AsyncMailbox
from runtime.recorder import Recorder

log = logging.getLogger(__name__)

MESSAGES_A_TURN = 64
"""Messages handled in a row before others get the loop."""
FORGET_AFTER = 60.0
"""Seconds after which the socket to a lost worker is closed; until then it may be frozen and wake up."""
STATE_FRESH = 5.0
"""Seconds for which the router's last answer counts."""


class Listener(Protocol):
    """What waits for one sequence. Called on the loop; must not block, nor call back into the hub."""

    def deliver(self, tokens: Deliver, now: float) -> bool:
        """The next tokens; True if the text is complete with them."""

    def ended(self, reason: FinishReason, now: float) -> None: ...

    def failed(self, error: GatewayError) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One sequence to run."""

    prompt: bytes
    sampling: SamplingParams
    request: RequestId = field(default_factory=lambda: RequestId(secrets.token_hex(16)))
    tenant: str = EVERYONE.name
    cache_salt: str = ""
    """The client's own; see ``core/salts.py``."""
    description: bytes = b""
    """For other gateways: ``description.py``."""
    trace: str = ""
    """The request whose trace it belongs to; empty where it is not traced."""


@dataclass(slots=True)
class Relay:
    """One sequence under way, with who waits for it."""

    session: Session
    listener: Listener
    quota: Quota | None = None
    """Of its tenant, where that has limits."""
    timer: asyncio.TimerHandle | None = None
    outcome: FinishReason | GatewayError | None = None
    """What the listener heard at the end."""

    @property
    def baton(self) -> dict[str, Any]:
        """Who ran it, and what moved."""
        placed = self.session.placed
        prefill = None if placed is None else (placed.prefill or placed.decode).worker
        return {
            "prefill_worker": prefill,
            "decode_worker": None if placed is None else placed.decode.worker,
            "attempts": self.session.attempt,
            "kv_bytes": self.session.kv_bytes,
        }


@dataclass(slots=True)
class _Search:
    """For a sequence that another gateway has begun."""

    adoption: Adoption
    found: asyncio.Future[Relay | None]
    tenant: str
    timer: asyncio.TimerHandle | None = None


class _Nobody:
    """Listens to a sequence until a client reads it, from its first token on."""

    def deliver(self, tokens: Deliver, now: float) -> bool:
        return False

    def ended(self, reason: FinishReason, now: float) -> None:
        pass

    def failed(self, error: GatewayError) -> None:
        pass


class Hub:
    """``run`` is its loop; ``open`` and ``cancel`` are for handlers on the same event loop."""

    def __init__(
        self,
        mailbox: AsyncMailbox,
        router: Address,
        *,
        limits: Limits,
        timeouts: SessionTimeouts,
        max_attempts: int,
        metrics: Metrics,
        state_every: float,
        allowances: Mapping[str, Allowance] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """``allowances``: of tenants; others have no limits. ``recorder``, if any, writes down what happens to each
        session."""
        self.metrics = metrics
        self.cluster: ClusterState | None = None
        self.traces = Traces(clock_name())
        self._mailbox = mailbox
        self._router = router
        self._limits = limits
        self._timeouts = timeouts
        self._max_attempts = max_attempts
        self._state_every = state_every
        self._make_session = Session if recorder is None else partial(RecordedSession, recorder)
        self._loop = asyncio.get_running_loop()
        self._quotas = {
            tenant: Quota(allowance, self._loop.time(), retry_after=limits.retry_after)
            for tenant, allowance in (allowances or {}).items()
        }
        self._relays: dict[RequestId, Relay] = {}
        self._adoptions: dict[RequestId, _Search] = {}
        self._adoption_numbers = itertools.count(1)
        self._idle = asyncio.Event()
        self._idle.set()
        self._dispatch = Dispatch(mailbox.address, router)
        self._forgetting: dict[WorkerId, asyncio.TimerHandle] = {}  # lost workers whose sockets will be closed
        self._cluster_heard = float("-inf")
        self._draining = False
        self._finished = {reason: metrics.finished.labels(reason.value) for reason in FinishReason}

    @property
    def num_sequences(self) -> int:
        return len(self._relays)

    @property
    def ready(self) -> bool:
        """Whether the router has said, and lately, that every role has a worker."""
        fresh = self._loop.time() - self._cluster_heard < STATE_FRESH
        return fresh and not self._draining and self.cluster is not None and self.cluster.ready

    def open(self, orders: Iterable[tuple[Order, Listener]]) -> list[Relay]:
        """Run all these sequences of one request, or none: raises ``GatewayError`` where they are too many now."""
        wanted = list(orders)
        tenant = wanted[0][0].tenant
        self._admit(len(wanted), tenant)
        if tenant in self._quotas:
            self._quotas[tenant].begin(sum(len(prompt) // 4 for prompt in {order.prompt for order, _ in wanted}))
        return [self._open(order, listener) for order, listener in wanted]

    def _admit(self, wanted: int, tenant: str, *, adopted: bool = False) -> None:
        """``adopted``: they are no new requests, so nothing that counts by the minute is in their way."""
        if self._draining:
            raise Unavailable("the server is shutting down", retry_after=1.0)
        refusal = self._limits.admit(len(self._relays), wanted)
        if refusal is None and tenant in self._quotas:
            quota = self._quotas[tenant]
            refusal = quota.crowded(wanted) if adopted else quota.refusal(wanted, self._loop.time())
        if refusal is not None:
            raise refusal

    def _open(self, order: Order, listener: Listener) -> Relay:
        now = self._loop.time()
        traced = bool(order.trace) and self.traces.begin(order.trace, order.request, now, len(order.prompt) // 4)
        session = self._make_session(
            order.request,
            order.prompt,
            order.sampling,
            gateway=self._mailbox.address,
            router=self._router,
            tenant=order.tenant,
            cache_salt=order.cache_salt,
            traced=traced,
            description=order.description,
            timeouts=self._timeouts,
            max_attempts=self._max_attempts,
        )
        relay = self._add(session, listener, order.tenant)
        self.metrics.prompt_tokens.inc(len(order.prompt) // 4)
        self._perform(relay, session.start(now), now)
        return relay

    def _add(self, session: Session, listener: Listener, tenant: str) -> Relay:
        relay = Relay(session, listener, self._quotas.get(tenant))
        if relay.quota is not None:
            relay.quota.in_flight += 1
        self._relays[session.request] = relay
        self._idle.clear()
        self.metrics.in_flight.set(len(self._relays))
        return relay

    def cancel(self, relay: Relay) -> None:
        """Nobody waits for this sequence any more; nothing happens where it has ended."""
        if not relay.session.status.over:
            self._feed(relay, ClientGone())

    def cancel_all(self, relays: Iterable[Relay | None]) -> None:
        """Of those that are there."""
        for relay in relays:
            if relay is not None:
                self.cancel(relay)

    def complete(self, relay: Relay) -> None:
        """The text is complete with the tokens that are there; nothing happens where it has ended."""
        if not relay.session.status.over:
            self._feed(relay, StopMatched())

    async def adopt(self, requests: Sequence[RequestId], tenant: str) -> list[Relay | None]:
        """Go on with sequences of ``tenant`` that another gateway has begun; None for those that nobody has any more.
        Raises ``GatewayError`` where they are too many now."""
        if not requests:
            return []
        self._admit(len(requests), tenant, adopted=True)
        return await asyncio.gather(*(self._adopt(request, tenant) for request in requests))

    async def _adopt(self, request: RequestId, tenant: str) -> Relay | None:
        if request in self._relays or request in self._adoptions:
            return None  # its client reads it here, or it is being looked for already
        search = _Search(
            Adoption(request, self._mailbox.address, self._router, next(self._adoption_numbers)),
            self._loop.create_future(),
            tenant,
        )
        self._adoptions[request] = search
        try:
            self._seek(request, search.adoption.start(self._loop.time()))
            return await search.found
        finally:
            del self._adoptions[request]
            if search.timer is not None:
                search.timer.cancel()

    def _sought(self, request: RequestId, event: AdoptionEvent) -> None:
        """Something that is about an adoption."""
        search = self._adoptions.get(request)
        if search is not None and not search.found.done():
            self._seek(request, search.adoption.handle(event, self._loop.time()))
        elif isinstance(event, Adopted) and request not in self._relays:  # too late: nobody waits for it any more
            self._mailbox.send(event.worker.mailbox, Abort(request=request, attempt=event.attempt))

    def _seek(self, request: RequestId, actions: list[AdoptionAction]) -> None:
        search = self._adoptions[request]
        for action in actions:
            match action:
                case Send():
                    self._mailbox.send(action.to, action.message)
                case WakeAt():
                    search.timer = self._loop.call_at(action.time, self._sought, request, Tick())
                case Found():
                    search.found.set_result(self._take_over(action.adopted, search.tenant))
                case Missing():
                    search.found.set_result(None)

    def _take_over(self, adopted: Adopted, tenant: str) -> Relay:
        """A session for it at once, since its tokens may come with the next message."""
        now, work = self._loop.time(), adopted.generation
        session = self._make_session(
            adopted.request,
            work.prompt,
            work.sampling,
            gateway=self._mailbox.address,
            router=self._router,
            tenant=tenant,
            traced=work.traced,
            description=work.description,
            timeouts=self._timeouts,
            max_attempts=self._max_attempts,
        )
        self._moves_to(adopted.worker)
        self._dispatch.know(adopted.worker)
        relay = self._add(session, _Nobody(), tenant)
        self._perform(relay, session.adopt(adopted, now), now)
        if session.held is not None:
            holding = Holding(gateway=self._mailbox.address, attempts=(session.held,), last=False)
            self._mailbox.send(self._router, holding)
        return relay

    async def run(self) -> None:
        """Handle messages until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._receive())
            tasks.create_task(self._ask_for_state())

    async def drain(self, grace: float) -> None:
        """Take nothing new; what still runs after ``grace`` seconds gets an error."""
        self._draining = True
        try:
            async with asyncio.timeout(grace):
                await self._idle.wait()
        except TimeoutError:
            for relay in list(self._relays.values()):
                self._feed(relay, ShutDown())

    # In

    async def _receive(self) -> None:
        handled = 0
        while True:
            message = await self._mailbox.receive()
            try:
                self._handle(message)
            except Exception:
                log.exception("could not handle a %s", type(message).__name__)
            handled += 1
            if handled % MESSAGES_A_TURN == 0:  # receiving what is already there does not give way by itself
                await asyncio.sleep(0)

    def _handle(self, message: Any) -> None:
        match message:
            case Timeline():
                self.traces.take(message, self._loop.time())
            case ClusterState():
                self.cluster = self.metrics.cluster = message
                self._cluster_heard = self._loop.time()
                self.metrics.malformed.set(self._mailbox.malformed)
                self._take(self._dispatch.state(message, [relay.session for relay in self._relays.values()]))
            case AdoptionAsked(request) | Adopted(request) | NotHere(request):
                self._sought(request, message)
            case _:
                self._dispatched(message)

    def _dispatched(self, message: Message) -> None:
        if isinstance(message, Placed):
            for address in (message.prefill, message.decode):
                if address is not None:
                    self._moves_to(address)
        self._take(self._dispatch.take(message, self._relays))
        if isinstance(message, WorkerLost):
            self._worker_lost(message)

    def _take(self, steps: Iterable[Heard | Late | Send]) -> None:
        for step in steps:
            match step:
                case Heard(request, event):
                    relay = self._relays.get(request)
                    if relay is not None:
                        self._feed(relay, event)
                case Late(answer):
                    self.metrics.late_chunks.inc()
                    if answer is not None:
                        self._mailbox.send(answer.to, answer.message)
                case Send(to, answer):
                    self._mailbox.send(to, answer)

    def _moves_to(self, worker: WorkerAddress) -> None:
        """Where ``worker`` is now; the socket to where it was before will be closed."""
        before = self._dispatch.workers.get(worker.worker)
        forgetting = self._forgetting.pop(worker.worker, None)
        if forgetting is not None:
            forgetting.cancel()
        if before is not None and before.mailbox != worker.mailbox:
            self._loop.call_later(FORGET_AFTER, self._mailbox.outbox.forget, before.mailbox)

    def _worker_lost(self, lost: WorkerLost) -> None:
        known = self._dispatch.workers.get(lost.worker)
        if known is not None and known.epoch == lost.epoch and lost.worker not in self._forgetting:
            self._forgetting[lost.worker] = self._loop.call_later(FORGET_AFTER, self._forget, lost.worker)

    def _forget(self, worker: WorkerId) -> None:
        """Close the socket. Where the worker was stays known: it may have been frozen, and send more tokens yet."""
        del self._forgetting[worker]
        self._mailbox.outbox.forget(self._dispatch.workers[worker].mailbox)

    async def _ask_for_state(self) -> None:
        while True:
            self._mailbox.send(self._router, ClusterStateWanted(gateway=self._mailbox.address))
            await asyncio.sleep(self._state_every)

    # Out

    def _feed(self, relay: Relay, event: Event) -> None:
        """One event to one session. A bug that one request hits fails that request, and no other."""
        now = self._loop.time()
        self.traces.saw(relay.session.request, event, now)
        try:
            self._perform(relay, relay.session.handle(event, now), now)
        except Exception:
            log.exception("request %s failed", relay.session.request)
            if relay.session.request in self._relays:
                self._close(relay)
            self._give_up(relay)

    def _give_up(self, relay: Relay) -> None:
        """The session is broken: tell everyone by hand."""
        session = relay.session
        if session.status.over:  # what it said at its end may not have been sent
            self._mailbox.send(self._router, Finished(request=session.request, attempt=session.attempt))
        for action in session.handle(ClientGone(), self._loop.time()):
            if isinstance(action, Send):
                self._mailbox.send(action.to, action.message)
        self.metrics.failed.labels("internal_error").inc()
        relay.outcome = InternalError("internal error")
        relay.listener.failed(relay.outcome)

    def _perform(self, relay: Relay, actions: list[Action], now: float) -> None:
        complete = False
        for action in actions:
            self.traces.did(relay.session.request, action, now)
            match action:
                case Deliver():
                    self.metrics.generation_tokens.inc(len(action.tokens))
                    if relay.quota is not None:
                        relay.quota.use(len(action.tokens))
                    complete = relay.listener.deliver(action, now)
                case Send():
                    self._mailbox.send(action.to, action.message)
                case WakeAt():
                    self._wake_at(relay, action.time)
                case Ended():
                    self._close(relay)
                    self._finished[action.reason].inc()
                    relay.outcome = action.reason
                    relay.listener.ended(action.reason, now)
                case Failed():
                    self._close(relay)
                    self.metrics.failed.labels(action.error.code or "").inc()
                    relay.outcome = action.error
                    relay.listener.failed(action.error)
        if complete and not relay.session.status.over:
            self._perform(relay, relay.session.handle(StopMatched(), now), now)

    def _wake_at(self, relay: Relay, time: float) -> None:
        if relay.timer is not None:
            relay.timer.cancel()
        relay.timer = self._loop.call_at(time, self._tick, relay)

    def _tick(self, relay: Relay) -> None:
        relay.timer = None
        self._feed(relay, Tick())

    def _close(self, relay: Relay) -> None:
        session = relay.session
        del self._relays[session.request]
        if relay.quota is not None:
            relay.quota.in_flight -= 1
        if relay.timer is not None:
            relay.timer.cancel()
        if not self._relays:
            self._idle.set()
        metrics = self.metrics
        metrics.in_flight.set(len(self._relays))
        metrics.attempts.inc(session.attempt)
        metrics.resumes.inc(session.attempt - 1)
        metrics.late_chunks.inc(session.late_chunks)
        metrics.repeated_chunks.inc(session.repeated_chunks)
        metrics.bad_chunks.inc(session.bad_chunks)

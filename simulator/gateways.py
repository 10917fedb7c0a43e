"""A gateway's process with its real sessions, and the clients that ask it."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from msgspec import structs

from gateway.core.dispatch import Dispatch, Heard, Late
from gateway.core.errors import GatewayError
from gateway.core.limits import Limits
from gateway.core.session import (
    Chunk,
    ClientGone,
    Deliver,
    Ended,
    Event,
    Failed,
    Session,
    SessionTimeouts,
    StopMatched,
    Tick,
)
from gateway.core.stop_strings import StopStrings
from messages.codec import count_tokens, pack_tokens
from messages.gateway_to_router import ClusterStateWanted, PlacementWanted
from messages.ids import Address, Attempt, Epoch, RequestId
from messages.router_to_gateway import ClusterState, Placed
from messages.sampling import FinishReason, SamplingParams
from messages.worker_to_gateway import AttemptFailed, TokenBatch
from runtime.core.actions import Send, WakeAt
from simulator import history
from simulator.history import AttemptBegun, AttemptGivenUp, AttemptPlaced, Got, Incarnation, Offered
from simulator.model import text_of
from simulator.processes import Process, Surface

MAX_ATTEMPTS = 5
STATE_EVERY = 0.5


@dataclass(slots=True, kw_only=True)
class Wish:
    """One sequence that a client wants, and how patient it is."""

    number: int
    at: float
    gateway: str
    prompt: tuple[int, ...]
    params: SamplingParams
    stop: tuple[str, ...] = ()
    tenant: str = "default"
    leaves_at: float | None = None
    """When it goes away, whatever it has."""
    leaves_after: int | None = None
    """Tokens that it has then."""
    rests: tuple[float, float] | None = None
    """When it stops reading, and when it goes on."""

    @property
    def request(self) -> RequestId:
        return RequestId(f"{self.number:032x}")


@dataclass(slots=True)
class Client:
    """Reads one sequence. What the gateway says while it does not read waits for it."""

    wish: Wish
    tell: Callable[[Any], None]
    now: Callable[[], float]
    tokens: int = 0
    over: bool = False
    """It has its end, or has left."""
    resting: bool = False
    _unread: deque[Any] = field(default_factory=deque)

    def hear(self, record: Any) -> None:
        """Tokens, or the end. What is read later tells no more whose it was: other attempts have begun since."""
        if self.resting and isinstance(record, Got):
            record = structs.replace(record, attempt=None, source=None)
        self._unread.append(record)
        if not self.resting:
            self.read()

    def read(self) -> None:
        while self._unread and not self.over:
            record = self._unread.popleft()
            if isinstance(record, Got):
                self.tokens += len(record.tokens)
            else:
                self.over = True
            self.tell(structs.replace(record, at=self.now()))

    def rest(self) -> None:
        self.resting = True

    def go_on(self) -> None:
        self.resting = False
        self.read()


@dataclass(slots=True)
class Relay:
    """One sequence under way at a gateway."""

    session: Session
    client: Client
    stops: StopStrings
    with_logprobs: bool
    delivered: int = 0
    begun: int = 0
    """The last attempt that was asked for."""
    stopped: bool = False


class Origin(NamedTuple):
    """Whose tokens they are, as their message says; whatever the session takes them for."""

    attempt: Attempt | None
    source: Incarnation | None


NOBODY = Origin(None, None)


class GatewayProcess(Process):
    def __init__(
        self, world: Surface, name: str, epoch: Epoch, address: Address, origin: float, *,
        router: Address, timeouts: SessionTimeouts,
    ) -> None:  # fmt: skip
        super().__init__(world, name, epoch, address, origin)
        self.relays: dict[RequestId, Relay] = {}
        self._callers: list[Client] = []
        """Whose requests it has not looked at yet."""
        self._dispatch = Dispatch(address, router)
        self._router, self._timeouts = router, timeouts
        self._limits = Limits()
        self.after(0.0, self._ask_for_state)

    # Clients

    def ask(self, client: Client) -> None:
        """A client's request has come."""
        self._callers.append(client)
        self._happen(partial(self._open, client))

    def _open(self, client: Client) -> None:
        self._callers.remove(client)
        wish = client.wish
        if client.over:
            return  # it did not wait
        refusal = self._limits.admit(len(self.relays), 1)
        if refusal is not None:
            client.hear(_failed(wish.request, refusal))
            return
        session = Session(
            wish.request, pack_tokens(list(wish.prompt)), wish.params, gateway=self.address, router=self._router,
            tenant=wish.tenant, timeouts=self._timeouts, max_attempts=MAX_ATTEMPTS,
        )  # fmt: skip
        relay = Relay(session, client, StopStrings(wish.stop, include=False), wish.params.logprobs is not None)
        self.relays[wish.request] = relay
        self._perform(relay, session.start(self.now), NOBODY)

    def gone(self, request: RequestId) -> None:
        """Its client went away."""
        self._happen(partial(self._gone, request))

    def _gone(self, request: RequestId) -> None:
        relay = self.relays.get(request)
        if relay is not None:
            self._feed(relay, ClientGone())

    # Messages

    def hear(self, message: Any) -> None:
        if isinstance(message, ClusterState):
            steps: Iterable[Heard | Late | Send] = self._dispatch.state(
                message, [relay.session for relay in self.relays.values()]
            )
        else:
            if isinstance(message, TokenBatch):
                self._tell_of_late(message)
            steps = self._dispatch.take(message, self.relays)
        for step in steps:
            match step:
                case Heard(request, event):
                    relay = self.relays.get(request)
                    if relay is not None:
                        self._feed(relay, event)
                case Late(Send(to, answer)) | Send(to, answer):
                    self.send(to, answer)

    def _tell_of_late(self, batch: TokenBatch) -> None:
        """For the history: tokens of sequences that are over."""
        for chunk in batch.chunks:
            if chunk.request not in self.relays:
                source = Incarnation(batch.worker, Epoch(0))
                count, last = count_tokens(chunk.tokens), chunk.finish is not None
                now = self.world.clock.now
                self.world.tell(Offered(now, chunk.request, chunk.attempt, source, chunk.index, count, last))

    def _ask_for_state(self) -> None:
        self.send(self._router, ClusterStateWanted(gateway=self.address))
        self.after(STATE_EVERY, self._ask_for_state)

    def _feed(self, relay: Relay, event: Event) -> None:
        origin = self._tell_of(relay.session, event)
        before = relay.session.placed
        actions = relay.session.handle(event, self.now)
        placed = relay.session.placed
        if placed is not before and placed is not None:
            self._tell_placed(placed)
        self._perform(relay, actions, origin)

    def _tell_of(self, session: Session, event: Event) -> Origin:
        """For the history; whose tokens they are."""
        now = self.world.clock.now
        if isinstance(event, Chunk):
            worker, chunk = event
            source = self._incarnation(session, worker)
            last, count = chunk.finish is not None, count_tokens(chunk.tokens)
            self.world.tell(Offered(now, chunk.request, chunk.attempt, source, chunk.index, count, last))
            return Origin(chunk.attempt, source)
        if isinstance(event, AttemptFailed):
            source = self._incarnation(session, event.worker)
            self.world.tell(AttemptGivenUp(now, event.request, event.attempt, source, event.reason))
        return NOBODY

    def _incarnation(self, session: Session, worker: str) -> Incarnation:
        """Which one has sent this: tokens do not say so, but only one of the attempt's may send them."""
        placed = session.placed
        for address in () if placed is None else (placed.prefill, placed.decode):
            if address is not None and address.worker == worker:
                return Incarnation(worker, address.epoch)
        return Incarnation(worker, Epoch(0))

    def _tell_placed(self, placed: Placed) -> None:
        prefill = None if placed.prefill is None else Incarnation(placed.prefill.worker, placed.prefill.epoch)
        decode = Incarnation(placed.decode.worker, placed.decode.epoch)
        self.world.tell(AttemptPlaced(self.world.clock.now, placed.request, placed.attempt, prefill, decode))

    # What sessions want

    def _perform(self, relay: Relay, actions: Iterable[Any], origin: Origin) -> None:
        session = relay.session
        for action in actions:
            match action:
                case Deliver():
                    self._deliver(relay, action, origin)
                case Send(to, message):
                    if isinstance(message, PlacementWanted):
                        self._tell_begun(relay, message)
                    self.send(to, message)
                case WakeAt(time):
                    self.after(time - self.now, partial(self._tick, relay))
                case Ended(reason):
                    del self.relays[session.request]
                    self._end(relay, reason)
                case Failed(error):
                    del self.relays[session.request]
                    relay.client.hear(_failed(session.request, error))
        if relay.stopped and not session.status.over:
            self._perform(relay, session.handle(StopMatched(), self.now), origin)

    def _tell_begun(self, relay: Relay, wanted: PlacementWanted) -> None:
        if wanted.attempt > relay.begun:
            relay.begun = wanted.attempt
            self.world.tell(AttemptBegun(self.world.clock.now, wanted.request, wanted.attempt, wanted.moving))

    def _deliver(self, relay: Relay, deliver: Deliver, origin: Origin) -> None:
        """As far as a stop string lets them, the tokens and their text are the client's."""
        tokens = deliver.tokens
        speaking = len(tokens) - (deliver.finish is FinishReason.STOP)  # the token that ends it has no text
        text, used = "", len(tokens)
        for place, token in enumerate(tokens[:speaking]):
            more, relay.stopped = relay.stops.feed(text_of(token))
            text += more
            if relay.stopped:
                used = place + 1
                break
        logprobs = None
        if relay.with_logprobs and deliver.logprobs is not None:
            logprobs = deliver.logprobs.sampled[:used]
        index, relay.delivered = relay.delivered, relay.delivered + used
        request = relay.session.request
        relay.client.hear(Got(0.0, request, index, tuple(tokens[:used]), logprobs, text, "", *origin))

    def _end(self, relay: Relay, reason: FinishReason) -> None:
        wish = relay.client.wish
        if reason is FinishReason.ABORT:
            return  # nobody listens
        rest = "" if relay.stopped else relay.stops.flush()
        if rest:
            relay.client.hear(Got(0.0, wish.request, relay.delivered, (), _NONE if relay.with_logprobs else None, rest))
        reason = FinishReason.STOP if relay.stopped else reason
        relay.client.hear(history.Ended(0.0, wish.request, reason, len(wish.prompt), relay.delivered))

    def _tick(self, relay: Relay) -> None:
        if not relay.session.status.over:
            self._feed(relay, Tick())

    def die(self, *, comes_back: bool = False) -> None:
        """Its clients' connections break."""
        super().die(comes_back=comes_back)
        for client in (*(relay.client for relay in self.relays.values()), *self._callers):
            client.hear(history.Failed(0.0, client.wish.request, 0, ""))


_NONE: tuple[float, ...] = ()


def _failed(request: RequestId, error: GatewayError) -> history.Failed:
    return history.Failed(0.0, request, error.status, error.code or "", error.retry_after, error.message)

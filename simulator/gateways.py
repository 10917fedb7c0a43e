"""A gateway's process with its real sessions, and the clients that ask it."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, NamedTuple

from msgspec import structs

from gateway.choice import Choice
from gateway.core.adoption import Action as AdoptionAction
from gateway.core.adoption import Adoption, Found, Missing
from gateway.core.adoption import Event as AdoptionEvent
from gateway.core.dispatch import Dispatch, Heard, Late
from gateway.core.errors import GatewayError
from gateway.core.limits import Limits
from gateway.core.positions import Position
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
from gateway.metrics import Metrics
from messages.codec import count_tokens, pack_tokens
from messages.gateway_to_router import ClusterStateWanted, Holding, PlacementWanted
from messages.gateway_to_worker import Abort
from messages.ids import Address, Attempt, Epoch, RequestId
from messages.router_to_gateway import AdoptionAsked, ClusterState, Placed
from messages.sampling import FinishReason, SamplingParams
from messages.worker_to_gateway import Adopted, AttemptFailed, NotHere, TokenBatch
from runtime.core.actions import Send, WakeAt
from simulator import history
from simulator.history import Attached, AttemptBegun, AttemptGivenUp, AttemptPlaced, Got, Incarnation, Offered
from simulator.model import text_of
from simulator.processes import Process, Surface

MAX_ATTEMPTS = 5
RESUMABLE = b"resumable"
"""What a gateway would have to know to go on; here the client says it once more."""
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
    resumable: bool = False
    """Whether it reads on at another gateway when its own one dies."""
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
    gateway: str = ""
    """Where it reads now."""
    broken: Callable[["Client"], None] | None = None
    """Called when its connection breaks; None where that is the end."""
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

    def lose_connection(self) -> None:
        """What was on its way to it is lost."""
        self._unread.clear()
        if self.broken is not None:
            self.broken(self)
        else:
            self.hear(history.Failed(0.0, self.wish.request, 0, ""))

    def rest(self) -> None:
        self.resting = True

    def go_on(self) -> None:
        self.resting = False
        self.read()


class Letters:
    """The text of tokens, each for itself."""

    def step(self, token: int) -> str:
        return text_of(token)

    def flush(self) -> str:
        return ""


@dataclass(slots=True)
class Relay:
    """One sequence under way at a gateway."""

    session: Session
    client: Client
    choice: Choice
    """Its answer, behind what the client has."""
    begun: int = 0
    """The last attempt that was asked for."""


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
        self._searches: dict[RequestId, tuple[Adoption, Client]] = {}
        self._adoption_numbers = count(1)
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
            tenant=wish.tenant, description=RESUMABLE if wish.resumable else b"", timeouts=self._timeouts,
            max_attempts=MAX_ATTEMPTS,
        )  # fmt: skip
        relay = Relay(session, client, self._choice(client))
        self.relays[wish.request] = relay
        self._perform(relay, session.start(self.now), NOBODY)

    def _choice(self, client: Client, *, resumed: bool = False) -> Choice:
        wish = client.wish
        return Choice(
            0, Letters(), StopStrings(wish.stop, include=False), include_stop=False,
            logprobs=wish.params.logprobs is not None, echo=None, is_first=True, arrived=self.now,
            changed=lambda: None, metrics=_METRICS, after=Position(client.tokens), resumed=resumed,
        )  # fmt: skip

    def attach(self, client: Client) -> None:
        """A client reads on here what another gateway has begun."""
        self._callers.append(client)
        self._happen(partial(self._search, client))

    def _search(self, client: Client) -> None:
        request = client.wish.request
        adoption = Adoption(request, self.address, self._router, next(self._adoption_numbers))
        self._searches[request] = (adoption, client)
        self._seek(request, adoption.start(self.now))

    def _sought(self, request: RequestId, event: AdoptionEvent) -> None:
        search = self._searches.get(request)
        if search is not None:
            self._seek(request, search[0].handle(event, self.now))
        elif isinstance(event, Adopted) and request not in self.relays:
            self.send(event.worker.mailbox, Abort(request=request, attempt=event.attempt))

    def _seek(self, request: RequestId, actions: Iterable[AdoptionAction]) -> None:
        for action in actions:
            match action:
                case Send(to, message):
                    self.send(to, message)
                case WakeAt(time):
                    self.after(time - self.now, partial(self._sought, request, Tick()))
                case Found(adopted):
                    self._take_over(self._found(request), adopted)
                case Missing():
                    self._found(request).hear(history.Failed(0.0, request, 0, ""))

    def _found(self, request: RequestId) -> Client:
        _, client = self._searches.pop(request)
        self._callers.remove(client)
        return client

    def _take_over(self, client: Client, adopted: Adopted) -> None:
        wish, work = client.wish, adopted.generation
        session = Session(
            adopted.request, work.prompt, work.sampling, gateway=self.address, router=self._router, tenant=wish.tenant,
            description=work.description, timeouts=self._timeouts, max_attempts=MAX_ATTEMPTS,
        )  # fmt: skip
        self._dispatch.know(adopted.worker)
        relay = Relay(session, client, self._choice(client, resumed=True))
        relay.begun = adopted.attempt
        self.relays[wish.request] = relay
        self.world.tell(Attached(self.world.clock.now, wish.request, self.name, client.tokens))
        client.gateway = self.name
        actions = session.adopt(adopted, self.now)
        if adopted.running:
            decode = Incarnation(adopted.worker.worker, adopted.worker.epoch)
            self.world.tell(AttemptPlaced(self.world.clock.now, wish.request, adopted.attempt, None, decode))
        known = session.transcript()
        complete = known is not None and relay.choice.replay(known)
        self._tell_client(relay, NOBODY)
        self._perform(relay, actions, NOBODY)
        if complete and not session.status.over:
            self._perform(relay, session.handle(StopMatched(), self.now), NOBODY)
        if session.held is not None:
            self.send(self._router, Holding(gateway=self.address, attempts=(session.held,), last=False))

    def gone(self, request: RequestId) -> None:
        """Its client went away."""
        self._happen(partial(self._gone, request))

    def _gone(self, request: RequestId) -> None:
        relay = self.relays.get(request)
        if relay is not None:
            self._feed(relay, ClientGone())

    # Messages

    def hear(self, message: Any) -> None:
        if isinstance(message, AdoptionAsked | Adopted | NotHere):
            self._sought(message.request, message)
            return
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
        session, complete = relay.session, False
        for action in actions:
            match action:
                case Deliver():
                    complete = relay.choice.deliver(action, self.now)
                    self._tell_client(relay, origin)
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
        if complete and not session.status.over:
            self._perform(relay, session.handle(StopMatched(), self.now), origin)

    def _tell_begun(self, relay: Relay, wanted: PlacementWanted) -> None:
        if wanted.attempt > relay.begun:
            relay.begun = wanted.attempt
            self.world.tell(AttemptBegun(self.world.clock.now, wanted.request, wanted.attempt, wanted.moving))

    def _tell_client(self, relay: Relay, origin: Origin) -> None:
        """What its choice has for the client."""
        choice = relay.choice
        index = choice.position.tokens
        piece = choice.take(even_without_text=True)
        if piece is not None and (piece.tokens or piece.text):
            logprobs = tuple(each.logprob for each in piece.logprobs if each.logprob is not None)
            known = logprobs if relay.client.wish.params.logprobs is not None else None
            request, tokens = relay.session.request, tuple(piece.tokens)
            relay.client.hear(Got(0.0, request, index, tokens, known, piece.text, "", *origin))

    def _end(self, relay: Relay, reason: FinishReason) -> None:
        if reason is FinishReason.ABORT:
            return  # nobody listens
        choice, wish = relay.choice, relay.client.wish
        choice.ended(reason, self.now)
        self._tell_client(relay, NOBODY)
        assert choice.finish is not None
        relay.client.hear(history.Ended(0.0, wish.request, choice.finish, len(wish.prompt), choice.num_tokens))

    def _tick(self, relay: Relay) -> None:
        if not relay.session.status.over:
            self._feed(relay, Tick())

    def die(self, *, comes_back: bool = False) -> None:
        """Its clients' connections break."""
        super().die(comes_back=comes_back)
        for client in (*(relay.client for relay in self.relays.values()), *self._callers):
            client.lose_connection()


_METRICS = Metrics()
"""Of all gateways together; nobody reads them."""


def _failed(request: RequestId, error: GatewayError) -> history.Failed:
    return history.Failed(0.0, request, error.status, error.code or "", error.retry_after, error.message)

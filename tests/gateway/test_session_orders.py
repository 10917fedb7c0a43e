"""Promise: a session before workers, a router and links that follow the protocol, but repeat, delay, reorder and lose
messages, and die, gives its client each token once, in order, and exactly one end; and leaves no worker at work.

A link keeps the order of what it carries (ZeroMQ over TCP) but loses any of it; links overtake each other freely. What
happens next is drawn before the run, as a list of numbers.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st

from gateway.core.errors import AttemptsExhausted, GatewayError, InvalidRequest, Overloaded, Unavailable
from gateway.core.session import (
    FAILURE,
    MISHAP,
    Chunk,
    ClientGone,
    Deliver,
    Ended,
    Failed,
    Session,
    SessionTimeouts,
    ShutDown,
    Status,
    StopMatched,
    Tick,
    answer_to_unwanted,
)
from messages.codec import pack_tokens, unpack_tokens
from messages.common import FailReason, Logprobs, Ticket, WorkerAddress
from messages.gateway_to_router import Finished, PlacementWanted, Prefilled
from messages.gateway_to_worker import Abort, EndAck, Generate, Prefill, TokensWanted
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.router_to_gateway import Placed, Rejected, WorkerLost
from messages.sampling import FinishReason, SamplingParams
from messages.worker_to_gateway import AttemptFailed, TokenChunk
from runtime.core.actions import Send, WakeAt

REQUEST = RequestId("r")
ROUTER, GATEWAY = Address("router"), Address("gateway")
PROMPT = pack_tokens([1, 2, 3])
TIMEOUTS = SessionTimeouts(ask_again=1, placement=60, first_token=20, silence=5, progress=120, gap=0.25)
LENGTH = 12
NAMES = ("a", "b", "c", "d")


def token(index: int) -> int:
    """What any worker computes for this place of the output."""
    return 100 + index


def logprobs_of(first: int, last: int) -> Logprobs:
    count = last - first
    return Logprobs(tuple(-float(i) for i in range(first, last)), (1,) * count, ((),) * count, ((),) * count)


@dataclass
class Work:
    """One attempt at one worker."""

    attempt: Attempt
    position: int
    """The next token to compute."""
    until: int
    """The token before which this worker's part is over; ``LENGTH``: it ends the request."""
    acked: bool = False


@dataclass
class Worker:
    """Keeps what it computes until the end is acked, as the protocol wants it."""

    name: str
    epoch: int = 1
    alive: bool = True
    """A frozen one neither works nor hears, and may wake up as a zombie."""
    work: dict[Attempt, Work] = field(default_factory=dict)

    @property
    def address(self) -> WorkerAddress:
        return WorkerAddress(WorkerId(self.name), Epoch(self.epoch), Address(f"{self.name}.{self.epoch}"))


class World:
    def __init__(self, max_attempts: int) -> None:
        self.now = 0.0
        self.workers = [Worker(name) for name in NAMES]
        self.links: dict[tuple[str, str], deque[Any]] = defaultdict(deque)
        self.placements: dict[Attempt, Placed] = {}
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.ends: list[Ended | Failed] = []
        self.wake_at: float | None = None
        self.told: set[tuple[str, Attempt]] = set()
        """Workers and attempts that heard, or will hear, that it is over."""
        self.session = Session(
            REQUEST,
            PROMPT,
            SamplingParams(max_tokens=LENGTH, logprobs=0),
            gateway=GATEWAY,
            router=ROUTER,
            tenant="t",
            timeouts=TIMEOUTS,
            max_attempts=max_attempts,
        )
        self._perform(self.session.start(0.0))

    # The shell around the session

    def feed(self, what: Any) -> None:
        before, over = self.session.attempt, self.session.status.over
        actions = self.session.handle(what, self.now)
        delivered = [action for action in actions if isinstance(action, Deliver)]
        if isinstance(what, Chunk) and what.chunk.attempt != before:
            assert not delivered and not [a for a in actions if isinstance(a, Ended | Failed)], "of an older attempt"
        if over:
            assert all(isinstance(action, Send) for action in actions), "after the end"
        self._perform(actions)
        assert self.tokens == [token(i) for i in range(len(self.tokens))]
        assert self.logprobs == [-float(i) for i in range(len(self.tokens))]
        assert unpack_tokens(bytes(self.session.generated)).tolist() == self.tokens

    def _perform(self, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Send():
                    self._send(action.to, action.message)
                case WakeAt():
                    self.wake_at = action.time
                case Deliver():
                    assert not self.ends
                    self.tokens += action.tokens
                    assert action.logprobs is not None
                    self.logprobs += action.logprobs.sampled
                case _:
                    self.ends.append(action)

    def _send(self, to: Address, message: Any) -> None:
        assert message.request == REQUEST
        if isinstance(message, PlacementWanted):
            assert (message.attempt, message.num_tokens) == (self.session.attempt, 3 + len(self.tokens))
            assert message.max_new_tokens == LENGTH - len(self.tokens)
        self.links[GATEWAY, to].append(message)
        if isinstance(message, Abort | EndAck):
            self.told.add((to, message.attempt))

    # What may happen

    def deliver(self, link: int, *, keep: bool = False, lose: bool = False) -> None:
        """The first message of a link arrives; ``keep``: and will once more; ``lose``: or does not."""
        busy = [key for key, queue in self.links.items() if queue]
        if not busy:
            return
        key = busy[link % len(busy)]
        message = self.links[key][0] if keep else self.links[key].popleft()
        if not lose:
            self._arrive(*key, message)

    def _arrive(self, sender: str, to: str, message: Any) -> None:
        if to == GATEWAY:
            self._gateway_hears(sender, message)
        elif to == ROUTER:
            self._router_hears(message)
        else:
            for worker in self.workers:
                if worker.address.mailbox == to and worker.alive:
                    self._worker_hears(worker, message)

    def _gateway_hears(self, sender: str, message: Any) -> None:
        if not isinstance(message, TokenChunk):
            if not self.session.status.over:  # the hub has forgotten it
                self.feed(message)
        elif self.session.status.over:
            answer = answer_to_unwanted(Address(sender), message)
            self._send(answer.to, answer.message)
        else:
            self.feed(Chunk(WorkerId(sender.partition(".")[0]), message))

    def _router_hears(self, message: Any) -> None:
        if not isinstance(message, PlacementWanted):
            assert isinstance(message, Prefilled | Finished)
            return
        placed = self.placements.get(message.attempt)
        if placed is None:
            placed = self.placements[message.attempt] = self._place(message)
        self.links[ROUTER, GATEWAY].append(placed)

    def _place(self, wanted: PlacementWanted) -> Placed:
        """Two workers that live, not those to avoid, as far as there are any; one alone does both legs."""
        ranked = sorted(self.workers, key=lambda worker: (worker.name in wanted.avoid, not worker.alive))
        prefill, decode = ranked[0].address, ranked[1].address
        if wanted.attempt % 3 == 0:
            return Placed(request=REQUEST, attempt=wanted.attempt, prefill=None, decode=decode, ticket=None)
        ticket = Ticket(prefill.worker, prefill.epoch, decode.worker, decode.epoch, bytes(32))
        return Placed(request=REQUEST, attempt=wanted.attempt, prefill=prefill, decode=decode, ticket=ticket)

    def _worker_hears(self, worker: Worker, message: Any) -> None:
        work = worker.work.get(message.attempt)
        match message:
            case Prefill() | Generate() if work is None:
                start = len(message.generation.generated) // 4
                assert unpack_tokens(message.generation.generated).tolist() == [token(i) for i in range(start)]
                assert start < LENGTH, "nothing left to do"
                until = LENGTH
                if isinstance(message, Prefill):
                    until = start + 1
                    peer = next(peer for peer in self.workers if peer.name == message.decode.worker)
                    if peer.address == message.decode and peer.alive:  # the KV lands there
                        peer.work.setdefault(message.attempt, Work(message.attempt, start + 1, LENGTH))
                worker.work[message.attempt] = Work(message.attempt, start, until)
            case TokensWanted() if work is not None:
                self._say(worker, work, message.index, work.position)
            case Abort() | EndAck() if work is not None:
                work.acked = True

    def compute(self, which: int, count: int) -> None:
        """A worker computes some tokens of one attempt, or says its end once more."""
        busy = [
            (worker, work)
            for worker in self.workers
            if worker.alive
            for work in worker.work.values()
            if not work.acked and (work.position < work.until or work.until == LENGTH)
        ]
        if not busy:
            return
        worker, work = busy[which % len(busy)]
        if work.position == LENGTH:
            self._say(worker, work, 0, LENGTH)
            return
        first, work.position = work.position, min(work.position + count, work.until)
        self._say(worker, work, first, work.position)

    def _say(self, worker: Worker, work: Work, first: int, last: int) -> None:
        chunk = TokenChunk(
            REQUEST,
            work.attempt,
            first,
            pack_tokens([token(i) for i in range(first, last)]),
            logprobs_of(first, last),
            finish=FinishReason.LENGTH if last == LENGTH else None,
        )
        self.links[worker.address.mailbox, GATEWAY].append(chunk)

    def fail(self, which: int, reason: FailReason) -> None:
        """A worker gives an attempt up."""
        busy = [(worker, work) for worker in self.workers if worker.alive for work in worker.work.values()]
        if busy:
            worker, work = busy[which % len(busy)]
            work.acked = True
            failed = AttemptFailed(
                request=REQUEST, attempt=work.attempt, worker=WorkerId(worker.name), reason=reason, detail="why"
            )
            self.links[worker.address.mailbox, GATEWAY].append(failed)

    def freeze(self, which: int, *, noticed: bool) -> None:
        """A worker hangs, for now; the router may notice."""
        worker = self.workers[which % len(self.workers)]
        worker.alive = False
        if noticed:
            self._lose(worker, dead=False)

    def thaw(self, which: int) -> None:
        self.workers[which % len(self.workers)].alive = True

    def restart(self, which: int) -> None:
        """A worker dies, and comes back as another incarnation that knows nothing."""
        worker = self.workers[which % len(self.workers)]
        self._lose(worker, dead=True)
        worker.epoch, worker.alive, worker.work = worker.epoch + 1, True, {}

    def _lose(self, worker: Worker, *, dead: bool) -> None:
        lost = WorkerLost(worker=WorkerId(worker.name), epoch=Epoch(worker.epoch), detail="why", dead=dead)
        self.links[ROUTER, GATEWAY].append(lost)

    def sleep(self, seconds: float) -> None:
        until = self.now + seconds
        while self.wake_at is not None and self.wake_at <= until and not self.session.status.over:
            self.now, self.wake_at = max(self.now, self.wake_at), None
            self.feed(Tick())
        self.now = until

    def step(self, kind: int, x: int) -> None:
        match kind:
            case 0 | 1 | 2 | 3:
                self.deliver(x)
            case 4 | 5:
                self.compute(x, 1 + x % 4)
            case 6:
                self.deliver(x, keep=True)
            case 7:
                self.deliver(x, lose=True)
            case 8:
                self.sleep((0.1, 0.5, 6.0, 21.0, 121.0)[x % 5])
            case 9:
                self.fail(x // 3, (FailReason.ENGINE, FailReason.TRANSFER, FailReason.REFUSED)[x % 3])
            case 10:
                self.freeze(x, noticed=x % 3 > 0)
            case 11:
                self.thaw(x)
            case 12:
                self.restart(x)

    # In the end

    def settle(self) -> None:
        """No more trouble: everyone lives and every message arrives."""
        for worker in self.workers:
            worker.alive = True
        for _ in range(2000):
            if self.session.status.over and not any(self.links.values()):
                return
            if any(self.links.values()):
                self.deliver(0)
            else:
                for i in range(2 * len(self.workers)):
                    self.compute(i, 4)
                if not any(self.links.values()):
                    self.sleep(1.0)
        raise AssertionError(f"it never ends: {self.session.status}, {len(self.tokens)} tokens")

    def check_that_nothing_is_left(self) -> None:
        assert len(self.ends) == 1 and self.session.status.over
        for attempt, placed in self.placements.items():
            if attempt < self.session.attempt:
                for worker in (placed.prefill, placed.decode):
                    assert worker is None or (worker.mailbox, attempt) in self.told, (
                        f"attempt {attempt} was not aborted"
                    )


def steps_of(drawn: bytes) -> list[tuple[int, int]]:
    """Two bytes a step; zeros, which hypothesis shrinks to, let the oldest message arrive."""
    return [(kind % 13, x) for kind, x in zip(drawn[::2], drawn[1::2], strict=True)]


STEPS = st.one_of(*(st.binary(min_size=2 * n, max_size=2 * n) for n in (10, 40, 160))).map(steps_of)


@settings(max_examples=1000, derandomize=True)
@given(steps=STEPS)
def test_after_any_trouble_the_answer_is_whole(steps: list[tuple[int, int]]) -> None:
    world = World(max_attempts=1000)
    for step in steps:
        world.step(*step)
    world.settle()
    event(f"attempts: {min(world.session.attempt, 5)}")
    event(f"late chunks: {world.session.late_chunks > 0}")
    event(f"repeated chunks: {world.session.repeated_chunks > 0}")
    if isinstance(world.ends[0], Failed):  # only where the router was not heard for a minute
        assert isinstance(world.ends[0].error, Unavailable)
    else:
        assert world.ends == [Ended(FinishReason.LENGTH)] and len(world.tokens) == LENGTH
    assert world.session.bad_chunks == 0
    world.check_that_nothing_is_left()


@settings(max_examples=500, derandomize=True)
@given(steps=STEPS, max_attempts=st.integers(1, 3))
def test_with_few_attempts_there_is_still_one_end(steps: list[tuple[int, int]], max_attempts: int) -> None:
    world = World(max_attempts)
    for step in steps:
        world.step(*step)
    world.settle()
    (end,) = world.ends
    assert world.session.attempt <= max_attempts * FAILURE / MISHAP
    if isinstance(end, Failed):
        assert isinstance(end.error, AttemptsExhausted | Unavailable)
    else:
        assert end == Ended(FinishReason.LENGTH) and len(world.tokens) == LENGTH
    world.check_that_nothing_is_left()


ENDS: dict[str, tuple[Any, Status, type[GatewayError] | FinishReason]] = {
    "the client goes": (ClientGone(), Status.CANCELLED, FinishReason.ABORT),
    "a stop string": (StopMatched(), Status.FINISHED, FinishReason.STOP),
    "a shutdown": (ShutDown(), Status.FAILED, Unavailable),
}


@settings(max_examples=500, derandomize=True)
@given(before=STEPS, how=st.sampled_from(sorted(ENDS)), after=STEPS)
def test_an_end_from_our_side_is_the_end_whatever_comes_later(
    before: list[tuple[int, int]], how: str, after: list[tuple[int, int]]
) -> None:
    what, status, outcome = ENDS[how]
    world = World(max_attempts=1000)
    for step in before:
        world.step(*step)
    if not world.session.status.over:
        world.feed(what)
        assert world.session.status is status
        (end,) = world.ends
        assert end == Ended(outcome) if isinstance(outcome, FinishReason) else isinstance(end.error, outcome)  # type: ignore[union-attr,arg-type]
        if world.session.placed is not None:
            for worker in (world.session.placed.prefill, world.session.placed.decode):
                assert worker is None or (worker.mailbox, world.session.attempt) in world.told
    for step in after:
        world.step(*step)
    world.settle()
    for worker in world.workers:  # whoever still sends is told; so in the end nobody keeps anything
        for i in range(len(worker.work)):
            world.compute(i, 1)
    world.settle()
    world.check_that_nothing_is_left()


@settings(max_examples=300, derandomize=True)
@given(before=STEPS, retry_after=st.sampled_from([None, 1.0]))
def test_a_rejection_of_this_attempt_ends_it_and_one_of_another_does_not(
    before: list[tuple[int, int]], retry_after: float | None
) -> None:
    world = World(max_attempts=1000)
    for step in before:
        world.step(*step)
    session = world.session
    ends, attempt = len(world.ends), session.attempt
    for other in (attempt - 1, attempt + 1):
        world.feed(Rejected(request=REQUEST, attempt=Attempt(other), detail="full", retry_after=retry_after))
        assert (len(world.ends), session.attempt) == (ends, attempt)
    placing = session.status is Status.PLACING
    world.feed(Rejected(request=REQUEST, attempt=attempt, detail="full", retry_after=retry_after))
    if placing:
        (end,) = world.ends
        assert isinstance(end, Failed) and type(end.error) is (Overloaded if retry_after else InvalidRequest)
    else:
        assert len(world.ends) == ends

"""Promise: of a traced attempt the gateway hears what its worker did when, once; of any other nothing."""

from typing import Any

import numpy as np
import pytest

from engine.core.scheduler import StepPlan
from engine.core.sequence import Sequence
from kv_transfer.core.events import Pushed, TransferKey
from kv_transfer.core.session import Digested, Push, TakeDigests
from messages.codec import pack_tokens
from messages.common import FailReason, Generation, Ticket, WorkerAddress
from messages.decode_to_prefill import TailOffered, TransferAccepted, TransferAcked, TransferRefused
from messages.gateway_to_worker import Abort, Generate, Prefill
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.prefill_to_decode import OpenTransfer, TransferClosed
from messages.sampling import FinishReason, SamplingParams
from messages.tickets import mint
from messages.worker_to_gateway import MAX_MARKS, AttemptFailed, Mark, Timeline, TokenBatch, TokenChunk
from runtime.core.actions import Send
from runtime.core.timeline import MAX_TRACED, Timelines
from tests.workers.test_tails import DECODE as DECODE_WORKER
from tests.workers.test_tails import KEY, PREFILL, PROMPT, REQUEST, SOURCE, Pair

GATEWAY, DECODE = Address("tcp://gateway:1"), Address("tcp://decode:1")
EPOCH = Epoch(1)
BLOCKS = np.arange(2, dtype=np.int32)


def work(*, traced: bool) -> Generation:
    return Generation(pack_tokens([1, 2, 3]), SamplingParams(max_tokens=4), traced=traced)


def prefill(request: str = "r", attempt: int = 1, *, traced: bool = True) -> Prefill:
    decode = WorkerAddress(WorkerId("decode-0"), EPOCH, DECODE)
    ticket = Ticket(WorkerId("prefill-0"), EPOCH, decode.worker, EPOCH, bytes(32))
    key = TransferKey(RequestId(request), Attempt(attempt))
    return Prefill(key.request, key.attempt, GATEWAY, work(traced=traced), decode, ticket)


def generate() -> Generate:
    return Generate(RequestId("r"), Attempt(1), GATEWAY, work(traced=True))


def key(request: str = "r", attempt: int = 1) -> TransferKey:
    return TransferKey(RequestId(request), Attempt(attempt))


def push(first: int = 0) -> Push:
    return Push(key(), None, first, BLOCKS, BLOCKS)  # type: ignore[arg-type]


def tokens(finish: FinishReason | None = None, request: str = "r") -> Send:
    chunk = TokenChunk(RequestId(request), Attempt(1), 0, pack_tokens([7]), finish=finish)
    return Send(GATEWAY, TokenBatch(WorkerId("w"), (chunk,)))


def step(*rows: tuple[str, int, int]) -> StepPlan:
    """(request, tokens computed before, tokens)"""
    sequences = [Sequence(name, np.arange(3, dtype=np.int32), SamplingParams(max_tokens=4)) for name, _, _ in rows]
    before, count = (np.array([row[place] for row in rows], np.int32) for place in (1, 2))
    return StepPlan(sequences, count, before, np.ones(len(rows), np.bool_))


class Watched(Timelines):
    """With a machine that admits each attempt, and has it until the test says otherwise."""

    def __init__(self) -> None:
        self.here: set[TransferKey] = set()
        super().__init__(WorkerId("prefill-0"), "clock", self.here.__contains__)

    def arrives(self, order: Prefill | Generate, now: float) -> None:
        new = self.saw(order, now)
        self.here.add(TransferKey(order.request, order.attempt))
        if new:
            self.begin(order, now)


def watched() -> Watched:
    return Watched()


def only(timelines: Timelines, now: float = 99.0) -> Timeline:
    (send,) = timelines.take(now)
    assert send.to == GATEWAY and isinstance(send.message, Timeline)
    assert timelines.take(now) == [], "it is told once"
    return send.message


def names(timeline: Timeline) -> list[str]:
    return [mark.name for mark in timeline.marks]


def test_a_prefill_workers_part_from_the_order_to_the_ack() -> None:
    timelines = watched()
    timelines.arrives(prefill(), 1.0)
    timelines.saw(TransferAccepted(*key(), pack_tokens([4, 5, 6]), 1), 2.0)
    timelines.ran(step(("other", 0, 2), ("r", 0, 3)), 2.0, 5.0, [(1, 3.0), (4, 4.5)])
    timelines.did(push(), 3.0)
    timelines.did(TakeDigests(key(), None, 0, BLOCKS), 3.5)  # type: ignore[arg-type]
    timelines.saw(Pushed(key(), 0, 2, 100, 60, 3.75, ((2, 3.25, 3.5), (4, 3.5, 3.75))), 4.0)
    timelines.saw(Digested(key(), 0, bytes(16)), 4.5)
    timelines.did(tokens(), 5.0)
    timelines.did(tokens(), 5.5)
    timelines.saw(TransferAcked(*key()), 6.0)
    timeline = only(timelines)
    assert (timeline.request, timeline.attempt, timeline.worker) == ("r", 1, "prefill-0")
    assert (timeline.clock, timeline.sent) == ("clock", 99.0)
    assert timeline.marks == (
        Mark("request", "Prefill arrives", 1.0, 1.0, {"prompt": 3, "generated": 0}),
        Mark("transfer", "accepted", 2.0, 2.0, {"blocks": 3, "cached_blocks": 1}),
        Mark("steps", "prefill 0-3", 2.0, 5.0, {"tokens": 3, "sequences": 2, "tokens_of_all": 5}),
        Mark("layers", "layer 0", 2.0, 3.0, {}),
        Mark("layers", "layers 1-3", 3.0, 4.5, {}),
        Mark("transfer", "push", 3.0, 3.75, {"first": 0, "blocks": 2, "live": 0, "bytes": 100, "early_bytes": 60}),
        Mark("pushed layers", "layers 0-1", 3.25, 3.5, {}),
        Mark("pushed layers", "layers 2-3", 3.5, 3.75, {}),
        Mark("digests", "digest", 3.5, 4.5, {"first": 0, "blocks": 2}),
        Mark("tokens", "first tokens leave", 5.0, 5.0, {"index": 0, "tokens": 1}),
        Mark("transfer", "acked", 6.0, 6.0, {}),
    )
    assert not timelines.watching


def test_a_repaired_push_is_a_second_one() -> None:
    timelines = watched()
    timelines.arrives(prefill(), 0.0)
    for now in (1.0, 2.0):
        timelines.did(push(), now)
    for now in (3.0, 4.0):
        timelines.saw(Pushed(key(), 0, 2, 100), now)
    timelines.saw(Pushed(key(), 0, 2, 100), 5.0)  # nobody asked for it
    timelines.saw(TransferAcked(*key()), 6.0)
    spans = [(mark.begin, mark.end) for mark in only(timelines).marks if mark.name == "push"]
    assert spans == [(1.0, 3.0), (2.0, 4.0)]


@pytest.mark.parametrize("order", [prefill(), generate()])
@pytest.mark.parametrize(
    ("end", "name"),
    [
        (TransferRefused(*key(), True, "full"), "refused"),
        (TransferClosed(*key(), "given up", Epoch(1)), "closed by prefill"),
        (Abort(*key(attempt=2)), "aborted by the gateway"),
        (Send(DECODE, TransferClosed(*key(), "given up", Epoch(1))), "closed"),
        (tokens(FinishReason.LENGTH), "last token leaves"),
        (Send(GATEWAY, AttemptFailed(*key(), WorkerId("w"), FailReason.ENGINE, "")), "attempt failed"),
    ],
)
def test_whatever_ends_the_workers_part_ends_its_timeline(order: Any, end: Any, name: str) -> None:
    timelines = watched()
    timelines.arrives(order, 1.0)
    (timelines.did if isinstance(end, Send) else timelines.saw)(end, 2.0)
    assert names(only(timelines))[-1] == name


def test_what_is_not_traced_is_not_watched() -> None:
    timelines = watched()
    timelines.arrives(prefill(traced=False), 1.0)
    assert not timelines.watching
    timelines.arrives(prefill("traced"), 1.0)
    timelines.saw(TransferAcked(*key()), 2.0)
    timelines.did(push(), 2.0)
    timelines.did(tokens(FinishReason.STOP), 2.0)
    timelines.ran(step(("r", 0, 3)), 2.0, 3.0)
    assert timelines.take(3.0) == []
    timelines.saw(Abort(*key("traced")), 4.0)
    assert names(only(timelines)) == ["Prefill arrives", "aborted by the gateway"]


def test_attempts_of_one_request_are_kept_apart_and_an_order_that_comes_twice_is_one() -> None:
    timelines = watched()
    for attempt in (1, 2, 2):
        timelines.arrives(prefill(attempt=attempt), float(attempt))
    timelines.saw(Abort(*key(attempt=1)), 3.0)
    assert only(timelines).attempt == 1
    timelines.saw(TransferAcked(*key(attempt=2)), 4.0)
    assert names(only(timelines)) == ["Prefill arrives", "acked"]


def test_memory_is_bounded() -> None:
    timelines = watched()
    for number in range(MAX_TRACED + 1):
        timelines.arrives(prefill(str(number)), 0.0)
    assert only(timelines).request == "0", "the oldest makes room"
    timelines.arrives(prefill("0"), 0.0)
    assert timelines.take(0.0) == [], "asked again, it has had its timeline"
    for number in range(MAX_MARKS + 5):
        timelines.ran(step(("1", number, 1)), 0.0, 1.0)
    timelines.saw(Abort(*key("1")), 2.0)
    timeline = only(timelines)
    assert len(timeline.marks) == MAX_MARKS
    assert timeline.dropped == 5 + 2  # the order came first, the abort last


def test_a_timeline_ends_with_the_attempt_however_quietly_that_does() -> None:
    """It was dropped while it waited, say, or a newer attempt took its place."""
    timelines = watched()
    for request in ("quiet", "r"):
        timelines.arrives(prefill(request), 0.0)
    timelines.here.remove(key("quiet"))
    timeline = only(timelines)
    assert timeline.request == "quiet" and names(timeline) == ["Prefill arrives", "dropped"]
    assert timelines.watching, "the other one is still here"


class Told:
    """Real machines, whose loops tell timelines what they tell the machine."""

    def __init__(self, who: WorkerAddress) -> None:
        self.pair, self.who = Pair(), who
        self.machine: Any = self.pair.prefill if who is PREFILL else self.pair.decode
        self.timelines = Timelines(who.worker, "clock", self.machine.has)

    def handle(self, event: Any) -> None:
        now = self.pair.now
        new = self.timelines.saw(event, now)
        actions = self.machine.handle(event, now)
        if new:
            self.timelines.begin(event, now)
        for action in actions:
            self.timelines.did(action, now)
        self.pair.see(actions)

    def took(self) -> list[tuple[Address, str]]:
        """To whom timelines go, and with which last mark."""
        sends = self.timelines.take(self.pair.now)
        return [(send.to, send.message.marks[-1].name) for send in sends]  # type: ignore[attr-defined]


def traced_prefill(*, attempt: int = 1, gateway: Address = GATEWAY, cluster_key: bytes = KEY) -> Prefill:
    number = Attempt(attempt)
    ticket = mint(cluster_key, REQUEST, number, PREFILL, DECODE_WORKER)
    generation = Generation(pack_tokens(PROMPT), SamplingParams(max_tokens=2, temperature=0.0), traced=True)
    return Prefill(REQUEST, number, gateway, generation, DECODE_WORKER, ticket)


def traced_open(*, attempt: int = 1, gateway: Address = GATEWAY, cluster_key: bytes = KEY) -> OpenTransfer:
    order = traced_prefill(attempt=attempt, gateway=gateway, cluster_key=cluster_key)
    return OpenTransfer(
        request=order.request, attempt=order.attempt, prefill=PREFILL, gateway=gateway, generation=order.generation,
        transport="zmq", ranks=SOURCE, ticket=order.ticket,
    )  # fmt: skip


ORDERS = pytest.mark.parametrize(("who", "order"), [(PREFILL, traced_prefill), (DECODE_WORKER, traced_open)])


@ORDERS
def test_an_order_without_its_ticket_has_no_timeline_sent_to_where_it_says_that_it_comes_from(
    who: WorkerAddress, order: Any
) -> None:
    told = Told(who)
    told.handle(order(gateway=Address("tcp://10.6.6.6:666"), cluster_key=b"x" * 32))
    assert told.machine.inspect()["forged"] == 1 and not told.timelines.watching
    told.handle(Abort(REQUEST, Attempt(1)))
    assert told.took() == []


@ORDERS
def test_orders_without_a_ticket_do_not_crowd_out_one_with_it(who: WorkerAddress, order: Any) -> None:
    told = Told(who)
    told.handle(order())
    for attempt in range(2, MAX_TRACED + 3):
        told.handle(order(attempt=attempt, cluster_key=b"x" * 32))
    assert told.took() == []
    told.handle(Abort(REQUEST, Attempt(1)))
    assert [to for to, _ in told.took()] == [GATEWAY]


def test_an_order_that_comes_again_after_its_prompt_was_left_to_decode_opens_no_timeline() -> None:
    told = Told(PREFILL)
    told.handle(traced_prefill())
    told.pair.step(PREFILL)
    told.pair.deliver(DECODE_WORKER, OpenTransfer)
    told.pair.step(DECODE_WORKER)
    (offered,) = told.pair.take(PREFILL, TailOffered)
    told.handle(offered)
    assert told.took() == [(GATEWAY, "prompt left to decode")]
    told.handle(traced_prefill())  # the gateway has no token yet
    assert not told.timelines.watching and told.took() == []


@ORDERS
def test_an_attempt_that_a_newer_one_displaces_is_watched_no_longer(who: WorkerAddress, order: Any) -> None:
    """Its ``Abort`` was lost, and it had come so little way that nobody is told of its end."""
    told = Told(who)
    for attempt in (1, 2):
        told.handle(order(attempt=attempt))
    assert told.took() == [(GATEWAY, "dropped")]
    told.handle(Abort(REQUEST, Attempt(2)))
    assert told.took() == [(GATEWAY, "aborted by the gateway")] and not told.timelines.watching

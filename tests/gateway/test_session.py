"""Promise: whatever happens to workers and links, the client gets tokens 0..k once each, in order, and one end."""

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.errors import (
    AttemptsExhausted,
    GatewayError,
    InvalidRequest,
    Overloaded,
    StreamTaken,
    Unavailable,
)
from gateway.core.session import (
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
from messages.common import FailReason, Generation, Logprobs, Ticket, WorkerAddress
from messages.gateway_to_router import Computed, Finished, PlacementWanted, Prefilled
from messages.gateway_to_worker import Abort, EndAck, Generate, Prefill, TokensWanted
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.router_to_gateway import MoveWanted, Placed, Rejected, WorkerLost
from messages.sampling import FinishReason, SamplingParams
from messages.worker_to_gateway import Adopted, AttemptFailed, Superseded, TokenChunk
from router.core.machine import RouterSettings
from runtime.core.actions import Send, WakeAt

REQUEST = RequestId("r")
GATEWAY, ROUTER = Address("gateway"), Address("router")
PROMPT = pack_tokens([1, 2, 3])
TIMEOUTS = SessionTimeouts(ask_again=1, placement=60, first_token=20, silence=5, progress=120, gap=0.25)
MAX_TOKENS = 20


def token(index: int) -> int:
    """The model: what stands at each output position, whoever computes it."""
    return 100 + 7 * index % 50


def worker(name: str, epoch: int = 1) -> WorkerAddress:
    return WorkerAddress(WorkerId(name), Epoch(epoch), Address(f"{name}-mailbox"))


class Play:
    """A session, its clock, and what it has done so far."""

    def __init__(self, *, max_attempts: int = 4, **sampling: Any) -> None:
        fields = {"max_tokens": MAX_TOKENS} | sampling
        self.session = Session(
            REQUEST,
            PROMPT,
            SamplingParams(**fields),
            gateway=GATEWAY,
            router=ROUTER,
            tenant="t",
            timeouts=TIMEOUTS,
            max_attempts=max_attempts,
        )
        self.now = 0.0
        self.tokens: list[int] = []
        self.ends: list[Ended | Failed] = []
        self.wakes: list[float] = []
        self._see(self.session.start(0.0))

    def _see(self, actions: list[Any]) -> list[Send]:
        for action in actions:
            match action:
                case Deliver():
                    assert not self.ends
                    self.tokens += action.tokens
                case Ended() | Failed():
                    self.ends.append(action)
                case WakeAt():
                    self.wakes.append(action.time)
        self.sent = [action for action in actions if isinstance(action, Send)]
        return self.sent

    def handle(self, event: Any) -> list[Send]:
        return self._see(self.session.handle(event, self.now))

    def sleep(self, seconds: float) -> list[Send]:
        """Let time pass; the shell wakes the session when it asked for it."""
        until, sent = self.now + seconds, []
        while self.wakes and min(self.wakes) <= until:
            self.now = max(self.now, min(self.wakes))
            self.wakes.clear()
            sent += self.handle(Tick())
        self.now = until
        self.sent = sent
        return sent

    def place(self, prefill: str | None = "p0", decode: str = "d0", attempt: int | None = None) -> list[Send]:
        decode_worker = worker(decode)
        prefill_worker = None if prefill is None else worker(prefill)
        ticket = None
        if prefill is not None:
            ticket = Ticket(WorkerId(prefill), Epoch(1), WorkerId(decode), Epoch(1), bytes(32))
        number = Attempt(self.session.attempt if attempt is None else attempt)
        placed = Placed(request=REQUEST, attempt=number, prefill=prefill_worker, decode=decode_worker, ticket=ticket)
        return self.handle(placed)

    def chunk(
        self, first: int, last: int, by: str = "d0", attempt: int | None = None, finish: FinishReason | None = None
    ) -> list[Send]:
        """Tokens first..last-1 come from a worker."""
        number = Attempt(self.session.attempt if attempt is None else attempt)
        tokens = pack_tokens([token(i) for i in range(first, last)])
        return self.handle(Chunk(WorkerId(by), TokenChunk(REQUEST, number, first, tokens, finish=finish)))

    def fail(self, reason: FailReason, by: str = "p0", attempt: int | None = None) -> list[Send]:
        number = Attempt(self.session.attempt if attempt is None else attempt)
        return self.handle(
            AttemptFailed(request=REQUEST, attempt=number, worker=WorkerId(by), reason=reason, detail="why")
        )

    def lose(self, name: str, epoch: int = 1, *, dead: bool = True) -> list[Send]:
        return self.handle(WorkerLost(worker=WorkerId(name), epoch=Epoch(epoch), detail="why", dead=dead))

    def sent_to(self, to: str, kind: type[Any]) -> list[Any]:
        return [send.message for send in self.sent if send.to == to and isinstance(send.message, kind)]

    @property
    def delivered_right(self) -> bool:
        return self.tokens == [token(i) for i in range(len(self.tokens))]

    @property
    def error(self) -> GatewayError:
        (end,) = self.ends
        assert isinstance(end, Failed)
        return end.error


@pytest.fixture
def play() -> Play:
    return Play()


def streaming(**sampling: Any) -> Play:
    """A play in which prefill has sent token 0 and decode tokens 1 and 2."""
    play = Play(**sampling)
    play.place()
    play.chunk(0, 1, by="p0")
    play.chunk(1, 3)
    return play


def test_a_request_goes_from_placement_to_its_last_token(play: Play) -> None:
    (wanted,) = play.sent_to(ROUTER, PlacementWanted)
    assert (wanted.attempt, wanted.num_tokens, wanted.max_new_tokens, wanted.gateway) == (1, 3, MAX_TOKENS, GATEWAY)
    play.place()
    (order,) = play.sent_to("p0-mailbox", Prefill)
    assert (order.generation.prompt, order.generation.generated, order.decode.worker) == (PROMPT, b"", "d0")
    play.chunk(0, 1, by="p0")
    assert play.sent_to(ROUTER, Prefilled)
    assert play.chunk(1, 5) == []
    play.chunk(5, MAX_TOKENS, finish=FinishReason.LENGTH)
    assert play.sent_to("d0-mailbox", EndAck) and play.sent_to(ROUTER, Finished)
    assert play.ends == [Ended(FinishReason.LENGTH)]
    assert play.delivered_right and len(play.tokens) == MAX_TOKENS


def test_placed_once_more_it_says_again_that_the_first_token_is_there(play: Play) -> None:
    play.place()
    assert play.place() == []
    play.chunk(0, 1, by="p0")
    assert play.sent_to(ROUTER, Prefilled)
    play.place()
    assert play.sent_to(ROUTER, Prefilled)


def test_the_next_attempt_names_the_pair_between_which_kv_did_not_get_through(play: Play) -> None:
    for attempt, (reason, prefill) in enumerate([(FailReason.TRANSFER, "p0"), (FailReason.REFUSED, "p1")], 1):
        play.place(prefill=prefill)
        play.fail(reason, by=prefill)
        *_, asked = play.sent_to(ROUTER, PlacementWanted)
        assert asked.cut == (("p0", "d0"), ("p1", "d0"))[:attempt]


def test_where_kv_leaves_too_slowly_the_same_prefill_worker_hands_it_to_another(play: Play) -> None:
    play.place()
    play.chunk(0, 1, by="p0")
    play.fail(FailReason.SLOW, by="p0")
    *_, asked = play.sent_to(ROUTER, PlacementWanted)
    assert asked.cut == (("p0", "d0"),) and asked.avoid == ("d0",)
    assert asked.computed is not None and asked.computed.worker == "p0"


def test_without_a_prefill_worker_decode_runs_the_whole_sequence(play: Play) -> None:
    play.place(prefill=None)
    assert play.sent_to("d0-mailbox", Generate)
    play.chunk(0, 2, finish=FinishReason.STOP)
    assert play.ends == [Ended(FinishReason.STOP)]


def test_the_ack_of_an_end_goes_to_the_worker_that_sent_it(play: Play) -> None:
    play.place()
    play.chunk(0, 1, by="p0", finish=FinishReason.STOP)
    assert play.sent_to("p0-mailbox", EndAck) and not play.sent_to("d0-mailbox", EndAck)


def test_an_answer_of_no_tokens_ends_well() -> None:
    play = Play(max_tokens=0, prompt_logprobs=0)
    play.place()
    chunk = TokenChunk(
        REQUEST, Attempt(1), 0, b"", prompt_logprobs=Logprobs((-1.0, -2.0), (1, 1), ((), ()), ((), ())),
        finish=FinishReason.LENGTH,
    )  # fmt: skip
    play.handle(Chunk(WorkerId("p0"), chunk))
    assert play.ends == [Ended(FinishReason.LENGTH)]


def test_repeated_tokens_are_delivered_once() -> None:
    play = streaming()
    play.chunk(1, 3)
    play.chunk(0, 5)
    assert play.delivered_right and len(play.tokens) == 5
    assert play.session.repeated_chunks == 1


def test_after_a_gap_nothing_is_delivered_before_it_is_filled() -> None:
    play = streaming()
    play.chunk(5, 7)
    (wanted,) = play.sent_to("d0-mailbox", TokensWanted)
    assert wanted.index == 3 and len(play.tokens) == 3
    play.chunk(7, 8)
    assert play.sent == [], "asked once, not with every chunk"
    play.sleep(0.3)
    assert play.sent_to("d0-mailbox", TokensWanted), "asked again when nothing came"
    play.chunk(3, 8)
    assert play.delivered_right and len(play.tokens) == 8
    assert play.sleep(1) == [], "nothing is missing any more"


def test_a_lost_first_token_is_asked_of_decode(play: Play) -> None:
    play.place()
    play.chunk(1, 2)
    assert [wanted.index for wanted in play.sent_to("d0-mailbox", TokensWanted)] == [0]
    play.chunk(0, 2)
    assert play.delivered_right and len(play.tokens) == 2


def test_an_end_behind_a_gap_is_not_the_end() -> None:
    play = streaming()
    play.chunk(5, 7, finish=FinishReason.STOP)
    assert play.ends == [] and len(play.tokens) == 3
    play.chunk(0, 7, finish=FinishReason.STOP)
    assert play.ends == [Ended(FinishReason.STOP)] and len(play.tokens) == 7


def test_a_failed_attempt_is_followed_by_one_that_knows_the_tokens_so_far() -> None:
    play = streaming()
    play.fail(FailReason.ENGINE, by="d0")
    assert play.sent_to("p0-mailbox", Abort)[0].attempt == 1 and play.sent_to("d0-mailbox", Abort)
    (wanted,) = play.sent_to(ROUTER, PlacementWanted)
    assert (wanted.attempt, wanted.num_tokens, wanted.max_new_tokens) == (2, 6, MAX_TOKENS - 3)
    assert wanted.avoid == ("d0",)
    play.place("p1", "d1")
    (order,) = play.sent_to("p1-mailbox", Prefill)
    assert unpack_tokens(order.generation.generated).tolist() == play.tokens
    play.chunk(3, 4, by="p1")
    play.chunk(4, MAX_TOKENS, by="d1", finish=FinishReason.LENGTH)
    assert play.delivered_right and len(play.tokens) == MAX_TOKENS


def test_late_tokens_of_an_older_attempt_are_dropped_and_their_sender_is_stopped() -> None:
    play = streaming()
    play.fail(FailReason.TRANSFER, by="d0")
    play.place("p1", "d1")
    play.chunk(3, 6, by="d0", attempt=1)
    assert [abort.attempt for abort in play.sent_to("d0-mailbox", Abort)] == [1]
    play.chunk(3, 6, by="d0", attempt=1, finish=FinishReason.STOP)
    assert [ack.attempt for ack in play.sent_to("d0-mailbox", EndAck)] == [1]
    assert len(play.tokens) == 3 and play.ends == []
    assert play.session.late_chunks == 2


def test_a_late_failure_of_an_older_attempt_changes_nothing() -> None:
    play = streaming()
    play.fail(FailReason.ENGINE, by="d0")
    play.place("p1", "d1")
    assert play.fail(FailReason.ENGINE, attempt=1) == []
    assert play.session.attempt == 2


def test_a_refused_hand_over_blames_decode(play: Play) -> None:
    play.place()
    play.fail(FailReason.REFUSED, by="p0")
    assert play.sent_to(ROUTER, PlacementWanted)[0].avoid == ("d0",)


@pytest.mark.parametrize("how", ["refused", "its peer says that it is lost", "the router says so", "it fails"])
def test_after_decodes_fault_the_router_hears_which_prefill_worker_has_computed_the_prompt(how: str) -> None:
    play = streaming()
    match how:
        case "refused":
            play = Play()
            play.place()
            play.fail(FailReason.REFUSED, by="p0")
        case "its peer says that it is lost":
            play = Play()
            play.place()
            play.fail(FailReason.PEER_LOST, by="p0")
        case "the router says so":
            play.lose("d0")
        case _:
            play.fail(FailReason.ENGINE, by="d0")
    (wanted,) = play.sent_to(ROUTER, PlacementWanted)
    assert wanted.avoid == ("d0",)
    assert wanted.computed == Computed(WorkerId("p0"), Epoch(1), 3)  # what it was given; the rest came from decode
    play.place(None, "d1")  # which dies too: the KV is where it was
    play.lose("d1")
    assert play.sent_to(ROUTER, PlacementWanted)[0].computed == wanted.computed
    play.place("p1", "d2")
    play.lose("d2")
    assert play.sent_to(ROUTER, PlacementWanted)[0].computed == Computed(WorkerId("p1"), Epoch(1), wanted.num_tokens)


@pytest.mark.parametrize("how", ["transfer", "lost"])
def test_a_prefill_worker_that_is_to_blame_is_not_asked_for_its_kv(play: Play, how: str) -> None:
    play.place()
    assert play.lose("p0") if how == "lost" else play.fail(FailReason.TRANSFER, by="p0")
    (wanted,) = play.sent_to(ROUTER, PlacementWanted)
    assert "p0" in wanted.avoid and wanted.computed is None


def test_what_can_never_fit_is_the_requests_fault(play: Play) -> None:
    play.place()
    play.fail(FailReason.CAPACITY)
    assert isinstance(play.error, InvalidRequest) and play.sent_to(ROUTER, Finished)


@pytest.mark.parametrize("lost", ["p0", "d0"])
def test_a_lost_worker_of_the_attempt_starts_the_next(play: Play, lost: str) -> None:
    play.place()
    play.chunk(0, 1, by="p0")
    play.lose(lost)
    (wanted,) = play.sent_to(ROUTER, PlacementWanted)
    assert (wanted.attempt, wanted.avoid) == (2, (lost,))


def test_other_workers_and_other_incarnations_may_die(play: Play) -> None:
    play.place()
    assert play.lose("d7") == [] and play.lose("d0", epoch=2) == []


def test_the_prefill_worker_may_die_once_decode_streams() -> None:
    play = streaming()
    assert play.lose("p0") == []
    assert play.lose("d0")


@pytest.mark.parametrize("reason", FailReason)
def test_the_prefill_worker_may_fail_once_decode_streams(reason: FailReason) -> None:
    play = streaming()
    assert play.fail(reason, by="p0") == []
    play.chunk(3, MAX_TOKENS, finish=FinishReason.LENGTH)
    assert play.ends == [Ended(FinishReason.LENGTH)] and play.session.attempt == 1


def test_decode_streams_also_behind_a_gap(play: Play) -> None:
    play.place()
    play.chunk(1, 3)
    assert play.fail(FailReason.TRANSFER, by="p0") == [] and play.lose("p0") == []
    play.chunk(0, 3)
    assert play.session.attempt == 1 and len(play.tokens) == 3


@pytest.mark.parametrize("first_token", [False, True])
@pytest.mark.parametrize("reason", [reason for reason in FailReason if reason.retryable])
def test_a_failure_of_prefill_before_decode_streams_starts_the_next(
    play: Play, reason: FailReason, first_token: bool
) -> None:
    play.place()
    if first_token:
        play.chunk(0, 1, by="p0")
    play.fail(reason, by="p0")
    assert play.session.attempt == 2 and play.sent_to("d0-mailbox", Abort)
    play.place("p1", "d1")
    play.chunk(len(play.tokens), MAX_TOKENS, by="d1", finish=FinishReason.LENGTH)
    assert play.ends == [Ended(FinishReason.LENGTH)] and play.delivered_right


def test_decodes_own_failure_counts_while_it_streams() -> None:
    play = streaming()
    play.fail(FailReason.STOPPING, by="d0")
    assert play.session.attempt == 2


def test_an_unanswered_placement_is_asked_for_again_ever_less_often(play: Play) -> None:
    times = []
    for _ in range(16):
        if [send for send in play.sleep(1) if isinstance(send.message, PlacementWanted)]:
            times.append(play.now)
    assert times == [1, 3, 7, 15]


def test_an_unanswered_start_is_sent_again(play: Play) -> None:
    play.place()
    play.sleep(1.1)
    assert play.sent_to("p0-mailbox", Prefill)


def test_a_router_that_never_answers_is_an_error_in_the_end(play: Play) -> None:
    play.sleep(61)
    assert isinstance(play.error, Unavailable) and play.error.retry_after is not None


@pytest.mark.parametrize("decode_streams", [False, True])
def test_a_silent_stream_is_asked_for_and_keeps_its_attempt(play: Play, decode_streams: bool) -> None:
    """Decode is busy: the first token is there, and the others wait for a slot; or for room after a preemption."""
    play.place()
    play.chunk(0, 3 if decode_streams else 1, by="p0")
    if decode_streams:
        play.chunk(3, 4)
    have, asked = len(play.tokens), []
    for second in range(119):
        for send in play.sleep(1):
            if send.to == "p0-mailbox":
                assert isinstance(send.message, Prefill) and not decode_streams and not asked
                continue
            assert send.to == "d0-mailbox" and isinstance(send.message, TokensWanted), "no other worker is asked"
            assert (send.message.attempt, send.message.index) == (1, have)
            asked.append(second + 1)
            play.chunk(have, have)  # "nothing yet"
    assert asked[:3] == [5, 13, 21], "ever less often"
    play.chunk(have, MAX_TOKENS, finish=FinishReason.LENGTH)
    assert play.ends == [Ended(FinishReason.LENGTH)] and play.delivered_right
    assert (play.session.attempt, play.session.repeated_chunks) == (1, 0)


def test_the_last_tokens_before_a_silence_may_be_lost() -> None:
    play = streaming()
    assert [send.message for send in play.sleep(5)] == [
        TokensWanted(request=REQUEST, attempt=Attempt(1), index=3, gateway=GATEWAY)
    ]
    play.chunk(3, 6)
    assert play.delivered_right and len(play.tokens) == 6


def test_a_stream_that_flows_is_not_asked_for() -> None:
    play = streaming()
    for i in range(3, 13):
        assert play.sleep(4) == []
        play.chunk(i, i + 1)


def test_a_stream_that_stands_still_is_taken_elsewhere_in_the_end() -> None:
    play = streaming()
    play.sleep(121)
    assert play.session.attempt == 2 and play.session.status is Status.PLACING
    assert play.sent_to("d0-mailbox", Abort)
    assert play.sent_to(ROUTER, PlacementWanted)[0].avoid == ("d0",)


def test_tokens_push_the_deadline_back() -> None:
    play = streaming()
    for i in range(3, 10):
        play.sleep(100)
        play.chunk(i, i + 1)
    assert play.session.attempt == 1


def test_an_attempt_that_never_begins_is_taken_elsewhere(play: Play) -> None:
    play.place()
    play.sleep(21)
    assert play.session.attempt == 2
    assert play.sent_to(ROUTER, PlacementWanted)[0].avoid == ("p0", "d0")


def test_after_the_last_attempt_there_is_one_typed_error() -> None:
    play = Play(max_attempts=2)
    for _ in range(2):
        play.place()
        play.fail(FailReason.ENGINE)
    assert isinstance(play.error, AttemptsExhausted)
    assert play.sent_to(ROUTER, Finished) and play.sent_to("p0-mailbox", Abort)


@pytest.mark.parametrize(("retry_after", "error"), [(2.0, Overloaded), (None, InvalidRequest)])
def test_a_rejection_says_whether_to_come_again(play: Play, retry_after: float | None, error: type[Exception]) -> None:
    play.handle(Rejected(request=REQUEST, attempt=Attempt(1), detail="full", retry_after=retry_after))
    assert type(play.error) is error and play.error.retry_after == retry_after


@pytest.mark.parametrize("placed", [True, False])
def test_a_client_that_goes_away_frees_everything_at_once(play: Play, placed: bool) -> None:
    if placed:
        play.place()
    play.handle(ClientGone())
    assert bool(play.sent_to("p0-mailbox", Abort)) is placed and bool(play.sent_to("d0-mailbox", Abort)) is placed
    assert play.sent_to(ROUTER, Finished)
    assert play.ends == [Ended(FinishReason.ABORT)] and play.session.status is Status.CANCELLED


def test_a_stop_string_ends_the_request_and_the_work() -> None:
    play = streaming()
    play.handle(StopMatched())
    assert play.sent_to("d0-mailbox", Abort) and play.ends == [Ended(FinishReason.STOP)]


def test_a_shutdown_is_an_error_for_the_client_and_an_abort_for_the_workers() -> None:
    play = streaming()
    play.handle(ShutDown())
    assert isinstance(play.error, Unavailable) and play.sent_to("d0-mailbox", Abort)


@pytest.mark.parametrize("end", [ClientGone(), StopMatched(), ShutDown()], ids=["gone", "stopped", "shut down"])
def test_after_the_end_nothing_happens_any_more(end: Any) -> None:
    play = streaming()
    play.handle(end)
    assert len(play.ends) == 1
    for event in (ClientGone(), StopMatched(), ShutDown(), Tick()):
        assert play.handle(event) == []
    assert play.place() == play.lose("d0") == play.fail(FailReason.ENGINE) == play.fail(FailReason.CAPACITY) == []
    assert play.sleep(1000) == []
    assert len(play.ends) == 1 and len(play.tokens) == 3


def test_whoever_still_sends_for_an_ended_request_is_answered() -> None:
    more = TokenChunk(REQUEST, Attempt(3), 0, pack_tokens([1]))
    last = TokenChunk(REQUEST, Attempt(3), 0, pack_tokens([1]), finish=FinishReason.STOP)
    assert answer_to_unwanted(Address("d"), more) == Send(Address("d"), Abort(request=REQUEST, attempt=Attempt(3)))
    assert isinstance(answer_to_unwanted(Address("d"), last).message, EndAck)


def test_prompt_logprobs_are_computed_once(play: Play) -> None:
    play = Play(prompt_logprobs=0)
    play.place()
    scores = Logprobs((-1.0, -2.0), (1, 1), ((), ()), ((), ()))
    play.handle(Chunk(WorkerId("p0"), TokenChunk(REQUEST, Attempt(1), 0, pack_tokens([token(0)]), None, scores)))
    play.fail(FailReason.ENGINE)
    play.place()
    assert play.sent_to("p0-mailbox", Prefill)[0].generation.sampling.prompt_logprobs is None


@pytest.mark.parametrize(
    "chunk",
    [
        TokenChunk(REQUEST, Attempt(1), 3, pack_tokens([-1])),
        TokenChunk(REQUEST, Attempt(1), 3, pack_tokens([1] * MAX_TOKENS)),
        TokenChunk(REQUEST, Attempt(1), 3, pack_tokens([1, 2]), Logprobs((-1.0,), (1,), ((),), ((),))),
    ],
    ids=["negative id", "more than max_tokens", "logprobs of another length"],
)
def test_chunks_that_make_no_sense_are_dropped(chunk: TokenChunk) -> None:
    play = streaming()
    assert play.handle(Chunk(WorkerId("d0"), chunk)) == []
    assert len(play.tokens) == 3 and play.session.bad_chunks == 1


def test_the_router_speaks_before_the_session_loses_patience() -> None:
    wait_timeout = next(field.default for field in fields(RouterSettings) if field.name == "wait_timeout")
    assert SessionTimeouts().placement > 2 * wait_timeout


def test_an_illegal_move_tells_the_requests_story(play: Play) -> None:
    with pytest.raises(AssertionError, match=r"request r cannot go from placing to streaming(?s:.*)Placed") as raised:
        play.place(attempt=9)
        play.session._move(Status.STREAMING)
    assert "placing #1" in str(raised.value)


EVENTS = st.one_of(
    st.tuples(st.just("place"), st.sampled_from([None, "p0", "p1"]), st.sampled_from(["d0", "d1"])),
    st.tuples(
        st.just("chunk"),
        st.sampled_from(["p0", "p1", "d0", "d1"]),
        st.integers(0, 1),  # attempts back
        st.integers(0, MAX_TOKENS),
        st.integers(0, 6),
    ),
    st.tuples(st.just("next"), st.integers(-3, 3), st.integers(0, 5)),
    st.tuples(st.just("fail"), st.sampled_from(list(FailReason)), st.integers(0, 1)),
    st.tuples(st.just("lose"), st.sampled_from(["p0", "p1", "d0", "d1"])),
    st.tuples(st.just("sleep"), st.sampled_from([0.1, 1.0, 15.0, 70.0, 130.0])),
    st.tuples(
        st.just("reject"),
    ),
    st.tuples(
        st.just("stop"),
    ),
    st.tuples(
        st.just("gone"),
    ),
)
MOSTLY = st.lists(EVENTS.filter(lambda event: event[0] not in ("reject", "stop", "gone")), max_size=40)


def finish_of(last: int) -> FinishReason | None:
    return FinishReason.LENGTH if last == MAX_TOKENS else None


def perform(play: Play, event: tuple[Any, ...]) -> None:
    match event:
        case ("place", prefill, decode):
            play.place(prefill, decode)
        case ("chunk", by, back, first, length):
            last = min(first + length, MAX_TOKENS)
            play.chunk(first, last, by, max(1, play.session.attempt - back), finish_of(last))
        case ("next", shift, length) if play.session.placed is not None:
            first = min(max(0, len(play.tokens) + shift), MAX_TOKENS)
            last = min(first + length, MAX_TOKENS)
            play.chunk(first, last, play.session.placed.decode.worker, finish=finish_of(last))
        case ("fail", reason, back):
            play.fail(reason, attempt=max(1, play.session.attempt - back))
        case ("lose", name):
            play.lose(name)
        case ("sleep", seconds):
            play.sleep(seconds)
        case ("reject",):
            play.handle(Rejected(request=REQUEST, attempt=play.session.attempt, detail="", retry_after=None))
        case ("stop",):
            play.handle(StopMatched())
        case ("gone",):
            play.handle(ClientGone())


@settings(max_examples=300, derandomize=True)
@given(events=MOSTLY, last=EVENTS)
def test_any_order_of_events_delivers_each_token_once_and_ends_once(events: list[Any], last: Any) -> None:
    play = Play()
    for event in [*events, last]:
        perform(play, event)
        assert play.delivered_right
        assert unpack_tokens(bytes(play.session.generated)).tolist() == play.tokens
    # Whatever came before: with nobody answering any more, and time passing, there is one end.
    play.sleep(2000)
    assert len(play.ends) == 1
    assert play.session.status.over
    if play.ends == [Ended(FinishReason.LENGTH)]:
        assert len(play.tokens) == MAX_TOKENS


@settings(max_examples=100, derandomize=True)
@given(events=MOSTLY)
def test_after_any_trouble_working_workers_complete_the_answer(events: list[Any]) -> None:
    play = Play(max_attempts=1000)
    for event in events:
        if event[:2] != ("fail", FailReason.CAPACITY) and event not in (("sleep", 70.0), ("sleep", 130.0)):
            perform(play, event)
    while not play.session.status.over:
        if play.session.placed is None:
            play.place()
        play.chunk(len(play.tokens), len(play.tokens) + 1, play.session.placed.decode.worker,
                   finish=finish_of(len(play.tokens) + 1))  # fmt: skip
    assert play.ends == [Ended(FinishReason.LENGTH)] and play.delivered_right and len(play.tokens) == MAX_TOKENS


def want_move(play: Play, name: str = "d0", epoch: int = 1) -> list[Send]:
    return play.handle(MoveWanted(request=REQUEST, worker=WorkerId(name), epoch=Epoch(epoch)))


def test_a_stream_goes_on_while_the_next_attempt_is_asked_for_and_then_takes_its_kv_along() -> None:
    play = streaming()
    (send,) = want_move(play)
    wanted = send.message
    assert isinstance(wanted, PlacementWanted)
    assert (wanted.attempt, wanted.moving, wanted.num_tokens, wanted.avoid) == (2, True, 6, ())
    assert wanted.computed == Computed(WorkerId("d0"), Epoch(1), 6)
    play.chunk(3, 5, attempt=1)
    play.place("d0", "d1", attempt=2)
    (order,) = play.sent_to("d0-mailbox", Prefill)
    assert (order.attempt, order.decode.worker, unpack_tokens(order.generation.generated).tolist()) == (
        2, "d1", [token(i) for i in range(5)],
    )  # fmt: skip
    play.chunk(5, 7, attempt=1)  # made before the order came
    assert [abort.attempt for abort in play.sent_to("d0-mailbox", Abort)] == [1]
    play.chunk(5, 6, by="d0")
    assert play.sent_to(ROUTER, Prefilled)
    play.chunk(6, MAX_TOKENS, by="d1", finish=FinishReason.LENGTH)
    assert play.sent_to("d1-mailbox", EndAck)
    assert play.delivered_right and play.ends == [Ended(FinishReason.LENGTH)]


def test_what_is_said_again_is_asked_again_and_moves_once() -> None:
    play = streaming()
    first, second = want_move(play), want_move(play)
    assert first == second
    play.place("d0", "d1", attempt=2)
    play.place("d0", "d1", attempt=2)
    assert play.sent == []
    play.chunk(3, 4, by="d0")
    play.chunk(4, 5, by="d1")
    assert want_move(play) == []  # late: it is not there any more
    (send,) = want_move(play, "d1")
    assert isinstance(send.message, PlacementWanted) and send.message.attempt == 3


@pytest.mark.parametrize("case", ["no token yet", "its KV is on the way", "another worker", "another process"])
def test_nobody_moves_but_what_the_worker_decodes(case: str) -> None:
    play = Play()
    play.place()
    if case != "no token yet":
        play.chunk(0, 1, by="p0")
    if case in ("another worker", "another process"):
        play.chunk(1, 3)
    assert want_move(play, "d9" if case == "another worker" else "d0", 2 if case == "another process" else 1) == []


def test_where_no_room_is_found_it_stays_and_ends_there() -> None:
    play = streaming()
    want_move(play)
    play.sleep(4)
    play.chunk(3, MAX_TOKENS, finish=FinishReason.LENGTH)
    assert play.sent_to("d0-mailbox", EndAck)
    assert [finished.attempt for finished in play.sent_to(ROUTER, Finished)] == [2]  # if it is placed it is over too
    assert play.ends == [Ended(FinishReason.LENGTH)] and play.delivered_right


def test_moves_cost_no_attempts_and_blame_nobody() -> None:
    play = streaming(max_attempts=2)
    for number in range(6):
        source, target = ("d0", "d1") if number % 2 == 0 else ("d1", "d0")
        want_move(play, source)
        play.place(source, target, attempt=play.session.attempt + 1)
        have = len(play.tokens)
        play.chunk(have, have + 1, by=source)
        play.chunk(have + 1, have + 2, by=target)
    play.lose("d0")
    (wanted,) = play.sent_to(ROUTER, PlacementWanted)
    assert (wanted.attempt, wanted.moving) == (8, False) and not play.ends
    assert play.delivered_right


@pytest.mark.parametrize("who", ["d0", "d1"])
def test_a_move_that_fails_is_an_attempt_like_any_other(who: str) -> None:
    play = streaming()
    want_move(play)
    if who == "d0":  # before there is an answer
        play.lose("d0")
    else:
        play.place("d0", "d1", attempt=2)
        play.fail(FailReason.REFUSED, by="d0")
    (wanted,) = play.sent_to(ROUTER, PlacementWanted)
    assert (wanted.attempt, wanted.moving) == (3, False)
    play.place("d0", "d1", attempt=2)  # too late
    assert play.sent == []
    play.place("p1", "d2")
    play.chunk(3, 4, by="p1")
    play.chunk(4, MAX_TOKENS, by="d2", finish=FinishReason.LENGTH)
    assert play.delivered_right and play.ends == [Ended(FinishReason.LENGTH)]


@pytest.mark.parametrize("streaming_on", [False, True])
def test_a_stream_that_another_gateway_has_taken_ends_whatever_was_placed_in_its_stead(streaming_on: bool) -> None:
    play = streaming()
    play.lose("d0", dead=False)
    play.place(prefill=None, decode="d1")
    if streaming_on:
        play.chunk(3, 4, by="d1")
    sends = play.handle(Superseded(request=REQUEST, attempt=Attempt(1), worker=WorkerId("d0")))
    assert [type(send.message) for send in sends] == [Abort, Finished]
    assert {send.message.attempt for send in sends} == {2}, "the other gateway goes on with the third"
    assert isinstance(play.error, StreamTaken)


def test_what_was_taken_by_an_attempt_that_this_one_has_fenced_is_this_ones() -> None:
    play = streaming()
    for decode in ("d1", "d2"):
        play.lose(play.session.placed.decode.worker, dead=False)  # type: ignore[union-attr]
        play.place(prefill=None, decode=decode)
    assert play.handle(Superseded(request=REQUEST, attempt=Attempt(1), worker=WorkerId("d0"))) == []
    assert not play.ends


def test_until_decode_has_sent_a_token_a_silent_stream_asks_both_workers(play: Play) -> None:
    play.place()
    play.chunk(0, 1, by="p0")
    assert [type(send.message) for send in play.sleep(5)] == [Prefill, TokensWanted]
    play.chunk(1, 2)
    assert [type(send.message) for send in play.sleep(5)] == [TokensWanted]


@pytest.mark.parametrize("prefill", [None, "p0"])
def test_until_the_first_token_is_there_decode_is_asked_too(play: Play, prefill: str | None) -> None:
    """Prefill's token was lost, and prefill has done its part; so was decode's word that it has failed."""
    play.place(prefill)
    first, order = ("d0-mailbox", Generate) if prefill is None else ("p0-mailbox", Prefill)
    sends = [(send.to, type(send.message)) for send in play.sleep(1)]
    assert sends == [(first, order), ("d0-mailbox", TokensWanted)]
    play.fail(FailReason.ENGINE, by="d0")
    assert play.sent_to(ROUTER, PlacementWanted)[0].attempt == 2


def test_an_attempt_that_its_worker_does_not_know_any_more_costs_a_mishap() -> None:
    play = streaming()
    play.fail(FailReason.UNKNOWN, by="d0")
    (asked,) = play.sent_to(ROUTER, PlacementWanted)
    assert (asked.attempt, asked.avoid) == (2, ())


def test_an_adopted_attempt_without_a_token_is_placed_beyond_what_the_gateway_before_may_have_asked_for() -> None:
    work = Generation(prompt=PROMPT, sampling=SamplingParams(max_tokens=MAX_TOKENS), description=b"x")
    adopted = Adopted(
        request=REQUEST, attempt=Attempt(3), worker=worker("d0"), generation=work,
        tokens=TokenChunk(REQUEST, Attempt(3), 0, b""), running=False,
    )  # fmt: skip
    session = Session(
        REQUEST, PROMPT, work.sampling, gateway=GATEWAY, router=ROUTER, tenant="t", timeouts=TIMEOUTS, max_attempts=4
    )
    sends = [action.message for action in session.adopt(adopted, 0.0) if isinstance(action, Send)]
    assert [(type(each), each.attempt) for each in sends] == [(Abort, 3), (PlacementWanted, 5)]  # type: ignore[attr-defined]

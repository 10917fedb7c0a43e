"""Promise: a gateway can get every token of a stream until it has acked the end."""

from messages.codec import unpack_tokens
from messages.common import Logprobs
from messages.ids import Address, Attempt, RequestId, WorkerId
from messages.sampling import FinishReason
from messages.worker_to_gateway import TokenBatch, TokenChunk
from runtime.core.actions import Send
from runtime.core.deliveries import FORGET_AFTER, RESEND_AFTER, Deliveries
from runtime.core.fences import Fences

ONE, TWO = RequestId("1" * 32), RequestId("2" * 32)
HERE, THERE = Address("tcp://here"), Address("tcp://there")


def made() -> Deliveries:
    return Deliveries(WorkerId("decode-0"))


def chunks(sends: list[Send]) -> list[TokenChunk]:
    found = []
    for send in sends:
        assert isinstance(send.message, TokenBatch)
        found += send.message.chunks
    return found


def tokens(chunk: TokenChunk) -> list[int]:
    return unpack_tokens(chunk.tokens).tolist()


def test_a_step_makes_one_batch_a_gateway() -> None:
    deliveries = made()
    deliveries.open(ONE, Attempt(1), HERE, 0)
    deliveries.open(TWO, Attempt(1), HERE, 5)
    deliveries.open(RequestId("3"), Attempt(1), THERE, 0)
    for request in (ONE, TWO, RequestId("3")):
        deliveries.add(request, 7)
    sends = deliveries.flush(0.0)
    assert [send.to for send in sends] == [HERE, THERE]
    assert [(chunk.request, chunk.index, tokens(chunk)) for chunk in chunks(sends)] == [
        (ONE, 0, [7]), (TWO, 5, [7]), (RequestId("3"), 0, [7]),
    ]  # fmt: skip
    assert deliveries.flush(0.0) == []


def test_positions_count_on_over_flushes() -> None:
    deliveries = made()
    deliveries.open(ONE, Attempt(2), HERE, 10)
    positions = []
    for token in range(3):
        deliveries.add(ONE, token)
        positions += [(chunk.index, tokens(chunk)) for chunk in chunks(deliveries.flush(0.0))]
    assert positions == [(10, [0]), (11, [1]), (12, [2])]


def test_an_unacked_end_is_sent_again_with_every_token_and_forgotten_in_the_end() -> None:
    deliveries = made()
    deliveries.open(ONE, Attempt(1), HERE, 0)
    deliveries.add(ONE, 4)
    deliveries.flush(0.0)
    deliveries.add(ONE, 5)
    deliveries.finish(ONE, FinishReason.STOP)
    assert chunks(deliveries.flush(0.0))[0].finish is FinishReason.STOP
    assert deliveries.tick(RESEND_AFTER / 2) == []
    again = chunks(deliveries.tick(RESEND_AFTER))[0]
    assert (again.index, tokens(again), again.finish) == (0, [4, 5], FinishReason.STOP)
    deliveries.tick(FORGET_AFTER)
    assert len(deliveries) == 0
    assert deliveries.wake_at == float("inf")


def test_an_acked_end_is_forgotten_at_once_and_an_ack_of_another_attempt_is_not_heeded() -> None:
    deliveries = made()
    deliveries.open(ONE, Attempt(2), HERE, 0)
    deliveries.add(ONE, 4)
    deliveries.finish(ONE, FinishReason.LENGTH)
    deliveries.flush(0.0)
    deliveries.close(ONE, Attempt(1))
    assert len(deliveries) == 1
    deliveries.close(ONE, Attempt(2))
    assert len(deliveries) == 0


def test_tokens_that_another_worker_delivers_are_kept_for_a_resend() -> None:
    deliveries = made()
    deliveries.open(ONE, Attempt(1), HERE, 3, kv_bytes=99)
    deliveries.add(ONE, 1, Logprobs((-0.5,), (1,), ((),), ((),)), deliver=False)
    assert deliveries.flush(0.0) == []
    deliveries.add(ONE, 2, Logprobs((-0.25,), (2,), ((),), ((),)))
    first = chunks(deliveries.flush(0.0))[0]
    assert (first.index, tokens(first), first.kv_bytes) == (4, [2], 99)
    again = chunks(deliveries.resend(ONE, Attempt(1), 3))[0]
    assert (again.index, tokens(again)) == (3, [1, 2])
    assert again.logprobs is not None and again.logprobs.sampled == (-0.5, -0.25)
    assert deliveries.resend(ONE, Attempt(2), 3) == []


def test_a_fence_lets_only_newer_attempts_in() -> None:
    fences = Fences(remembered=2)
    assert fences.admits(ONE, Attempt(1))
    fences.raise_to(ONE, Attempt(2))
    assert not fences.admits(ONE, Attempt(1)) and not fences.admits(ONE, Attempt(2))
    assert fences.admits(ONE, Attempt(3)) and fences.admits(TWO, Attempt(1))
    fences.raise_to(ONE, Attempt(1))
    assert not fences.admits(ONE, Attempt(2))

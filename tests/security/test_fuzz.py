"""Promise (rows 1, 7 and 8): whatever bytes come, a decoder answers with a message or with its refusal, soon, and keeps
nothing of them. `python -m tests.security.fuzz` does the same a million times."""

from random import Random

import msgspec
import pytest

from messages.codec import BadMessage, decoder_for, encode
from tests.security import fuzz
from tests.security.samples import fields_of, kinds, sample

FRAMES = 20_000


def test_mutated_frames_are_refused_or_messages() -> None:
    report = fuzz.fuzz(FRAMES, seed=7)
    assert not report.problems
    assert report.frames == FRAMES and min(report.by_target.values()) > FRAMES // 100
    assert report.decoded > FRAMES // 100, "hardly a frame was nearly right"


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_what_is_drawn_is_what_a_peer_might_send(kind: type) -> None:
    decode, rng = decoder_for(kind), Random(kind.__name__)
    for _ in range(5):
        message = sample(kind, rng)
        assert decode(encode(message)) == message
        fields = fields_of(message)
        with pytest.raises(BadMessage):
            decode(msgspec.msgpack.encode({**fields, "surplus": 1}))


def test_a_decoder_that_fails_otherwise_is_found() -> None:
    def careless(frame: bytes) -> object:
        return {}[frame]

    report = fuzz.Report()
    fuzz._try(fuzz.Target("careless", careless, BadMessage, []), b"x", report)
    assert "careless raised KeyError" in report.problems[0]

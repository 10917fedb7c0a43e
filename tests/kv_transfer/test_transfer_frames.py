"""Promise: a header is what a sender of ours would send, or it is ``BadMessage``."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.core.frames import MAX_BLOCKS, MAX_PART_BYTES, DataHeader, Taken, decode_header, whole_blocks
from messages.codec import BadMessage, encode
from messages.ids import Attempt, RequestId

HEADER = DataHeader(
    RequestId("a" * 32),
    Attempt(1),
    number=0,
    first=3,
    count=2,
    block_bytes=512,
    first_layer=2,
    num_layers=3,
    first_head=0,
    num_heads=4,
)


def test_a_header_survives_the_wire() -> None:
    assert decode_header(encode(HEADER)) == HEADER


@given(st.binary(max_size=200))
def test_random_bytes_are_no_header(frame: bytes) -> None:
    with pytest.raises(BadMessage):
        decode_header(frame)


@given(st.integers(0, len(encode(HEADER)) - 1), st.integers(0, 255))
def test_a_damaged_header_decodes_within_bounds_or_not_at_all(place: int, byte: int) -> None:
    frame = bytearray(encode(HEADER))
    frame[place] = byte
    try:
        header = decode_header(bytes(frame))
    except BadMessage:
        return
    assert 1 <= header.count <= MAX_BLOCKS and 1 <= header.block_bytes <= MAX_PART_BYTES and header.first >= 0


@pytest.mark.parametrize(
    "change",
    [
        {"count": 0}, {"count": -1}, {"count": 2**16 + 1}, {"count": 2.0}, {"count": None},
        {"count": msgspec.msgpack.Ext(4, b"cos\nsystem\n.")}, {"first": -1}, {"first": 2**40},
        {"num_heads": 0}, {"num_heads": 2**20}, {"first_head": -1}, {"block_bytes": 0},
        {"block_bytes": 2**63}, {"number": -1}, {"attempt": 0}, {"attempt": True},
        {"request": 7}, {"request": b"x"}, {"surplus": 1}, {"type": "Taken"},
    ],
)  # fmt: skip
def test_values_out_of_bounds_are_refused(change: dict[str, object]) -> None:
    fields = msgspec.to_builtins(HEADER) | change
    with pytest.raises(BadMessage):
        decode_header(msgspec.msgpack.encode(fields))


def test_a_message_of_another_direction_is_refused() -> None:
    with pytest.raises(BadMessage):
        decode_header(encode(Taken(number=1)))


def test_parts_must_be_just_the_blocks_announced() -> None:
    assert whole_blocks(HEADER, [1024]) and whole_blocks(HEADER, [512, 512])
    assert not any(whole_blocks(HEADER, sizes) for sizes in ([], [512], [1024, 0], [256, 768], [1536], [512] * 3))

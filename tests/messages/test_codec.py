"""Promise: only well-formed, bounded messages get in, and they come out as they went in."""

from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from messages.codec import BadMessage, decoder_for, encode, pack_tokens, unpack_tokens
from messages.common import Generation, WorkerAddress
from messages.decode_to_prefill import BlocksWanted, TransferAccepted
from messages.gateway_to_router import ClusterStateWanted
from messages.gateway_to_worker import Abort, EndAck, Generate
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.prefill_to_decode import EndTransfer, TransferClosed
from messages.sampling import SamplingParams
from messages.tickets import mint, valid

decode = decoder_for(Generate, Abort)
REQUEST = RequestId("0" * 32)
END: dict[str, Any] = {"mailbox": "tcp://127.0.0.1:1", "round": 1, "first": [1], "num_blocks": 0, "digests": b""}


def generate(**sampling: object) -> Generate:
    generation = Generation(pack_tokens([1, 2, 3]), SamplingParams(max_tokens=5, **sampling))  # type: ignore[arg-type]
    return Generate(REQUEST, Attempt(1), Address("tcp://127.0.0.1:1"), generation)


def test_a_message_survives_the_wire() -> None:
    message = generate(logit_bias={7: -1.5}, stop_token_ids=(4, 5), seed=2**63 - 1)
    assert decode(encode(message)) == message


def test_another_implementation_of_messagepack_reads_our_frames() -> None:
    plain = msgpack.unpackb(encode(generate()))
    assert plain["type"] == "Generate"
    assert np.frombuffer(plain["generation"][0], "<i4").tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xc1", id="never used opcode"),
        pytest.param(encode(generate())[:-1], id="truncated"),
        pytest.param(encode(generate()) + b"\x00", id="bytes left over"),
        pytest.param(encode(EndAck(REQUEST, Attempt(1))), id="message for another receiver"),
        pytest.param(msgpack.packb({"type": "Abort", "request": "x", "attempt": 1, "more": 1}), id="unknown field"),
        pytest.param(msgpack.packb({"type": "Abort", "request": "x", "attempt": 0}), id="attempt below 1"),
        pytest.param(msgpack.packb({"type": "Abort", "request": "x", "attempt": "1"}), id="text for a number"),
        pytest.param(msgpack.packb({"type": "Abort", "request": b"x", "attempt": 1}), id="bytes for text"),
        pytest.param(msgpack.packb({"type": "Abort", "request": "x"}), id="missing field"),
        pytest.param(
            msgpack.packb({"type": "Abort", "request": msgpack.ExtType(5, b"x"), "attempt": 1}), id="extension"
        ),
        pytest.param(b"\x81" * 100_000, id="deep nesting"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="map of 2**32 entries"),
    ],
)
def test_malformed_frames_are_refused(frame: bytes) -> None:
    with pytest.raises(BadMessage):
        decode(frame)


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(frame: bytes) -> None:
    with pytest.raises(BadMessage):
        decode(frame)


@given(st.data())
def test_mutated_frames_are_a_message_or_refused(data: st.DataObject) -> None:
    frame = bytearray(encode(generate()))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = decode(bytes(frame))
    except BadMessage:
        return
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("inf")},
        {"seed": -1},
        {"logprobs": 21},
        {"stop_token_ids": (-1,)},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": dict.fromkeys(range(2000), 0.0)},
    ],
)
def test_sampling_bounds_hold_wherever_parameters_are_made(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        generate(**bad)


def test_a_prompt_of_half_a_token_is_refused() -> None:
    with pytest.raises(BadMessage):
        unpack_tokens(b"\x00" * 5)
    frame = encode(generate()).replace(pack_tokens([1, 2, 3]), b"\x00" * 11 + b"\x01")
    assert decode(frame).generation.num_tokens == 3
    with pytest.raises(ValueError, match="no token"):
        Generation(b"", SamplingParams(max_tokens=1))


@pytest.mark.parametrize(
    "address",
    [
        "", "nonsense", "tcp://localhost", "tcp://:1", "tcp://127.0.0.1:0", "tcp://127.0.0.1:*", "tcp://*:1",
        "tcp://127.0.0.1:1\n", "tcp://127.0.0.1:1;tcp://10.0.0.1:2", "tcp://10.0.0.1:1:2", "ipc:///tmp/socket",
        "inproc://wake", "udp://127.0.0.1:1", "tcp://127.0.0.1:123456", "tcp://" + "a" * 300 + ":1", "tcp://[::1]x:1",
    ],
)  # fmt: skip
def test_what_is_no_address_does_not_get_in(address: str) -> None:
    frame = encode(ClusterStateWanted(gateway=Address(address)))
    with pytest.raises(BadMessage):
        decoder_for(ClusterStateWanted)(frame)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:40123", "tcp://[::1]:65535", "tcp://node-7.example.org:1"])
def test_addresses_of_either_family_and_names_do(address: str) -> None:
    message = ClusterStateWanted(gateway=Address(address))
    assert decoder_for(ClusterStateWanted)(encode(message)) == message


BAD_PARTS = [
    pytest.param(TransferAccepted, {"blocks": b"12345", "cached_blocks": 0}, id="blocks of five bytes"),
    pytest.param(TransferAccepted, {"blocks": b"", "cached_blocks": -1}, id="cached blocks below none"),
    pytest.param(BlocksWanted, {"round": 1, "indices": b"1"}, id="an index of one byte"),
    pytest.param(TransferClosed, {"reason": "x" * 2001, "epoch": 1}, id="an endless reason"),
    pytest.param(EndTransfer, {**END, "first": [2**31]}, id="a token beyond int32"),
    pytest.param(EndTransfer, {**END, "first": [-1]}, id="a token below none"),
    pytest.param(EndTransfer, {**END, "mailbox": "nonsense"}, id="no mailbox"),
]


@pytest.mark.parametrize(("kind", "fields"), BAD_PARTS)
def test_lengths_and_bounds_are_checked_before_a_core_sees_a_message(kind: Any, fields: dict[str, Any]) -> None:
    frame = msgpack.packb({"type": kind.__name__, "request": REQUEST, "attempt": 1, **fields})
    with pytest.raises(BadMessage):
        decoder_for(kind)(frame)


@pytest.mark.parametrize("request_id", ["", "r" * 129])
def test_ids_are_bounded(request_id: str) -> None:
    with pytest.raises(BadMessage):
        decode(encode(Abort(RequestId(request_id), Attempt(1))))


def worker(name: str, epoch: int) -> WorkerAddress:
    return WorkerAddress(WorkerId(name), Epoch(epoch), Address("tcp://127.0.0.1:1"))


def test_a_ticket_is_good_for_its_attempt_and_incarnations_only() -> None:
    key = b"k" * 32
    ticket = mint(key, REQUEST, Attempt(1), worker("p", 1), worker("d", 2))
    assert valid(key, ticket, REQUEST, Attempt(1))
    assert not valid(key, ticket, REQUEST, Attempt(2))
    assert not valid(key, ticket, RequestId("1" * 32), Attempt(1))
    assert not valid(b"other" * 8, ticket, REQUEST, Attempt(1))
    other = mint(key, REQUEST, Attempt(1), worker("p", 1), worker("d", 3))
    assert other.mac != ticket.mac

"""Mutated frames on everything that decodes what comes over a wire: ``python -m tests.security.fuzz --frames 1000000``.

Frames are made of random valid messages (``samples.py``), spoiled in the ways below, and given to every decoder in
turn, most of them to one that would have taken them before. It answers with a message, which survives another trip, or
with its own refusal. Anything else that is raised, a decode that takes long, and memory that grows are told, and end
with exit code 1.
"""

import argparse
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np
import psutil

from engine.core.moves import BlockMoves, pairs
from engine.core.step_input import StepInput
from gateway import description
from gateway.core import dispatch
from gateway.core.errors import InvalidRequest
from gateway.core.session import Session
from gateway.request_models import chat_request, completion_request
from kv_transfer.core import frames
from messages.codec import BadMessage, decoder_for
from messages.common import Message, Part
from router.core import machine as router
from runtime.core.rank_wire import RANK_COMMANDS, RANK_EVENTS
from runtime.follower import FOLLOWER_MESSAGES
from runtime.leader import RANK_MESSAGES, STEPS
from tests.gateway.test_resume import CASES
from tests.runtime.test_wire import COMMANDS, EVENTS
from tests.security.samples import sample
from worker.core import machine as worker

SLOW = 0.1
"""Seconds of the processor that no decode of a small frame may take."""
GROWTH = 16 << 20
"""Bytes that memory may grow by, from the first tenth of the run to its end."""
POOL = 40
"""Valid frames kept of each message."""
HEADS = (
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc1",
    b"\xc7\x00\x05", b"\xd8\x01" + bytes(16), b"\x91" * 64, b"\x81" * 64, b"\xcf" + b"\xff" * 8, b"\xd3\x80" + bytes(7),
    b"\xcb\x7f\xf8" + bytes(6), b"\x80\x04\x95", b"cos\nsystem\n(S'true'\ntR.", b"[" * 64, b"\\ud800", b"1e999", b"NaN",
)  # fmt: skip
"""Of lists, maps, bytes and texts that do not come; an extension; deep nesting; the ends of the numbers; pickles."""


BODIES = list(CASES.values())
STEP = StepInput(
    tokens=np.array([5, 6, 7], np.int32), num_tokens=np.array([1, 2], np.int32),
    num_computed=np.array([4, 0], np.int32), block_tables=np.array([[1, 2], [3, 3]], np.int32),
    logit_rows=np.array([0, 2], np.int32), num_sampled=2, moves=BlockMoves(copies=pairs([(1, 2)])),
)  # fmt: skip


class Target(NamedTuple):
    """Something that decodes."""

    name: str
    decode: Callable[[bytes], Any]
    refusal: type[Exception]
    pool: list[bytes]
    """Frames that it takes."""


def targets(rng: Random) -> list[Target]:
    """Every decoder that a socket feeds."""
    mailboxes: dict[str, tuple[Any, ...]] = {
        "router": router.Messages,
        "gateway": dispatch.Messages,
        "worker": (*worker.Messages, *RANK_MESSAGES),
        "rank": FOLLOWER_MESSAGES,
        "kv header": (frames.DataHeader,),
        "kv answer": (frames.Taken,),
        "kv meeting": (frames.Meet,),
    }
    found = [Target(name, decoder_for(*types), BadMessage, _pool(types, rng)) for name, types in mailboxes.items()]
    described = _pool((description.Description,), rng)
    found.append(Target("description", _describe, BadMessage, described))
    for name, wire, values in (("command", RANK_COMMANDS, COMMANDS), ("event", RANK_EVENTS, EVENTS)):
        for kind, body in map(wire.pack, values):
            found.append(Target(f"{name} {kind}", partial(wire.unpack, kind), BadMessage, [body]))
    found.append(Target("step", partial(STEPS.unpack, "StepInput"), BadMessage, [STEPS.pack(STEP)[1]]))
    bodies = [json.dumps(body | {"stream": True}).encode() for body in BODIES]
    for name, decode in (("completion", completion_request), ("chat", chat_request)):
        found.append(Target(name, decode, InvalidRequest, bodies))
    return found


def _pool(types: Iterable[Any], rng: Random) -> list[bytes]:
    return [msgspec.msgpack.encode(sample(kind, rng)) for kind in types for _ in range(POOL)]


def _describe(frame: bytes) -> description.Description:
    found = description.description_of(cast(Session, SimpleNamespace(description=frame)))
    if found is None:
        raise BadMessage("no description")
    return found


def mutated(frame: bytes, other: bytes, rng: Random) -> bytes:
    """``frame`` with one to four things wrong; ``other`` is where some of them come from."""
    spoiled = bytearray(frame)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(spoiled) + 1)
        match rng.randrange(8):
            case 0:
                if spoiled:
                    spoiled[place % len(spoiled)] ^= 1 << rng.randrange(8)
            case 1:
                if spoiled:
                    spoiled[place % len(spoiled)] = rng.choice((0, 0x7F, 0x80, 0xC0, 0xFF, rng.randrange(256)))
            case 2:
                del spoiled[place:]
            case 3:
                del spoiled[place : place + rng.randrange(1, 9)]
            case 4:
                spoiled[place:place] = rng.randbytes(rng.randrange(1, 9))
            case 5:
                spoiled[place:place] = rng.choice(HEADS)
            case 6:
                begin = rng.randrange(len(other))
                spoiled[place : place + rng.randrange(9)] = other[begin : begin + rng.randrange(1, 33)]
            case 7:
                spoiled += spoiled[place : place + 64]
    return bytes(spoiled)


@dataclass
class Report:
    """What came of it."""

    frames: int = 0
    decoded: int = 0
    """Were a message all the same."""
    refused: int = 0
    slowest_ms: float = 0.0
    """Of the processor."""
    grown: int = 0
    """Bytes."""
    seconds: float = 0.0
    by_target: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def fuzz(num_frames: int, seed: int) -> Report:
    """``num_frames`` frames, shared evenly by all targets."""
    rng, report = Random(seed), Report()
    every, process = targets(rng), psutil.Process()
    began, settled = time.monotonic(), 0
    for number in range(num_frames):
        target = every[number % len(every)]
        other = rng.choice(rng.choice(every).pool)
        _try(target, mutated(other if rng.random() < 0.1 else rng.choice(target.pool), other, rng), report)
        if number == num_frames // 10:
            gc.collect()
            settled = process.memory_info().rss
    gc.collect()
    report.grown = process.memory_info().rss - settled
    report.seconds = time.monotonic() - began
    if report.grown > GROWTH:
        report.problems.append(f"memory has grown by {report.grown} bytes")
    return report


def _try(target: Target, frame: bytes, report: Report) -> None:
    began = time.thread_time()
    try:
        message = target.decode(frame)
    except target.refusal:
        report.refused += 1
        message = None
    except Exception as error:  # noqa: BLE001 - this is what is looked for
        report.problems.append(f"{target.name} raised {error!r} for {frame.hex()}")
        return
    took = 1e3 * (time.thread_time() - began)
    report.frames += 1
    report.by_target[target.name] += 1
    report.slowest_ms = max(report.slowest_ms, took)
    if took > 1e3 * SLOW:
        report.problems.append(f"{target.name} took {took:.0f} ms for {frame[:2000].hex()}")
    if message is not None:
        report.decoded += 1
        if isinstance(message, Message | Part) and target.decode(msgspec.msgpack.encode(message)) != message:
            report.problems.append(f"{target.name} made of {frame.hex()} what does not survive another trip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    report = fuzz(arguments.frames, arguments.seed)
    print(json.dumps({**report.__dict__, "problems": report.problems[:20], "by_target": len(report.by_target)}))
    sys.exit(bool(report.problems))


if __name__ == "__main__":
    main()

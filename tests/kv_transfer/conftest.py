"""Every test here gives back its threads, files and shared memory."""

import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zmq

from tests.kv_transfer.kv_pair import Pair


@pytest.fixture
def make_pair() -> Iterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def make(*args: Any, **named: Any) -> Pair:
        pairs.append(Pair(*args, **named))
        return pairs[-1]

    yield make
    while pairs:
        pair = pairs.pop()
        pair.close()
        pair.close()  # harmless twice
        del pair  # and its mappings with it


@pytest.fixture(scope="session", autouse=True)
def _started() -> None:
    """pyzmq starts its garbage collector with the first zero-copy send, for good; CUDA opens its files when it is first
    used."""
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    with zmq.Context() as context, context.socket(zmq.PAIR) as here, context.socket(zmq.PAIR) as there:
        here.bind("inproc://start")
        there.connect("inproc://start")
        here.send(bytes(1 << 20), copy=False)
        there.recv()


def resources() -> tuple[set[str], set[str], set[str]]:
    """Threads and open files of this process, and named shared memory of the host."""
    gc.collect()
    files = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            files.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:  # of listdir itself
            continue
    files = {file for file in files if " /dev/nvidia" not in file}  # CUDA's, which come and go with its memory
    return {thread.name for thread in threading.enumerate()}, files, set(os.listdir("/dev/shm"))


@pytest.fixture(autouse=True)
def _nothing_is_left(_started: None) -> Iterator[None]:
    before = resources()
    yield
    after = resources()
    left = [now - then for now, then in zip(after, before, strict=True)]
    assert not any(left), f"left behind: {left}"

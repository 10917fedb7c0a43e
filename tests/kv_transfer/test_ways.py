"""Promise: KV takes the best way that both workers have, and where there is none each learns why."""

import subprocess
import sys
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.shared_memory import SharedMemoryError, mapping_host
from kv_transfer.core.lanes import CannotPair
from kv_transfer.core.ways import KINDS, choose, misfit, route
from messages.common import KVRank, KVWay
from tests.kv_transfer.kv_pair import shard_of_bytes

SHARD = shard_of_bytes(512)


def ranks(*ways: str, host: str = "here", num: int = 1) -> tuple[KVRank, ...]:
    return tuple(
        KVRank(SHARD, 8, host, tuple(KVWay(way, f"{way} {host} {rank}") for way in ways)) for rank in range(num)
    )


@pytest.mark.parametrize(
    ("senders", "receivers", "chosen"),
    [
        (ranks("shm", "zmq"), ranks("shm", "zmq"), "shm"),
        (ranks("shm", "zmq"), ranks("shm", "zmq", host="there"), "zmq"),
        (ranks("shm", "zmq"), ranks("zmq"), "zmq"),
        (ranks("zmq"), ranks("zmq", "shm"), "zmq"),
        (ranks("shm", "inproc"), ranks("inproc", "shm"), "inproc"),
        (ranks("inproc", "zmq"), ranks("zmq", "inproc", host="there"), "zmq"),
        (ranks("shm", "zmq", num=2), ranks("shm", "zmq") + ranks("shm", "zmq", host="there"), "zmq"),
        (ranks("shm", "zmq") + ranks("zmq"), ranks("shm", "zmq"), "zmq"),
    ],
)
def test_the_best_way_that_reaches_every_rank_is_chosen(
    senders: tuple[KVRank, ...], receivers: tuple[KVRank, ...], chosen: str
) -> None:
    assert choose(senders, receivers) == chosen
    way = route(chosen, senders, receivers[:1])
    assert way.transport == chosen and way.to[0].address == f"{chosen} {receivers[0].host} 0"


@pytest.mark.parametrize(
    ("senders", "receivers", "why"),
    [
        (ranks("shm"), ranks("shm", host="there"), "shm: neither can map the other's memory .* auto or zmq"),
        (ranks("shm"), ranks("zmq"), "shm: the decode worker offers zmq; give both the same kv.transport"),
        (ranks("zmq"), (), "zmq: the decode worker offers none"),
        ((), ranks("zmq"), "zmq: the prefill worker offers none"),
        (ranks("pigeon"), ranks("pigeon"), "no transport is offered"),
    ],
)
def test_where_no_way_reaches_it_is_said_why(
    senders: tuple[KVRank, ...], receivers: tuple[KVRank, ...], why: str
) -> None:
    with pytest.raises(CannotPair, match=why):
        choose(senders, receivers)


def test_a_way_that_has_failed_is_taken_again_only_if_there_is_no_other() -> None:
    ways = ranks("shm", "zmq")
    assert choose(ways, ways, {"shm"}) == "zmq"
    assert choose(ways, ways, {"zmq"}) == "shm"
    assert choose(ways, ways, {"shm", "zmq"}) == "shm"
    assert choose(ranks("zmq"), ways, {"zmq"}) == "zmq"


@pytest.mark.parametrize(
    ("transport", "why"),
    [("shm", "map"), ("pigeon", "no such transport"), ("inproc", "prefill worker offers shm, zmq")],
)
def test_a_receiver_takes_no_way_that_does_not_reach_it(transport: str, why: str) -> None:
    with pytest.raises(CannotPair, match=why):
        route(transport, ranks("shm", "zmq", host="there"), ranks("shm", "zmq"))


SETS = [ways for size in range(3) for ways in combinations(KINDS, size)]


@given(st.lists(st.sampled_from(SETS), min_size=1, max_size=3), st.sampled_from(SETS), st.booleans())
def test_what_is_chosen_is_never_refused(offered: list[tuple[str, ...]], taken: tuple[str, ...], apart: bool) -> None:
    senders = tuple(rank for ways in offered for rank in ranks(*ways))
    receivers = ranks(*taken, host="there" if apart else "here")
    fits = [transport for transport in KINDS if not misfit(transport, senders, receivers)]
    common = set(taken).intersection(*offered)
    assert fits == [each for each in KINDS if each in common and not (apart and KINDS[each].one_host)]
    if fits:
        assert choose(senders, receivers) == fits[0]
    else:
        with pytest.raises(CannotPair):
            choose(senders, receivers)


def mapping_host_of(*command: str) -> str:
    ask = [sys.executable, "-c", "from engine.shared_memory import mapping_host; print(mapping_host())"]
    return subprocess.run([*command, *ask], capture_output=True, text=True, check=True).stdout.strip()


def test_processes_of_one_host_and_user_name_the_same_host() -> None:
    assert mapping_host_of() == mapping_host()


def test_a_container_of_its_own_is_another_host() -> None:
    apart = ["unshare", "--user", "--map-root-user", "--pid", "--mount-proc", "--fork"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no namespaces")
    assert mapping_host_of(*apart) != mapping_host()


def test_memory_that_others_may_not_map_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError("forbidden here")

    monkeypatch.setattr("os.memfd_create", refuse)
    with pytest.raises(SharedMemoryError, match="forbidden here"):
        mapping_host()

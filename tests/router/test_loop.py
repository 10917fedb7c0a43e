"""The router's shell over real sockets."""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from messages.codec import decoder_for
from messages.common import Role, WorkerAddress
from messages.gateway_to_router import ClusterStateWanted
from messages.ids import Address, Epoch, WorkerId
from messages.router_to_gateway import ClusterState, Placed, Rejected, WorkerLost
from messages.router_to_worker import PeerLost, RegisterWanted
from messages.seals import seal
from messages.worker_to_router import Register
from router.actor import RouterActor, RouterConfig
from router.core.machine import RouterSettings
from runtime.mailbox import Mailbox
from tests.router.world import KEY, finished, wanted

HOST = "127.0.0.1"


def started(**settings: Any) -> Iterator[RouterActor]:
    actor = RouterActor(RouterConfig(host=HOST, settings=RouterSettings(cluster_key=KEY, settle=0.0, **settings)))
    yield actor
    actor.stop()
    actor.stop()


@pytest.fixture
def router() -> Iterator[RouterActor]:
    """It waits longer for reports than any test takes."""
    yield from started(liveness_timeout=60.0)


@pytest.fixture
def watchful() -> Iterator[RouterActor]:
    yield from started(liveness_timeout=0.5)


@pytest.fixture
def hasty() -> Iterator[RouterActor]:
    yield from started(wait_timeout=0.05, retry_after=7.0)


def next_message(mailbox: Mailbox, kind: type[Any]) -> Any:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for message in mailbox.receive(0.5):
            if isinstance(message, kind):
                return message
    raise AssertionError(f"no {kind.__name__} came")


def test_a_router_places_and_announces_losses(watchful: RouterActor) -> None:
    address = watchful.start()["address"]
    gateway = Mailbox(HOST, decoder_for(Placed, Rejected, WorkerLost, ClusterState))
    worker = Mailbox(HOST, decoder_for(RegisterWanted, PeerLost))
    with gateway, worker:
        here = WorkerAddress(WorkerId("c0"), Epoch(1), worker.address)
        register = seal(KEY, Register(address=here, role=Role.COLOCATED, max_num_seqs=4, max_model_len=100))
        gateway.send(address, PeerLost(peer=here, dead=True, detail="no message for a router"))
        worker.send(address, register)
        gateway.send(address, wanted("r", gateway=gateway.address))
        assert next_message(gateway, Placed).decode == here
        # No reports: half a second later the worker is lost, and the gateway hears of it unasked.
        assert next_message(gateway, WorkerLost).worker == "c0"
        gateway.send(address, ClusterStateWanted(gateway=gateway.address))
        assert not next_message(gateway, ClusterState).ready


def test_the_supervisors_word_counts_at_once(router: RouterActor) -> None:
    address = router.start()["address"]
    gateway = Mailbox(HOST, decoder_for(Placed, WorkerLost))
    worker = Mailbox(HOST, decoder_for(RegisterWanted, PeerLost))
    with gateway, worker:
        here = WorkerAddress(WorkerId("c0"), Epoch(1), worker.address)
        register = Register(address=here, role=Role.COLOCATED, max_num_seqs=4, max_model_len=100)
        worker.send(address, seal(KEY, register))
        gateway.send(address, wanted("r", gateway=gateway.address))
        next_message(gateway, Placed)
        router.worker_died("c0", None, "killed by the kernel")
        assert next_message(gateway, WorkerLost).detail == "killed by the kernel"


@pytest.fixture
def gateway() -> Iterator[Mailbox]:
    with Mailbox(HOST, decoder_for(Placed, Rejected, WorkerLost, ClusterState)) as mailbox:
        yield mailbox


@pytest.fixture
def pool() -> Iterator[list[Mailbox]]:
    """The mailboxes of prefill-0, decode-0 and decode-1."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Mailbox(HOST, decoder_for(RegisterWanted, PeerLost))) for _ in range(3)]


def join(router: Address, pool: list[Mailbox]) -> None:
    names = (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE), ("decode-1", Role.DECODE))
    for mailbox, (name, role) in zip(pool, names, strict=True):
        here = WorkerAddress(WorkerId(name), Epoch(1), mailbox.address)
        mailbox.send(router, seal(KEY, Register(address=here, role=role, max_num_seqs=4, max_model_len=100)))


def wait_until_all_joined(router: Address, gateway: Mailbox) -> None:
    workers = 0
    while workers < 3:
        gateway.send(router, ClusterStateWanted(gateway=gateway.address))
        workers = len(next_message(gateway, ClusterState).workers)


def test_a_request_that_loses_its_worker_is_placed_on_another_and_its_peers_hear_of_it(
    router: RouterActor, gateway: Mailbox, pool: list[Mailbox]
) -> None:
    address = router.start()["address"]
    gateway.send(address, wanted("r", gateway=gateway.address))  # it waits for the workers
    join(address, pool)
    first = next_message(gateway, Placed)
    router.worker_died(first.decode.worker, first.decode.epoch, "killed")
    assert next_message(gateway, WorkerLost).worker == first.decode.worker
    assert next_message(pool[0], PeerLost).peer == first.decode
    gateway.send(address, wanted("r", 2, gateway=gateway.address))
    second = next_message(gateway, Placed)
    assert second.attempt == 2
    assert {first.decode.worker, second.decode.worker} == {"decode-0", "decode-1"}
    assert router.inspect().items() >= {"workers": 2, "placed": 1, "waiting": 0, "forged": 0}.items()


def test_messages_of_older_attempts_and_incarnations_lead_to_nothing(
    router: RouterActor, gateway: Mailbox, pool: list[Mailbox]
) -> None:
    address = router.start()["address"]
    join(address, pool)
    wait_until_all_joined(address, gateway)
    gateway.send(address, wanted("r", 2, gateway=gateway.address))
    assert next_message(gateway, Placed).attempt == 2
    gateway.send(address, finished("r", 1))
    gateway.send(address, wanted("r", 1, gateway=gateway.address))
    router.worker_died("decode-0", 7, "another one of that name")
    router.worker_died("decode-1", 7, "another one of that name")
    gateway.send(address, wanted("r", 2, gateway=gateway.address))  # the same link: it comes after the others
    assert next_message(gateway, Placed).attempt == 2
    assert router.inspect().items() >= {"workers": 3, "placed": 1, "waiting": 0, "forged": 0}.items()


def test_bytes_that_are_no_message_stop_nothing(router: RouterActor, gateway: Mailbox) -> None:
    address = router.start()["address"]
    context = zmq.Context()
    with context.socket(zmq.PUSH) as stranger:
        stranger.connect(address)
        for frame in (b"", b"\xc1", b"\x00" * 1000, b"GET / HTTP/1.1\r\n\r\n"):
            stranger.send(frame)
        stranger.send_multipart([b"a", b"b"])
    context.term()
    gateway.send(address, ClusterStateWanted(gateway=gateway.address))
    assert not next_message(gateway, ClusterState).ready


def test_a_gateway_without_an_address_and_a_thousand_with_one_stop_nothing(
    router: RouterActor, gateway: Mailbox
) -> None:
    address = router.start()["address"]
    others = ["nonsense", "tcp://999.1.1.1:5", "", *(f"tcp://127.0.0.1:{port}" for port in range(1000, 2100))]
    for other in others:
        gateway.send(address, ClusterStateWanted(gateway=Address(other)))
    gateway.send(address, ClusterStateWanted(gateway=gateway.address))
    assert not next_message(gateway, ClusterState).ready
    router.stop()  # returns


def test_a_router_whose_loop_fails_says_so_to_its_host(router: RouterActor, caplog: pytest.LogCaptureFixture) -> None:
    failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    router.on_failure = failures.put
    router.start()
    assert router._loop is not None

    def broken(_router: object) -> None:
        raise MemoryError("no room")

    router._loop.ask(broken)
    assert isinstance(failures.get(timeout=10), MemoryError)
    assert "the router's loop has failed" in caplog.text


def test_a_placement_that_nobody_can_give_is_turned_down_in_time(hasty: RouterActor, gateway: Mailbox) -> None:
    gateway.send(hasty.start()["address"], wanted("r", gateway=gateway.address))
    assert next_message(gateway, Rejected).retry_after == 7.0


def test_a_router_that_was_stopped_leaves_no_thread(router: RouterActor) -> None:
    before = threading.active_count()
    assert router.start() == router.start()
    assert threading.active_count() > before
    router.stop()
    assert threading.active_count() == before

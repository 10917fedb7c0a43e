"""The router's shell over real sockets."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from messages.codec import decoder_for
from messages.common import Role, WorkerAddress
from messages.gateway_to_router import ClusterStateWanted
from messages.ids import Epoch, WorkerId
from messages.router_to_gateway import ClusterState, Placed, Rejected, WorkerLost
from messages.router_to_worker import PeerLost, RegisterWanted
from messages.worker_to_router import Register
from router.actor import RouterActor, RouterConfig
from router.core.machine import RouterSettings
from runtime.mailbox import Mailbox
from tests.router.world import KEY, wanted

HOST = "127.0.0.1"


@pytest.fixture
def router() -> Iterator[RouterActor]:
    actor = RouterActor(RouterConfig(host=HOST, settings=RouterSettings(cluster_key=KEY, liveness_timeout=0.5)))
    yield actor
    actor.stop()
    actor.stop()


def next_message(mailbox: Mailbox, kind: type[Any]) -> Any:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for message in mailbox.receive(0.5):
            if isinstance(message, kind):
                return message
    raise AssertionError(f"no {kind.__name__} came")


def test_a_router_places_announces_losses_and_survives_garbage(router: RouterActor) -> None:
    address = router.start()["address"]
    gateway = Mailbox(HOST, decoder_for(Placed, Rejected, WorkerLost, ClusterState))
    worker = Mailbox(HOST, decoder_for(RegisterWanted, PeerLost))
    with gateway, worker:
        here = WorkerAddress(WorkerId("c0"), Epoch(1), worker.address)
        register = Register(address=here, role=Role.COLOCATED, max_num_seqs=4, max_model_len=100)
        gateway.send(address, PeerLost(worker=WorkerId("x"), epoch=Epoch(1), detail="no message for a router"))
        worker.send(address, register)
        gateway.send(address, wanted("r", gateway=gateway.address))
        assert next_message(gateway, Placed).decode == here
        assert router.inspect() == {"workers": 1, "placed": 1, "waiting": 0}
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
        worker.send(address, Register(address=here, role=Role.COLOCATED, max_num_seqs=4, max_model_len=100))
        gateway.send(address, wanted("r", gateway=gateway.address))
        next_message(gateway, Placed)
        router.worker_died("c0", None, "killed by the kernel")
        assert next_message(gateway, WorkerLost).detail == "killed by the kernel"

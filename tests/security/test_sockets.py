"""Promise (rows 1, 4, 5, 8 and 9): whatever a stranger says to a socket, nothing of it is run, nobody's place in the
cluster changes, memory stays bounded, and everybody else is served as before.

These sockets have no keys, as on loopback: with them a stranger does not even get so far (``test_curve.py``). What KV
receivers make of all this is shown in ``tests/kv_transfer``.
"""

import contextlib
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import httpx
import msgspec
import psutil
import pytest
import zmq

from gateway.core import dispatch
from gateway.server import GatewayServer
from kv_transfer import curve
from kv_transfer.curve import CurveKeys
from messages.codec import BadMessage, decoder_for, encode
from messages.common import Role, WorkerAddress
from messages.gateway_to_router import ClusterStateWanted
from messages.gateway_to_worker import Abort, Prefill
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.router_to_gateway import ClusterState, Placed, WorkerLost
from messages.router_to_worker import PeerLost, RegisterWanted
from messages.sampling import SamplingParams
from messages.seals import seal
from messages.worker_to_router import Leaving, Register
from router.actor import RouterActor, RouterConfig
from router.core import machine as router_core
from router.core.machine import RouterSettings
from runtime.mailbox import MAX_MESSAGE_BYTES, Mailbox
from tests.router.test_loop import next_message
from tests.router.world import KEY, wanted
from tests.security.conftest import ALICE, bearer
from tests.security.samples import fields_of, sample
from tests.workers.relay import relay_of
from worker.core import machine as worker_core

MB = 1 << 20
UNPICKLED: list[str] = []
"""What pickle has looked up for a canary; there must be nothing."""


def _listen(event: str, arguments: Any) -> None:
    if event == "pickle.find_class" and "pathlib" in str(arguments):  # numba keeps its own kernels as pickles on disk
        UNPICKLED.append(str(arguments))


sys.addaudithook(_listen)


class Canary:
    """Unpickling it touches a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


class Target(NamedTuple):
    """A mailbox of a running process."""

    address: str
    takes: tuple[type[msgspec.Struct], ...]
    malformed: Callable[[], int]
    works: Callable[[], None]


@pytest.fixture
def router() -> Iterator[RouterActor]:
    actor = RouterActor(
        RouterConfig(host="127.0.0.1", settings=RouterSettings(cluster_key=KEY, liveness_timeout=600.0))
    )
    actor.start()
    yield actor
    actor.stop()


def router_target(router: RouterActor) -> Target:
    assert router._loop is not None
    mailbox = router._loop._mailbox

    def works() -> None:
        router.inspect()  # with its check_integrity
        with Mailbox("127.0.0.1", decoder_for(ClusterState)) as gateway:
            gateway.send(mailbox.address, ClusterStateWanted(gateway=gateway.address))
            next_message(gateway, ClusterState)

    return Target(mailbox.address, router_core.Messages, lambda: mailbox.malformed, works)


def gateway_target(server: GatewayServer, http: httpx.Client) -> Target:
    assert server._hub is not None
    mailbox = server._hub._mailbox

    def works() -> None:
        body = {"model": "tiny-llama", "prompt": [5, 6], "max_tokens": 3}
        assert http.post("/v1/completions", json=body, headers=bearer(ALICE)).status_code == 200

    return Target(server.address, dispatch.Messages, lambda: mailbox.malformed, works)


@pytest.fixture(scope="module")
def worker(tiny_llama: Path) -> Iterator[Target]:
    with relay_of(tiny_llama, Role.COLOCATED) as relay:
        mailbox = relay.workers["colocated-0"]._mailbox
        assert mailbox is not None

        def works() -> None:
            params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
            (stream,) = relay.finish(relay.send([5, 6, 7], params, colocated="colocated-0"))
            assert len(stream.tokens) == 2

        yield Target(mailbox.address, worker_core.Messages, lambda: mailbox.malformed, works)


@pytest.fixture(params=["router", "gateway", "worker"])
def target(request: pytest.FixtureRequest) -> Target:
    match request.param:
        case "router":
            return router_target(request.getfixturevalue("router"))
        case "gateway":
            return gateway_target(request.getfixturevalue("server"), request.getfixturevalue("http"))
        case _:
            found: Target = request.getfixturevalue("worker")
            return found


@contextlib.contextmanager
def stranger(address: str, kind: int = zmq.PUSH) -> Iterator[Any]:
    context = zmq.Context()
    with context.socket(kind) as peer:
        peer.set(zmq.LINGER, 0)
        peer.set(zmq.SNDTIMEO, 10_000)
        peer.connect(address)
        yield peer
    context.term()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"it never came to be that {what}"
        time.sleep(0.005)


def spoiled(kind: type[Any], canary: bytes) -> Iterator[bytes]:
    """A message of ``kind`` with a pickle in place of each of its fields, in each way that MessagePack has."""
    fields = fields_of(sample(kind, Random(kind.__name__)))
    for name in fields:
        for value in (msgspec.msgpack.Ext(1, canary), msgspec.msgpack.Ext(127, canary), [canary], {"x": canary}):
            yield msgspec.msgpack.encode({**fields, name: value})
        yield msgspec.msgpack.encode({**fields, name: canary})
    yield msgspec.msgpack.encode({**fields, "surplus": canary})


def test_a_pickle_is_run_by_nobody_wherever_it_stands(target: Target, tmp_path: Path) -> None:
    canary = pickle.dumps(Canary(tmp_path / "canary"))
    frames = [canary, pickle.dumps(Canary(tmp_path / "canary"), protocol=0), msgspec.msgpack.encode(canary)]
    frames += [msgspec.msgpack.encode(msgspec.msgpack.Ext(code, canary)) for code in (0, 1, 42, 127)]
    frames += [frame for kind in target.takes for frame in spoiled(kind, canary)]
    decode, refused = decoder_for(*target.takes), 0
    for frame in frames:
        try:
            decode(frame)
        except BadMessage:
            refused += 1
    before = target.malformed()
    with stranger(target.address) as peer:
        for frame in frames:
            peer.send(frame)
        for parts in ([canary, b"x"], [b"x", canary], [b"", canary, b""], [canary] * 5):
            peer.send_multipart(parts)
        until(lambda: target.malformed() >= before + refused + 12, "all of it is refused")
    target.works()
    assert refused > 5 * len(target.takes)
    assert not (tmp_path / "canary").exists() and not UNPICKLED
    pickle.loads(canary)
    assert (tmp_path / "canary").exists() and UNPICKLED, "the canary and its listener are dead"
    UNPICKLED.clear()


def test_random_messages_of_the_right_form_break_nobody(target: Target) -> None:
    """Of requests, workers and gateways that nobody knows, with values anywhere within their bounds."""
    rng = Random(3)
    with stranger(target.address) as peer:
        for _ in range(30):
            for kind in target.takes:
                peer.send(encode(sample(kind, rng)))
        target.works()
    target.works()


def test_a_frame_that_is_too_large_costs_its_sender_the_connection_and_nobody_memory(target: Target) -> None:
    before = psutil.Process().memory_info().rss
    length = (1 << 30).to_bytes(8, "big")
    host, port = target.address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), 10) as peer:
        # ZMTP 3.1: greeting, NULL mechanism, READY as a PUSH socket; then the head of a frame of 1 GiB.
        peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01NULL".ljust(55, b"\0"))
        ready = b"\x05READY\x0bSocket-Type" + (4).to_bytes(4, "big") + b"PUSH"
        peer.sendall(b"\x04" + bytes([len(ready)]) + ready + b"\x02" + length + b"x" * 1000)
        with contextlib.suppress(ConnectionResetError):
            while peer.recv(65536):
                pass
    target.works()
    assert psutil.Process().memory_info().rss - before < 64 * MB
    assert MAX_MESSAGE_BYTES <= 32 * MB


def test_crowds_that_say_nothing_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 9: connections that never begin their handshake are closed, and members are heard meanwhile."""
    monkeypatch.setattr(curve, "HANDSHAKE_MS", 1000)
    keys, abort = CurveKeys.make(), Abort(RequestId("r"), Attempt(1))
    with Mailbox("127.0.0.1", decoder_for(Abort), curve=keys) as there, contextlib.ExitStack() as crowd:
        port = int(there.address.rpartition(":")[2])
        silent = [crowd.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(200)]
        with Mailbox("127.0.0.1", decoder_for(Abort), curve=keys) as here:
            for _ in range(100):
                here.send(there.address, abort)
            got: list[Any] = []
            while len(got) < 100:
                batch = there.receive(10)
                assert batch, "a member is not heard"
                got += batch
        for connection in silent:
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(4096):  # its greeting, then the end
                    pass


# Row 4


class Lure:
    """Where somebody wants the cluster's traffic to go: counts who comes."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address(f"tcp://127.0.0.1:{self._listener.getsockname()[1]}")
        self.visits = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.visits += 1
                connection.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


@pytest.fixture
def lure() -> Iterator[Lure]:
    lure = Lure()
    yield lure
    lure.close()


def address(name: str, mailbox: Address, epoch: int = 1) -> WorkerAddress:
    return WorkerAddress(WorkerId(name), Epoch(epoch), mailbox)


def register(here: WorkerAddress, incarnation: int = 0) -> Register:
    return Register(address=here, role=Role.COLOCATED, max_num_seqs=4, max_model_len=100, incarnation=incarnation)


def test_nobody_takes_a_workers_place_or_turns_it_out(router: RouterActor, lure: Lure) -> None:
    """Unsigned, signed by somebody else, signed for somebody else, signed once and changed, and replayed."""
    there = Address(router.start()["address"])
    gateway = Mailbox("127.0.0.1", decoder_for(Placed, WorkerLost, ClusterState))
    worker = Mailbox("127.0.0.1", decoder_for(RegisterWanted, PeerLost))
    other = Mailbox("127.0.0.1", decoder_for(RegisterWanted, PeerLost))
    with gateway, worker, other:
        former = seal(KEY, register(address("c0", lure.address, epoch=1), incarnation=1))
        other.send(there, seal(KEY, register(address("c1", other.address))))
        worker.send(there, seal(KEY, register(address("c0", worker.address, epoch=2), incarnation=2)))
        until(lambda: router.inspect()["workers"] == 2, "both are in the membership")
        forged = router.inspect()["forged"]
        table = routes(gateway, there)
        genuine = seal(KEY, Leaving(WorkerId("c1"), Epoch(1)))
        stolen = register(address("c0", lure.address, epoch=3), incarnation=3)
        with stranger(there) as peer:
            attempts: list[msgspec.Struct] = [
                stolen,
                seal(b"x" * 32, stolen),
                msgspec.structs.replace(stolen, mac=genuine.mac),
                msgspec.structs.replace(seal(KEY, register(address("c0", worker.address, 2), 2)), role=Role.DECODE),
                Leaving(WorkerId("c0"), Epoch(2)),
                seal(b"x" * 32, Leaving(WorkerId("c0"), Epoch(2))),
                msgspec.structs.replace(genuine, worker=WorkerId("c0")),
                register(address("c9", lure.address)),
            ]
            for message in attempts:
                peer.send(encode(message))
            until(lambda: router.inspect()["forged"] == forged + len(attempts), "each of them is counted")
            for _ in range(3):  # what was right once: the registration of the process before
                peer.send(encode(former))
            peer.send(encode(seal(KEY, Leaving(WorkerId("c0"), Epoch(1)))))
            assert routes(gateway, there) == table
            for number in range(8):
                gateway.send(there, wanted(f"r{number}", gateway=gateway.address))
                assert next_message(gateway, Placed).decode.mailbox in (worker.address, other.address)
    assert lure.visits == 0


def routes(gateway: Mailbox, router: Address) -> Any:
    """Who is in the membership, as which incarnation."""
    gateway.send(router, ClusterStateWanted(gateway=gateway.address))
    state = next_message(gateway, ClusterState)
    return [(worker.worker, worker.epoch, worker.role, worker.alive) for worker in state.workers]


# Row 5

NAMES = (
    "kv_transfer_params", "decode_address", "prefill_address", "bootstrap_host", "bootstrap_port", "bootstrap_room",
    "remote_host", "remote_port", "remote_block_ids", "tp_size", "ticket", "blocks", "request_id", "rid", "worker",
    "disaggregated_params", "prompt_embeds", "mm_processor_kwargs", "structured_outputs", "logits_processors",
)  # fmt: skip
VALUES = (
    "169.254.169.254", "tcp://169.254.169.254:80", 2**31, -1, 0.5, True, [1, 2], [[0] * 9],
    {"do_remote_prefill": True, "remote_host": "127.0.0.1", "remote_port": 1, "remote_block_ids": [0]},
    {"nested": {"host": "127.0.0.1"}},
)  # fmt: skip
HEADERS = (
    "X-Request-Id", "X-Data-Parallel-Rank", "X-Decode-Address", "X-Prefiller-Host-Port", "X-Kv-Transfer-Params",
    "X-Baton-Ticket", "X-Baton-Decode", "Forwarded",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_no_body_says_where_kv_goes(http: httpx.Client, cluster: Any, name: str) -> None:
    for value in VALUES:
        for body in ({"prompt": [5, 6]}, {"messages": [{"role": "user", "content": "x"}]}):
            path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
            asked = http.post(path, json={"model": "tiny-llama", **body, name: value}, headers=bearer(ALICE))
            assert asked.status_code == 400 and asked.json()["error"]["type"] == "invalid_request_error"
    assert not cluster.received or not [m for m in cluster.received if not isinstance(m, ClusterStateWanted)]


def test_no_header_says_where_kv_goes(http: httpx.Client, cluster: Any, lure: Lure) -> None:
    body = {"model": "tiny-llama", "prompt": [5, 6], "max_tokens": 3}
    for name in HEADERS:
        for value in (lure.address, lure.address.removeprefix("tcp://"), '{"remote_host": "127.0.0.1"}', "0" * 32):
            answer = http.post("/v1/completions", json=body, headers=bearer(ALICE) | {name: value})
            assert answer.status_code == 200 and answer.headers["x-request-id"] not in value
    assert {order.decode.mailbox for order in cluster.of(Prefill)} == {cluster.address}
    assert lure.visits == 0

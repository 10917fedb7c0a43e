"""Promise: over every transport, whatever it does to the data, a hand-over ends with the sender's blocks or not at all.

Both session cores, real transports with faults between them, and a link for messages that loses nothing.
"""

import queue
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest

from kv_transfer.core.digest import digests
from kv_transfer.core.lanes import Route, layout_of
from kv_transfer.core.receiving import ReceiveSession
from kv_transfer.core.sending import SendSession
from kv_transfer.core.session import (
    CancelPushes,
    CloseLanding,
    Ended,
    OpenLanding,
    Outcome,
    Push,
    TakeDigests,
    TransferTimeouts,
)
from kv_transfer.core.ways import KINDS, route
from kv_transfer.transports.base import OnEvent, Pool, Sender
from kv_transfer.transports.build import TRANSPORTS, allocate_pool, host_of, make_receiver, make_sender
from kv_transfer.transports.faulty import Fault, FaultySender
from kv_transfer.transports.memory import SharedMemory
from kv_transfer.transports.records import LaneCopy
from messages.codec import pack_tokens
from messages.common import Generation, KVRank, KVShard, KVWay, Ticket, WorkerAddress
from messages.decode_to_prefill import CancelTransfer, TransferAcked
from messages.ids import Address, Epoch, WorkerId
from messages.prefill_to_decode import EndTransfer, FirstToken, OpenTransfer
from messages.sampling import SamplingParams
from runtime.kv_port import FromRank, KVPort, PortFailed, RankPort
from tests.kv_transfer.kv_pair import key, scattered, shard_of_bytes
from tests.kv_transfer.test_lane_copies import with_dtype
from tests.kv_transfer.test_lanes import split

NUM_BLOCKS, COUNT = 64, 24
TIMEOUTS = TransferTimeouts()
PREFILL, DECODE = Address("tcp://prefill"), Address("tcp://decode")


class Side:
    """A worker's ranks: each has a pool, a transport and a port of its own."""

    def __init__(self, transport: str, shards: list[KVShard], fill: Callable[[Pool, KVShard], None]) -> None:
        self.transport = transport
        self.shards = shards
        self.memories = [allocate_pool(transport, NUM_BLOCKS, layout_of(shard).block_bytes) for shard in shards]
        for memory, shard in zip(self.memories, shards, strict=True):
            fill(memory.pool, shard)

    def listen(self, post: Callable[[FromRank | PortFailed], None]) -> KVPort:
        ports = []
        for rank, (memory, shard) in enumerate(zip(self.memories, self.shards, strict=True)):
            receiver = make_receiver(self.transport, "127.0.0.1", memory, shard, _from(rank, post))
            way = KVWay(self.transport, receiver.endpoint.address)
            kv = KVRank(shard, NUM_BLOCKS, host_of(memory), (way,))
            ports.append(RankPort(rank, memory.pool, kv, post, receivers={self.transport: receiver}))
        return self._port(ports)

    def speak(
        self, post: Callable[[FromRank | PortFailed], None], faults: dict[int, Iterable[Fault]], seed: int
    ) -> KVPort:
        ports = []
        for rank, (memory, shard) in enumerate(zip(self.memories, self.shards, strict=True)):
            sender = FaultySender(
                memory.pool, partial(_sender, self.transport, shard), _from(rank, post), faults.get(rank, []),
                Random(seed),
            )  # fmt: skip
            address = memory.address if isinstance(memory, SharedMemory) else ""
            kv = KVRank(shard, NUM_BLOCKS, host_of(memory), (KVWay(self.transport, address),))
            ports.append(RankPort(rank, memory.pool, kv, post, senders={self.transport: sender}))
        return self._port(ports)

    def _port(self, ports: list[RankPort]) -> KVPort:
        self.ports = ports
        return KVPort(ports[0], ports[1:])

    def digests(self, route: Route, blocks: Any, *, receiving: bool) -> list[bytes]:
        """Of each lane of ``blocks``, taken anew."""
        taken = []
        for lane in route.lanes:
            rank = lane.receiver if receiving else lane.sender
            copy = LaneCopy(self.memories[rank].pool, self.shards[rank], route.to[lane.receiver].shard, lane.heads)
            rows = np.empty((len(blocks), copy.row_bytes), np.uint8)
            copy.pack(rows, blocks)
            taken.append(digests(rows, np.arange(len(blocks), dtype=np.int32), key(), 0))
        return taken

    def close(self) -> None:
        for port in self.ports:
            port.close()
        for memory in self.memories:
            memory.release()


def _from(rank: int, post: Callable[[FromRank], None]) -> Callable[[Any], None]:
    return lambda event: post(FromRank(rank, event))


def _sender(transport: str, shard: KVShard, pool: Pool, report: OnEvent) -> Sender:
    return make_sender(transport, pool, shard, report)


class Relay:
    """One hand-over: the transports' threads report into a queue, and time passes when nothing happens."""

    def __init__(
        self,
        transport: str,
        senders: list[KVShard],
        receivers: list[KVShard],
        faults: dict[int, Iterable[Fault]],
        seed: int,
    ) -> None:
        rng = np.random.default_rng(seed)
        values = rng.standard_normal(NUM_BLOCKS * max(layout_of(shard).block_bytes for shard in senders) // 2)

        def random(pool: Pool, shard: KVShard) -> None:
            pool.view(np.float16)[:] = values[: pool.size // 2].reshape(len(pool), -1)

        self.here = Side(transport, senders, random)
        self.there = Side(transport, receivers, lambda pool, _: pool.fill(7))
        self.source, self.target = scattered(seed, COUNT), scattered(seed + 1, COUNT)
        self.events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.ports = {
            "decode": self.there.listen(lambda event: self.post("decode", event)),
            "prefill": self.here.speak(lambda event: self.post("prefill", event), faults, seed),
        }
        ranks = self.ports["prefill"].ranks
        self.route = route(transport, ranks, self.ports["decode"].ranks)
        generation = Generation(pack_tokens([1]), SamplingParams(max_tokens=4))
        order = OpenTransfer(
            *key(), WorkerAddress(WorkerId("p"), Epoch(1), PREFILL), Address("tcp://gateway"), generation, transport,
            ranks, Ticket(WorkerId("p"), Epoch(1), WorkerId("d"), Epoch(1), b"m" * 32),
        )  # fmt: skip
        one_sided = KINDS[transport].one_sided
        self.prefill = SendSession(key(), order, self.route, TIMEOUTS)
        self.decode = ReceiveSession(key(), DECODE, self.target, 0, self.route, one_sided, TIMEOUTS)
        self.ended: dict[str, Ended] = {}
        self.now = 0.0

    def post(self, to: str, event: Any) -> None:
        self.events.put((to, event))

    def perform(self, who: str, actions: Iterable[Any]) -> None:
        for action in actions:
            match action:
                case Ended():
                    assert who not in self.ended
                    self.ended[who] = action
                case Push() | CancelPushes() | OpenLanding() | CloseLanding() | TakeDigests():
                    for answer in self.ports[who].perform(action):
                        self.perform(who, self.session(who).handle(answer, self.now))
                case OpenTransfer():
                    self.perform("decode", self.decode.accept(self.now))
                case message:
                    self.post("decode" if who == "prefill" else "prefill", message)

    def session(self, who: str) -> Any:
        return self.prefill if who == "prefill" else self.decode

    def run(self, chunks: int) -> None:
        """From the first chunk to the end of both sessions."""
        self.perform("prefill", self.prefill.open(self.now))
        for ready in range(COUNT // chunks, COUNT + 1, COUNT // chunks):
            self.perform("prefill", self.prefill.computed(self.source, ready, self.now))
            self.turn()
        self.perform("prefill", self.prefill.end(FirstToken(42), self.now))
        while len(self.ended) < 2:
            assert self.now < 300, "the hand-over does not end"
            self.turn()

    def turn(self) -> None:
        try:
            who, event = self.events.get(timeout=0.05)
        except queue.Empty:
            self.now += TIMEOUTS.resend
            self.perform("prefill", self.prefill.tick(self.now))
            self.perform("decode", self.decode.tick(self.now))
        else:
            if who == "decode" and who in self.ended and isinstance(event, EndTransfer):  # the worker remembers
                done = self.ended[who].outcome is Outcome.DONE
                self.post("prefill", TransferAcked(*key()) if done else CancelTransfer(*key(), DECODE, "it failed"))
                return
            assert not isinstance(event, PortFailed)
            events = self.ports[who].gather(event) if isinstance(event, FromRank) else [event]
            for each in events:
                self.perform(who, self.session(who).handle(each, self.now))

    def close(self) -> None:
        self.here.close()
        self.there.close()


def lanes_over(
    transport: str,
    senders: list[KVShard],
    receivers: list[KVShard],
    faults: dict[int, Iterable[Fault]],
    seed: int,
    chunks: int = 4,
) -> set[Outcome]:
    relay = Relay(transport, senders, receivers, faults, seed)
    try:
        relay.run(chunks)
        if relay.ended["decode"].outcome is Outcome.DONE:
            sent = relay.here.digests(relay.route, relay.source, receiving=False)
            assert sent == relay.there.digests(relay.route, relay.target, receiving=True)
        for memory in relay.there.memories:
            assert (np.delete(memory.pool, relay.target, axis=0) == 7).all()
        return {ended.outcome for ended in relay.ended.values()}
    finally:
        relay.close()


def hand_over(transport: str, block_bytes: int, faults: list[Fault], seed: int, chunks: int = 4) -> set[Outcome]:
    shards = [shard_of_bytes(block_bytes)]
    return lanes_over(transport, shards, shards, {0: faults}, seed, chunks)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("block_bytes", [512, 100_000])
def test_a_hand_over_without_faults_is_done(transport: str, block_bytes: int) -> None:
    assert hand_over(transport, block_bytes, [], seed=1) == {Outcome.DONE}


SPOILT = [Fault.DROP, Fault.DUPLICATE, Fault.CORRUPT, Fault.SWAP, Fault.DELAY]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("fault", SPOILT)
def test_a_push_that_is_lost_repeated_late_or_spoiled_is_made_good(transport: str, fault: Fault) -> None:
    for place in range(3):
        faults = [Fault.NONE] * place + [fault]
        assert hand_over(transport, 2048, faults, seed=place) == {Outcome.DONE}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_mixture_of_faults_lets_a_wrong_block_through(transport: str) -> None:
    rng = Random(3)
    for seed in range(12):
        faults = rng.choices([Fault.NONE, *SPOILT[:-1]], k=12)
        assert len(hand_over(transport, 2048, faults, seed)) == 1, "the two sides differ"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_link_that_spoils_everything_ends_in_failure_on_both_sides(transport: str) -> None:
    for fault in (Fault.DROP, Fault.CORRUPT, Fault.FAIL):
        outcomes = hand_over(transport, 2048, [fault] * 500, seed=1)
        assert outcomes and Outcome.DONE not in outcomes, fault


def test_chunks_of_any_number_make_one_hand_over() -> None:
    for fewer, more in pairwise((1, 2, 3, 6, 24)):
        assert hand_over("inproc", 512, [], seed=fewer, chunks=more) == {Outcome.DONE}


PAIRS = [(2, 1, "float16"), (1, 2, "float16"), (2, 4, "float16"), (4, 2, "float16"), (2, 2, "int8"), (1, 1, "fp8"),
         (3, 2, "int8")]  # fmt: skip


def shards_of(ranks: int, dtype: str) -> list[KVShard]:
    return with_dtype(split(ranks, 4), dtype)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_lanes_are_handed_over_whatever_one_of_them_suffers(transport: str, pair: tuple[int, int, str]) -> None:
    senders, receivers = shards_of(pair[0], "float16"), shards_of(pair[1], pair[2])
    for fault in (Fault.NONE, *SPOILT):
        faults = {pair[0] - 1: [Fault.NONE, fault]}
        assert lanes_over(transport, senders, receivers, faults, seed=3) == {Outcome.DONE}, fault


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_mixture_of_faults_on_all_ranks_lets_a_wrong_lane_through(transport: str) -> None:
    rng = Random(5)
    for seed in range(8):
        faults = {rank: rng.choices([Fault.NONE, *SPOILT[:-1]], weights=[3, 1, 1, 1, 1], k=16) for rank in range(2)}
        outcomes = lanes_over(transport, shards_of(2, "float16"), shards_of(4, "int8"), faults, seed)
        assert len(outcomes) == 1, "the two sides differ"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_rank_that_cannot_send_fails_the_whole_hand_over(transport: str) -> None:
    for fault in (Fault.DROP, Fault.CORRUPT, Fault.FAIL):
        outcomes = lanes_over(transport, shards_of(2, "float16"), shards_of(1, "float16"), {1: [fault] * 99}, seed=1)
        assert outcomes and Outcome.DONE not in outcomes, fault

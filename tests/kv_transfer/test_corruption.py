"""Promise: of 100,000 spoiled blocks none is read: each is found before the first token, asked for again, and made good
or given up."""

from typing import Any

import numpy as np
import pytest

from kv_transfer.core.digest import DIGEST_BYTES
from kv_transfer.core.digest import digests as digests_of
from kv_transfer.core.events import Landed, TransferKey
from kv_transfer.core.fanout import DigestLane, Fanout, LaneDigested
from kv_transfer.core.lanes import Route, plan_lanes
from kv_transfer.core.receiving import MAX_REPAIRS, ReceiveSession, ReceiveState
from kv_transfer.core.session import Ended, LandingOpened, Outcome, TakeDigests, TransferTimeouts
from messages.codec import unpack_tokens
from messages.common import KVEndpoint
from messages.decode_to_prefill import BlocksWanted, CancelTransfer, TransferAcked
from messages.ids import Address, Attempt
from messages.prefill_to_decode import EndTransfer, FirstToken
from runtime.kv_port import LaneHasher
from tests.kv_transfer.kv_pair import key, shard_of_bytes

BLOCK_BYTES, COUNT, NUM_BLOCKS = 512, 250, 256
SHARD = shard_of_bytes(BLOCK_BYTES)
ROUTE = Route((KVEndpoint("zmq", "tcp://127.0.0.1:1", SHARD, NUM_BLOCKS),), plan_lanes([SHARD], [SHARD]))
INJECTIONS = 100_000
OTHERS = ("attempt", "request", "place")
STALE = tuple(f"stale {other}" for other in OTHERS)
"""What another attempt, another request, or another block of this one put there has stayed."""
TAKEN_FOR = tuple(f"taken for another {other}" for other in OTHERS)
"""The same, and the sender made the same mistake: the digests in its end are those of just these bytes, taken for the
other. Only what a digest is bound to tells them apart; for another attempt, even the bytes are the right ones."""
KINDS = ("flip", "swap", "truncated", *STALE, *TAKEN_FOR)


class Pools:
    """What prefill has, what decode got, and the real digests of both."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.here = rng.integers(0, 256, (NUM_BLOCKS, BLOCK_BYTES), np.uint8)
        self.there = self.here.copy()
        self.before = rng.integers(0, 256, self.here.shape, np.uint8)
        """What the blocks held for their last owner."""
        self.blocks = rng.permutation(NUM_BLOCKS)[:COUNT].astype(np.int32)
        self.hasher = LaneHasher(self.there, SHARD)

    def end(self, round: int, expected: bytes | None = None) -> EndTransfer:
        """``expected``: the sender's digests, where they are not those of what it has."""
        taken = expected or LaneHasher(self.here, SHARD).digests(self.lane())
        return EndTransfer(*key(), Address("tcp://127.0.0.1:2"), round, FirstToken(5), COUNT, taken)

    def lane(self, of: TransferKey | None = None) -> DigestLane:
        ((_, lane),) = Fanout(1).fan(TakeDigests(of or key(), ROUTE, 0, self.blocks))
        assert isinstance(lane, DigestLane)
        return lane

    def digests(self) -> bytes:
        return self.hasher.digests(self.lane())

    def spoil(self, kind: str, places: Any) -> None:
        """Each block at ``places`` is not what it has to be."""
        rows, rng = self.blocks[places], self.rng
        match kind:
            case "flip":
                bits = rng.integers(0, 8 * BLOCK_BYTES, len(rows))
                self.there[rows, bits // 8] ^= (1 << (bits % 8)).astype(np.uint8)
            case "swap":
                self.there[rows] = self.there[np.roll(rows, 1)]
            case "stale attempt":  # computed in other chunks: a rounding is another one
                self.there[rows, -1] ^= 1
            case "stale request" | "taken for another request":
                self.there[rows] = self.before[rows]
            case "stale place" | "taken for another place":
                self.there[rows] = self.there[np.roll(rows, 1)]
            case "taken for another attempt":
                pass  # it computed the same
            case "truncated":
                kept = rng.integers(0, BLOCK_BYTES - 8, len(rows))
                late = np.arange(BLOCK_BYTES) >= kept[:, None]
                self.there[rows] = np.where(late, self.before[rows], self.there[rows])

    def taken_for(self, other: str, places: Any) -> bytes:
        """The sender's digests: at ``places`` those of the bytes that stand at the receiver, taken for ``other``."""
        mistaken = self.here.copy()
        mistaken[self.blocks[places]] = self.there[self.blocks[places]]
        hasher = LaneHasher(mistaken, SHARD)
        digests = np.frombuffer(hasher.digests(self.lane()), "<u8").copy()
        if other == "place":  # the blocks have moved, and their digests with them
            digests[places] = np.frombuffer(self.end(1).digests, "<u8")[np.roll(places, 1)]
        else:
            theirs = hasher.digests(self.lane(key(1, 2) if other == "attempt" else key(2, 1)))
            digests[places] = np.frombuffer(theirs, "<u8")[places]
        return digests.tobytes()


def receiver() -> ReceiveSession:
    session = ReceiveSession(
        key(), Address("tcp://127.0.0.1:3"), np.arange(COUNT, dtype=np.int32), 0, ROUTE, False, TransferTimeouts()
    )
    session.accept(0.0)
    session.handle(LandingOpened(key()), 0.0)
    return session


def verified(
    session: ReceiveSession, pools: Pools, taken: bytes, round: int, expected: bytes | None = None
) -> list[Any]:
    """All has landed and the end is here; what the session says to the digests."""
    session.handle(Landed(key(), np.arange(COUNT, dtype=np.int32)), 0.0)
    session.handle(pools.end(round, expected), 0.0)
    assert session.state is ReceiveState.VERIFYING
    fanout, wanted = Fanout(1), TakeDigests(key(), ROUTE, 0, pools.blocks)
    fanout.fan(wanted)
    (digested,) = fanout.gather(0, LaneDigested(key(), 0, 0, taken))
    return session.handle(digested, 0.0)  # type: ignore[arg-type]


def test_a_hundred_thousand_spoiled_blocks_are_all_found_before_the_first_token() -> None:
    rng = np.random.default_rng(11)
    pools, found, rounds = Pools(rng), 0, 0
    while found < INJECTIONS:
        kind = KINDS[rounds % len(KINDS)]
        places = np.sort(rng.permutation(COUNT)[: rng.integers(2, COUNT)])
        pools.spoil(kind, places)
        expected = pools.taken_for(kind.rpartition(" ")[2], places) if kind in TAKEN_FOR else None
        session = receiver()
        actions = verified(session, pools, pools.digests(), 1, expected)
        assert session.first is None and not any(isinstance(each, TransferAcked) for each in actions)
        session.handle(LandingOpened(key()), 0.0)
        assert session._wanted is not None
        np.testing.assert_array_equal(unpack_tokens(session._wanted.indices), places, err_msg=kind)
        found += len(places)
        rounds += 1
        pools.there[pools.blocks[places]] = pools.here[pools.blocks[places]]  # sent again
        session.handle(Landed(key(), places.astype(np.int32)), 0.0)
        assert isinstance(verified(session, pools, pools.digests(), 2)[0], TransferAcked)
        assert session.first == FirstToken(5)
    assert rounds > len(KINDS)


def test_blocks_that_stay_bad_are_asked_for_so_often_and_then_given_up() -> None:
    pools, session = Pools(np.random.default_rng(3)), receiver()
    pools.spoil("flip", np.array([7]))
    for round in range(1, MAX_REPAIRS + 1):
        verified(session, pools, pools.digests(), round)
        (wanted,) = session.handle(LandingOpened(key()), 0.0)
        assert isinstance(wanted, BlocksWanted) and unpack_tokens(wanted.indices).tolist() == [7]
    actions = verified(session, pools, pools.digests(), MAX_REPAIRS + 1)
    assert any(isinstance(each, CancelTransfer) for each in actions)
    (ended,) = (each for each in actions if isinstance(each, Ended))
    assert ended.outcome is Outcome.FAILED and session.first is None


@pytest.mark.parametrize("damage", ["digests cut off", "blocks miscounted", "another attempt"])
def test_an_end_that_is_cut_off_or_of_others_ends_no_transfer_well(damage: str) -> None:
    pools, session = Pools(np.random.default_rng(5)), receiver()
    end = pools.end(1)
    fields = {each: getattr(end, each) for each in end.__struct_fields__}
    match damage:
        case "digests cut off":
            fields["digests"] = end.digests[:-DIGEST_BYTES]
        case "blocks miscounted":
            fields["num_blocks"] = COUNT - 1
        case _:
            fields["digests"] = digests_of(pools.here, pools.blocks, key(1, 2), 0)
            assert Attempt(2) != end.attempt
    session.handle(Landed(key(), np.arange(COUNT, dtype=np.int32)), 0.0)
    session.handle(EndTransfer(**fields), 0.0)
    if session.state is ReceiveState.VERIFYING:
        ((_, lane),) = Fanout(1).fan(TakeDigests(key(), ROUTE, 0, pools.blocks))
        fanout = Fanout(1)
        fanout.fan(TakeDigests(key(), ROUTE, 0, pools.blocks))
        (digested,) = fanout.gather(0, LaneDigested(key(), 0, 0, pools.hasher.digests(lane)))  # type: ignore[arg-type]
        session.handle(digested, 0.0)  # type: ignore[arg-type]
    assert session.first is None

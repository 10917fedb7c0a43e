"""Promise: what a run wrote down is what its judge reads, up to the last whole record."""

from pathlib import Path

from messages.common import FailReason, Role
from messages.ids import Attempt, Epoch, RequestId, WorkerId
from messages.sampling import FinishReason, SamplingParams
from simulator import history
from simulator.history import Anything, HistoryFile, Incarnation, LedgerEntry, Owner

REQUEST, ATTEMPT = RequestId("r"), Attempt(1)
WORKER = Incarnation("decode-0", Epoch(7))


def one_of_each() -> list[Anything]:
    params = SamplingParams(max_tokens=8, logit_bias={3: 1.5})
    return [
        history.Started(0.0, WORKER, "worker", Role.DECODE, 64, 16, 8),
        history.Asked(0.1, REQUEST, (1, 2, 3), params, ("stop",), "tenant", "gateway-0"),
        history.AttemptBegun(0.1, REQUEST, ATTEMPT),
        history.AttemptPlaced(0.2, REQUEST, ATTEMPT, None, WORKER),
        history.Sent(0.2, 1, "gateway-0", "decode-0", "Generate", REQUEST, ATTEMPT),
        history.Delivered(0.2, 1),
        history.Dropped(0.2, 1, "cut"),
        history.Offered(0.3, REQUEST, ATTEMPT, WORKER, 0, 2, False),
        history.Got(0.3, REQUEST, 0, (4, 5), (-0.5, -0.25), "ab", "2", ATTEMPT, WORKER),
        history.Attached(0.4, REQUEST, "gateway-1", 2),
        history.Cut(0.5, "prefill-0", "decode-0"),
        history.Healed(0.6, "prefill-0", "decode-0"),
        history.Injected(0.6, "slow", "decode-0", 1.5, "1 MB/s"),
        history.Frozen(0.6, WORKER),
        history.Thawed(0.7, WORKER),
        history.AttemptGivenUp(0.7, REQUEST, ATTEMPT, WORKER, FailReason.ENGINE),
        history.Draining(0.7, WORKER),
        history.DeclaredLost(0.7, WORKER, "no report"),
        history.Wrote(0.7, WORKER, WORKER, REQUEST, ATTEMPT, (3, 4), ((REQUEST, ATTEMPT), None)),
        history.Read(0.7, WORKER, REQUEST, ATTEMPT, (3,), (99,), (98,), False),
        history.Blocks(0.8, WORKER, 60, 2, 2, 64, (Owner(REQUEST, ATTEMPT, 2, True),)),
        history.Ledger(0.8, Incarnation("router", Epoch(1)), (LedgerEntry(REQUEST, ATTEMPT, (WorkerId("d"),)),)),
        history.Ended(0.9, REQUEST, FinishReason.LENGTH, 3, 8),
        history.Failed(0.9, REQUEST, 503, "unavailable", 1.0, "gone"),
        history.Left(0.9, REQUEST),
        history.Crashed(1.0, "router", "AssertionError"),
        history.Stopped(1.0, WORKER),
        history.Killed(1.0, WORKER),
        history.Idle(1.1),
    ]


def test_every_kind_of_record_comes_back_from_a_file_as_it_was(tmp_path: Path) -> None:
    records = one_of_each()
    assert {type(record) for record in records} == set(history.KINDS)
    history.save(tmp_path / "run", records)
    assert history.load(tmp_path / "run") == records


def test_a_file_whose_writer_was_killed_is_read_up_to_its_last_whole_record(tmp_path: Path) -> None:
    records, path = one_of_each(), tmp_path / "run"
    with HistoryFile(path) as file:
        for record in records[:3]:
            file.append(record)
        file.flush()
        whole = path.read_bytes()
    for missing in range(1, 12):
        path.write_bytes(whole[:-missing])
        assert history.load(path) == records[:2]

"""Promise: a trace says who did what when, by one clock, how wrong it may be, and what of it is missing."""

from typing import Any

import httpx
import pytest

from gateway.core import traces
from gateway.core.chrome_trace import Offset, chrome_trace, offset_of, transfer_of
from gateway.core.session import Deliver, Ended
from gateway.core.traces import Traces
from messages.common import WorkerAddress
from messages.gateway_to_router import PlacementWanted
from messages.gateway_to_worker import Prefill
from messages.ids import Address, Attempt, RequestId, WorkerId
from messages.router_to_gateway import Placed
from messages.sampling import FinishReason
from messages.worker_to_gateway import Mark, Timeline
from runtime.core.actions import Send
from tests.gateway.conftest import MODEL
from tests.gateway.fake_cluster import EPOCH, TICKET, FakeCluster
from tests.gateway.raw import until

REQUEST, ONE = RequestId("0" * 32), Attempt(1)
HERE = Address("tcp://here:1")
PREFILL, DECODE = (WorkerAddress(WorkerId(name), EPOCH, HERE) for name in ("prefill-0", "decode-0"))
PLACED = Placed(REQUEST, ONE, PREFILL, DECODE, TICKET)


def mark(track: str, name: str, begin: float, end: float | None = None, **facts: Any) -> Mark:
    return Mark(track, name, begin, begin if end is None else end, facts)


def timeline(worker: WorkerAddress = PREFILL, *marks: Mark, clock: str = "ours", sent: float = 20.0) -> Timeline:
    return Timeline(REQUEST, ONE, worker.worker, clock, sent, marks)


def placed(kept: Traces, trace: str = "trace", request: RequestId = REQUEST) -> None:
    """A request that arrived at 10 s and whose work was sent out at 11 s."""
    assert kept.begin(trace, request, 10.0, 3)
    kept.did(request, Send(HERE, PlacementWanted(request, ONE, HERE, "t", 3, 4)), 10.0)
    kept.saw(request, PLACED, 10.5)
    order = Prefill(request, ONE, HERE, generation=None, decode=DECODE, ticket=TICKET)  # type: ignore[arg-type]
    kept.did(request, Send(HERE, order), 11.0)


@pytest.mark.parametrize(
    ("clock", "first_mark", "sent", "arrived", "offset"),
    [
        ("ours", 11.5, 19.0, 20.0, Offset(0.0, 0.0)),
        ("theirs", 111.5, 119.0, 20.0, Offset(99.75, 0.75)),  # least 99, most 100.5
        ("theirs", -88.5, -81.0, 20.0, Offset(-100.25, 0.75)),
        ("ours", 111.5, 119.0, 20.0, Offset(99.75, 0.75)),  # whatever it is called, it is another one
    ],
)
def test_a_clock_is_as_far_ahead_as_the_messages_allow(
    clock: str, first_mark: float, sent: float, arrived: float, offset: Offset
) -> None:
    told = timeline(PREFILL, mark("request", "arrives", first_mark), clock=clock, sent=sent)
    assert offset_of(told, arrived, 11.0, "ours") == offset


def test_the_picture_has_everyones_marks_by_the_gateways_clock() -> None:
    kept = Traces("ours")
    placed(kept)
    kept.did(REQUEST, Deliver([5], None, None, None), 12.0)
    kept.did(REQUEST, Ended(FinishReason.LENGTH), 13.0)
    kept.take(timeline(PREFILL, mark("transfer", "opened", 11.5), mark("steps", "prefill 0-3", 11.5, 11.75)), 20.0)
    half = chrome_trace(kept.find("trace"), "ours")  # type: ignore[arg-type]
    assert half["otherData"]["missing"] == [{"sequence": 0, "attempt": 1, "worker": "decode-0"}]
    assert not half["otherData"]["complete"]
    far = timeline(DECODE, mark("request", "OpenTransfer arrives", 112.0), clock="theirs", sent=120.0)
    kept.take(far, 20.5)
    whole = chrome_trace(kept.find("trace"), "ours")  # type: ignore[arg-type]
    assert whole["otherData"]["complete"]
    assert whole["otherData"]["clocks"] == [
        {"worker": "prefill-0", "same_clock": True, "ahead_ms": 0.0, "uncertainty_ms": 0.0},
        {"worker": "decode-0", "same_clock": False, "ahead_ms": 100250.0, "uncertainty_ms": 750.0},
    ]
    events = whole["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    at = {(names[event["pid"]], event["name"]): event["ts"] for event in events if event["ph"] != "M"}
    assert at["gateway", "arrives"] == 0.0
    assert at["gateway", "ends"] == 3e6
    assert at["prefill-0", "opened"] == 1.5e6
    assert at["decode-0", "OpenTransfer arrives"] == pytest.approx(1.75e6)
    (step,) = [event for event in events if event["ph"] == "X"]
    assert (step["ts"], step["dur"], step["cat"], step["args"]) == (1.5e6, 0.25e6, "steps", {"attempt": 1})


def test_what_left_while_the_prompt_was_computed_is_hidden() -> None:
    step = mark("steps", "prefill 0-3", 1.0, 5.0)
    pushes = [
        mark("transfer", "push", 2.0, 4.0, first=0, blocks=6, live=0, bytes=500),
        mark("transfer", "push", 2.0, 4.0, first=6, blocks=1, live=1, bytes=100, early_bytes=90),
        mark("transfer", "push", 3.0, 4.5, first=7, blocks=3, live=1, bytes=300, early_bytes=100),
        mark("transfer", "push", 6.0, 7.0, first=6, blocks=1, live=0, bytes=100, early_bytes=0),
    ]
    again = mark("transfer", "asked for a repair", 5.75)
    assert transfer_of(timeline(PREFILL, step, *pushes, again)) == {
        "bytes": 1000, "hidden_bytes": 700, "share_hidden": 0.7, "seconds": 5.0, "seconds_after_prefill": 2.0,
        "repairs": 1,
    }  # fmt: skip
    assert transfer_of(timeline(PREFILL, step)) is None


def test_a_timeline_is_taken_once_and_only_from_who_was_placed() -> None:
    kept = Traces("ours")
    placed(kept)
    stranger = WorkerAddress(WorkerId("stranger"), EPOCH, HERE)
    for told in (timeline(), timeline(), timeline(stranger)):
        kept.take(told, 20.0)
    kept.take(Timeline(RequestId("unknown"), ONE, PREFILL.worker, "ours", 1.0, ()), 20.0)
    trace = kept.find("trace")
    assert trace is not None and len(trace.sequences[0].timelines) == 1
    assert trace.sequences[0].missing() == [], "prefill has opened no hand-over: decode knows nothing"


def test_the_oldest_traces_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "MAX_KEPT_MARKS", 20)
    kept = Traces("ours")
    for number in range(3):
        placed(kept, f"trace-{number}", RequestId(str(number)))  # 4 marks each
    kept.take(Timeline(RequestId("1"), ONE, PREFILL.worker, "ours", 1.0, (mark("steps", "step", 1.0),) * 10), 20.0)
    assert [kept.find(f"trace-{number}") is None for number in range(3)] == [True, False, False]
    kept.take(Timeline(RequestId("0"), ONE, PREFILL.worker, "ours", 1.0, ()), 20.0)  # late: dropped
    for number in range(traces.MAX_SEQUENCES + 1):
        assert kept.begin("many", RequestId(f"many-{number}"), 1.0, 1) is (number < traces.MAX_SEQUENCES)


def test_a_request_is_traced_where_its_header_asks_for_it(http: httpx.Client, cluster: FakeCluster) -> None:
    until(lambda: http.get("/ready").status_code == 200, "the gateway is ready")
    body = {"model": MODEL, "prompt": [1, 2], "max_tokens": 5, "n": 2}
    plain = http.post("/v1/completions", json=body)
    traced = http.post("/v1/completions", json=body, headers={"X-Baton-Trace": "timeline"})
    assert [order.generation.traced for order in cluster.wait_for(Prefill, 4)] == [False, False, True, True]
    assert "baton" in traced.json()["choices"][0] and "baton" not in plain.json()["choices"][0]
    missing = http.get(f"/traces/{plain.headers['x-request-id']}")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "trace_not_found")
    found = http.get(f"/traces/{traced.headers['x-request-id']}").json()
    assert [each["worker"] for each in found["otherData"]["missing"]] == ["prefill-0", "decode-0"] * 2
    shown = [event["name"] for event in found["traceEvents"] if event["ph"] != "M"]
    for name in ("arrives", "asks for workers", "placed", "sends Prefill", "tokens to the client", "ends"):
        assert shown.count(name) >= 2, name

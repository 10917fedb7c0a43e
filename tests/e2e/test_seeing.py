"""Promise: what a running cluster does can be seen: of a request who did what when, of the KV how it moved."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from cluster.trace import trace
from tests.e2e.conftest import Running

pytestmark = [pytest.mark.ray, pytest.mark.parametrize("cluster", ["shm"], indirect=True)]
KV_BYTES = 96 << 10
"""Of one block of the bundled model in fp32."""


def test_a_trace_shows_a_request_from_its_arrival_to_its_end_by_one_clock(cluster: Running, tmp_path: Path) -> None:
    file, shown = tmp_path / "trace.json", io.StringIO()
    trace(Console(file=shown, width=200), cluster.url, None, "Once upon a time " * 300, 4, file)
    found = json.loads(file.read_bytes())
    other, events = found["otherData"], [event for event in found["traceEvents"] if event["ph"] != "M"]
    assert other["complete"] and not other["missing"] and not other["dropped"]
    assert all(clock["same_clock"] and clock["uncertainty_ms"] == 0 for clock in other["clocks"])
    begin = {event["name"]: event["ts"] for event in reversed(events)}  # of the first that is called so
    story = [
        "arrives", "asks for workers", "placed", "sends Prefill", "Prefill arrives", "opened", "OpenTransfer arrives",
        "blocks promised", "accepted", "push", "end sent", "end arrives", "verified and acked", "acked",
    ]  # fmt: skip
    assert sorted(story, key=lambda name: begin[name]) == story
    steps = [event for event in events if event["name"].startswith("prefill ")]
    (moved,) = other["transfers"]
    tokens = sum(event["args"]["tokens"] for event in steps)
    assert moved["bytes"] == sum(event["args"]["bytes"] for event in events if event["name"] == "push")
    assert moved["bytes"] == -(-tokens // 16) * KV_BYTES
    assert 0.0 <= moved["share_hidden"] <= 1.0 and moved["repairs"] == 0
    first = min(event["ts"] for event in events if event["name"] == "tokens to the client")
    assert max(step["ts"] + step["dur"] for step in steps) <= first < begin["ends"]
    assert sum(event["name"].startswith("decode ") for event in events) == 3
    table = shown.getvalue()
    assert "KV left prefill-" in table and "ui.perfetto.dev" in table

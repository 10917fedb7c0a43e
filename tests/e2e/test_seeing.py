"""Promise: what a running cluster does can be seen: of a request who did what when, of the KV how it moved."""

import io
import itertools
import json
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from cluster.trace import ask, fetch, trace
from tests.e2e.conftest import Running, wait_until, wait_until_idle

pytestmark = [pytest.mark.ray, pytest.mark.parametrize("cluster", ["shm"], indirect=True)]
KV_BYTES = 96 << 10
"""Of one block of the bundled model in fp32."""


def figure(page: str, name: str, **labels: str) -> float:
    """Of all workers together."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


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


def test_the_doctor_measures_every_pair_of_a_running_cluster_and_takes_nothing(cluster: Running) -> None:
    found = cluster.examine()
    assert not found["findings"] and found["num_pairs"] == 4
    assert {(pair["prefill"], pair["decode"]) for pair in found["pairs"]} == {
        (f"prefill-{one}", f"decode-{other}") for one in range(2) for other in range(2)
    }
    for pair in found["pairs"]:
        assert pair["problem"] is None and pair["bytes"] % KV_BYTES == 0 and pair["bytes"] > KV_BYTES
        assert pair["bytes_per_second"] > 0 and pair["one_block_seconds"] > 0
    assert len({(worker["baton"], worker["protocol"], worker["torch"]) for worker in found["workers"]}) == 1
    assert type(found["workers"][0]["torch"]) is str, "who reads it need not import PyTorch"
    wait_until_idle(cluster, within=5)


def test_the_metrics_page_counts_the_hand_overs_of_both_ends(cluster: Running) -> None:
    name, numbers = "baton_kv_transfer_bytes_total", itertools.count()

    def one_request_was_counted() -> bool:
        """And nothing that another test had done before, but that comes to the page only now."""
        before = httpx.get(cluster.url + "/metrics").text
        prompt = f"{next(numbers)} kings and " * 200  # another one each time, so that no cache has it
        (moved,) = fetch(cluster.url, ask(cluster.url, prompt, 4))["otherData"]["transfers"]

        def grown(name: str, **labels: str) -> float:
            return figure(httpx.get(cluster.url + "/metrics").text, name, **labels) - figure(before, name, **labels)

        def both_ends_are_counted() -> bool:
            bytes_moved = [grown(name, direction=direction) for direction in ("sent", "received")]
            ended = [grown("baton_kv_transfers_total", role=role) for role in ("prefill", "decode")]
            return min(bytes_moved) >= moved["bytes"] and min(ended) >= 1

        wait_until(both_ends_are_counted, 5, "the hand-over")
        assert all(grown("baton_kv_transfer_seconds_total", role=role) > 0 for role in ("prefill", "decode"))
        return all(grown(name, direction=direction) == moved["bytes"] for direction in ("sent", "received"))

    wait_until(one_request_was_counted, 30, "the bytes of one request")
    assert figure(httpx.get(cluster.url + "/metrics").text, "baton_kv_quarantined_blocks") == 0

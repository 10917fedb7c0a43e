"""Promises about links: what is corrupt is never believed, what is cut or slow holds nobody up for long."""

import time

import pytest

from cluster.chaos.core.faults import Kind
from cluster.chaos.session import LINKS
from kv_transfer.transports.switched import SOUND
from tests.chaos.conftest import Run, Running, check_same, through, wait_until_idle

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
PREFILL = ("prefill-0", "prefill-1")


def with_bad_links(cluster: Running, kind: Kind, *workers: str) -> Run:
    """Streams all of which begin while the links out of ``workers`` are bad."""
    for worker in workers:
        cluster.call(worker, "inject", LINKS[kind])
    try:
        return through(cluster, lambda: None, when=lambda streams: True)
    finally:
        for worker in workers:
            cluster.call(worker, "inject", SOUND)


def test_corrupt_kv_is_found_and_repaired_and_no_client_notices(cluster: Running) -> None:
    check_same(with_bad_links(cluster, Kind.CORRUPT, *PREFILL))
    wait_until_idle(cluster, within=2)


def test_a_cut_link_costs_a_stream_less_than_four_seconds(cluster: Running) -> None:
    run = with_bad_links(cluster, Kind.CUT, "prefill-0")
    check_same(run)
    assert run.resumed and run.slowest < 4 + cluster.compute
    wait_until_idle(cluster, within=2)


def test_over_a_slow_link_every_stream_is_the_same(cluster: Running) -> None:
    begun = time.monotonic()
    check_same(with_bad_links(cluster, Kind.SLOW, "prefill-0"))
    assert time.monotonic() - begun < 30
    wait_until_idle(cluster, within=2)

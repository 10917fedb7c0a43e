"""Promises about a router that dies: streams do without it, and its successor learns what there is."""

import os
import signal
import time

import pytest

from cluster.chaos.processes import Life
from tests.chaos.conftest import Running, check_same, through, wait, wait_until_idle

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


def test_streams_go_on_while_the_router_is_gone_and_new_ones_begin_when_it_is_back(cluster: Running) -> None:
    pid = cluster.lives()["router"].pid
    run = through(cluster, lambda: os.kill(pid, signal.SIGKILL), when=lambda streams: any(s.first > 0 for s in streams))
    check_same(run)
    wait_until_idle(cluster, within=15)
    check_same(through(cluster, lambda: None, when=lambda streams: True))
    wait_until_idle(cluster, within=2)


def test_a_router_that_stands_still_is_replaced_before_a_new_stream_has_waited_for_four_seconds(
    cluster: Running,
) -> None:
    pid = cluster.lives()["router"].pid
    run = through(cluster, lambda: os.kill(pid, signal.SIGSTOP), when=lambda streams: any(s.first > 0 for s in streams))
    check_same(run)
    wait(lambda: cluster.lives().get("router", Life("", pid, 0)).pid != pid, 10, "another router serves")
    pid, struck = cluster.lives()["router"].pid, time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    run = through(cluster, lambda: None, when=lambda streams: True)
    check_same(run)
    assert 1.9 < max(stream.first for stream in run.streams) - struck < 4 + cluster.compute
    wait_until_idle(cluster, within=15)

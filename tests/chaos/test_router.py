"""Promises about a router that dies or stands still: streams do without it, and its successor learns what there is."""

import os
import signal

import pytest

from tests.chaos.conftest import Running, check_same, through, wait_until_idle

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


def test_a_router_that_stands_still_is_replaced_before_a_stream_has_waited_for_it_for_four_seconds(
    cluster: Running,
) -> None:
    pid = cluster.lives()["router"].pid
    run = through(cluster, lambda: os.kill(pid, signal.SIGSTOP), when=lambda streams: True)
    check_same(run)
    waited = max(stream.first for stream in run.streams) - run.struck
    assert 1.9 < waited < 4 + cluster.compute
    assert cluster.lives()["router"].pid != pid
    wait_until_idle(cluster, within=15)


def test_streams_go_on_while_the_router_is_gone_and_new_ones_begin_when_it_is_back(cluster: Running) -> None:
    pid = cluster.lives()["router"].pid
    run = through(cluster, lambda: os.kill(pid, signal.SIGKILL), when=lambda streams: any(s.first > 0 for s in streams))
    check_same(run)
    wait_until_idle(cluster, within=15)
    check_same(through(cluster, lambda: None, when=lambda streams: True))
    wait_until_idle(cluster, within=2)

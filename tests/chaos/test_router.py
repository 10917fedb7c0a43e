"""Promises about a router that dies: streams do without it, and its successor learns what there is."""

import os
import signal

import pytest

from tests.chaos.conftest import Running, check_same, through, wait_until_idle

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


def test_streams_go_on_while_the_router_is_gone_and_new_ones_begin_when_it_is_back(cluster: Running) -> None:
    pid = cluster.lives()["router"].pid
    run = through(cluster, lambda: os.kill(pid, signal.SIGKILL), when=lambda streams: any(s.first > 0 for s in streams))
    check_same(run)
    wait_until_idle(cluster, within=15)
    check_same(through(cluster, lambda: None, when=lambda streams: True))
    wait_until_idle(cluster, within=2)

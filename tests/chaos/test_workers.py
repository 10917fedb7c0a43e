"""Promises about workers that die or stand still."""

import os
import signal

import pytest

from tests.chaos.conftest import Running, check_same, detected, through, wait_until_idle

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


def test_a_decode_worker_that_stands_still_is_left_behind_and_its_late_words_are_not_heard(cluster: Running) -> None:
    pid = cluster.lives()["decode-0"].pid
    run = through(
        cluster, lambda: os.kill(pid, signal.SIGSTOP), when=lambda streams: sum(s.first > 0 for s in streams) > 6
    )
    os.kill(pid, signal.SIGCONT)
    check_same(run)
    assert detected(cluster, run, "decode-0") < 3
    assert run.resumed and run.slowest < 4
    wait_until_idle(cluster, within=5)


def test_a_prefill_worker_that_dies_costs_its_streams_less_than_two_seconds(cluster: Running) -> None:
    pid = cluster.lives()["prefill-0"].pid
    run = through(cluster, lambda: os.kill(pid, signal.SIGKILL), when=lambda streams: any(s.first > 0 for s in streams))
    check_same(run)
    assert detected(cluster, run, "prefill-0") < 1
    assert run.resumed and run.slowest < 2
    wait_until_idle(cluster, within=2)


def test_a_decode_worker_that_dies_costs_its_streams_less_than_three_seconds(cluster: Running) -> None:
    pid = cluster.lives()["decode-0"].pid
    run = through(
        cluster, lambda: os.kill(pid, signal.SIGKILL), when=lambda streams: sum(s.first > 0 for s in streams) > 6
    )
    check_same(run)
    assert detected(cluster, run, "decode-0") < 1
    assert run.resumed and run.slowest < 3
    wait_until_idle(cluster, within=2)

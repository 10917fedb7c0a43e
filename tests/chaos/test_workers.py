"""Promises about workers that die or stand still."""

import os
import signal

import pytest

from tests.chaos.conftest import Running, check_same, detected, through, wait, wait_until_idle

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


def test_a_decode_worker_that_stands_still_is_left_behind_and_its_late_words_are_not_heard(cluster: Running) -> None:
    pid = cluster.lives()["decode-0"].pid
    run = through(
        cluster, lambda: os.kill(pid, signal.SIGSTOP), when=lambda streams: sum(s.first > 0 for s in streams) > 6
    )
    os.kill(pid, signal.SIGCONT)
    check_same(run)
    assert detected(cluster, run, "decode-0") < 3
    assert run.resumed and run.slowest < 4 + cluster.compute
    wait_until_idle(cluster, within=5)


def test_a_prefill_worker_that_dies_costs_its_streams_less_than_two_seconds(cluster: Running) -> None:
    pid = cluster.lives()["prefill-0"].pid
    run = through(cluster, lambda: os.kill(pid, signal.SIGKILL), when=lambda streams: any(s.first > 0 for s in streams))
    check_same(run)
    assert detected(cluster, run, "prefill-0") < 1
    assert run.resumed and run.slowest < 2 + cluster.compute
    wait_until_idle(cluster, within=2)


def test_a_worker_that_died_serves_again_under_its_name_as_another_process(cluster: Running) -> None:
    before = cluster.lives()["prefill-1"]
    os.kill(before.pid, signal.SIGKILL)
    wait(lambda: cluster.lives().get("prefill-1", before) != before, 60, "prefill-1 is started again")
    assert cluster.lives()["prefill-1"].epoch != before.epoch
    pid = cluster.lives()["prefill-0"].pid  # now the other one has to do all the work
    run = through(cluster, lambda: os.kill(pid, signal.SIGKILL), when=lambda streams: any(s.first > 0 for s in streams))
    check_same(run)
    wait_until_idle(cluster, within=2)


def test_prefill_and_decode_worker_of_a_stream_may_die_together(cluster: Running) -> None:
    pids = [cluster.lives()[name].pid for name in ("prefill-0", "decode-1")]

    def strike() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    run = through(cluster, strike, when=lambda streams: sum(s.first > 0 for s in streams) > 6)
    check_same(run)
    assert run.resumed and run.slowest < 4 + cluster.compute
    wait_until_idle(cluster, within=2)


def test_a_decode_worker_that_dies_costs_its_streams_less_than_three_seconds(cluster: Running) -> None:
    pid = cluster.lives()["decode-0"].pid
    run = through(
        cluster, lambda: os.kill(pid, signal.SIGKILL), when=lambda streams: sum(s.first > 0 for s in streams) > 6
    )
    check_same(run)
    assert detected(cluster, run, "decode-0") < 1
    assert run.resumed and run.slowest < 3 + cluster.compute
    wait_until_idle(cluster, within=2)

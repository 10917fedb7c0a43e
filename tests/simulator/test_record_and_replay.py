"""Promise: what the state machines of a real run were told is enough to make them answer the same once more."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from decode_worker.core.machine import DecodeMachine
from gateway.core.session import Session
from gateway.recorded import RecordedSession
from messages.codec import BadMessage, decoder_for, pack_tokens
from messages.common import Role
from messages.gateway_to_router import PlacementWanted
from messages.ids import Address, RequestId
from messages.router_to_gateway import Placed, WorkerLost
from messages.sampling import SamplingParams
from messages.seals import seal
from prefill_worker.core.machine import PrefillMachine
from router.actor import RouterActor, RouterConfig
from router.core.machine import Router, RouterSettings
from runtime.mailbox import Mailbox
from runtime.recorder import Recorder
from simulator.replay import CORES, Replay, replay
from tests.gateway.conftest import MODEL, serving
from tests.gateway.test_session import TIMEOUTS
from tests.router.test_loop import next_message
from tests.router.world import KEY, finished, prefilled, register, report, wanted
from tests.workers.relay import relay_of
from worker.core import machine as worker

ROOT = Path(__file__).parents[2]


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def equal(path: Path, calls: int = 1) -> Replay:
    """The replay of a file in which nothing differs."""
    result = replay(path)
    assert result.difference is None, str(result)
    assert result.calls >= calls
    return result


def route(folder: Path) -> None:
    """A router that hears of two workers, places, loses one of them, and stops."""
    actor = RouterActor(RouterConfig(host="127.0.0.1", settings=RouterSettings(cluster_key=KEY), record=str(folder)))
    gateway = Mailbox("127.0.0.1", decoder_for(Placed, WorkerLost))
    try:
        router = actor.start()["address"]
        for worker, role in (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE), ("decode-1", Role.DECODE)):
            gateway.send(router, seal(KEY, register(worker, role)))
            gateway.send(router, report(worker, 1))
        for number in range(8):
            gateway.send(router, wanted(f"r{number}", gateway=gateway.address))
            placed = next_message(gateway, Placed)
            gateway.send(router, prefilled(placed.request))
            if number % 2:
                gateway.send(router, finished(placed.request))
        actor.worker_died("decode-0", 1, "killed")
        assert next_message(gateway, WorkerLost).worker == "decode-0"
    finally:
        actor.stop()
        gateway.close()


def test_a_router_that_ran_answers_the_same_once_more(tmp_path: Path) -> None:
    route(tmp_path / "journals")
    path = only(tmp_path / "journals")
    assert path.name == "router.0.journal"
    assert equal(path, calls=20).machines == 1
    assert str(equal(path)).endswith("actions equal")


def test_a_gateway_that_served_answers_the_same_once_more(tmp_path: Path, tiny_llama: Path) -> None:
    with serving(tiny_llama, record=str(tmp_path / "journals")) as (cluster, server), httpx.Client() as client:
        url = server.url + "/v1/completions"
        body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 20}
        for changes in ({}, {"n": 3, "temperature": 1.0}, {"stop": [" "], "max_tokens": 40}, {"stream": True}):
            assert client.post(url, json=body | changes, timeout=10).status_code == 200
        cluster.hold_after = 4
        with pytest.raises(httpx.ReadTimeout):
            client.post(url, json=body, timeout=0.3)
        wait_until(lambda: server._hub is not None and not server._hub.num_sequences)
    assert equal(only(tmp_path / "journals"), calls=30).machines == 7


def test_workers_that_handed_over_answer_the_same_once_more(tmp_path: Path, tiny_llama: Path) -> None:
    """Chunked prompts, cached ones, sampling, log-probabilities, an abort in the middle, a peer that is lost, and pools
    so small that sequences make room for each other."""
    roles = (Role.PREFILL, Role.DECODE, Role.COLOCATED)
    with relay_of(tiny_llama, *roles, record=str(tmp_path), num_blocks=24, prefill_chunk=16) as relay:
        pair = {"prefill": "prefill-0", "decode": "decode-0"}
        greedy = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=2)
        drawn = SamplingParams(max_tokens=60, seed=7, ignore_eos=True, prompt_logprobs=1)
        prompts = [list(range(3 + start, 3 + start + length)) for start, length in ((0, 40), (0, 50), (9, 5), (1, 70))]
        requests = [relay.send(prompt, params, **pair) for prompt in prompts for params in (greedy, drawn)]
        requests += [relay.send(prompts[0], drawn, colocated="colocated-0") for _ in range(3)]
        relay.wait(lambda: len(relay.streams[requests[1]].tokens) > 3)
        relay.abort(requests[1])
        relay.finish(*(request for request in requests if request != requests[1]))
        relay.lose("prefill-0", dead=True)
        relay.wait_until_idle()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "colocated-0.0.journal", "decode-0.0.journal", "prefill-0.0.journal",
    ]  # fmt: skip
    # In another process sets have another order: what depended on it would differ.
    command = [sys.executable, "-c", "from cluster.cli import main; main()", "replay", *map(str, tmp_path.iterdir())]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    replayed = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    lines = replayed.stdout.splitlines()
    assert len(lines) == 3 and all(line.endswith("actions equal") for line in lines)
    assert min(int(line.split()[1]) for line in lines) > 50


def wait_until(holds: Any) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_files_are_for_their_owner_and_never_written_over(tmp_path: Path) -> None:
    for _ in range(2):
        Recorder(tmp_path / "journals", "router").close()
    assert sorted(path.name for path in (tmp_path / "journals").iterdir()) == ["router.0.journal", "router.1.journal"]
    assert stat.S_IMODE((tmp_path / "journals").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "journals").iterdir()} == {0o600}


def test_the_first_difference_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    route(tmp_path)
    monkeypatch.setattr(Router, "_serve", lambda router, now: [])
    monkeypatch.setattr(Router, "_placement_wanted", lambda router, event, now: [])
    result = replay(only(tmp_path))
    assert result.difference is not None
    assert isinstance(result.difference.event, PlacementWanted)
    told = str(result)
    assert "the first difference" in told and "recorded besides" in told and "'Placed'" in told


def session(recorder: Recorder) -> Session:
    return RecordedSession(
        recorder, RequestId("r"), pack_tokens([1, 2]), SamplingParams(max_tokens=3),
        gateway=Address("tcp://127.0.0.1:2"), router=Address("tcp://127.0.0.1:3"), tenant="t",
        timeouts=TIMEOUTS, max_attempts=2,
    )  # fmt: skip


def test_what_a_machine_raises_is_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path, "gateway")
    broken = session(recorder)
    broken.start(1.0)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Session, "_dispatch", lambda session, event, now: 1 // 0)
        broken.handle(WorkerLost(worker="d", epoch=1, detail=""), 2.0)  # type: ignore[arg-type]
    # No flush by hand: the process may be about to end.
    result = replay(only(tmp_path))
    assert result.difference is not None and "recorded 'ZeroDivisionError', replayed []" in str(result)
    monkeypatch.setattr(Session, "_dispatch", lambda session, event, now: 1 // 0)
    equal(only(tmp_path), calls=2)
    recorder.close()


def test_a_file_stops_at_its_size_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(tmp_path, "gateway", max_bytes=900)
    one = session(recorder)
    one.start(1.0)
    for number in range(100):
        one.handle(WorkerLost(worker="d", epoch=1, detail="x" * 50), 2.0 + number)  # type: ignore[arg-type]
    recorder.close()
    assert "has reached its size" in caplog.text
    result = equal(only(tmp_path))
    assert result.full and result.calls < 20


def test_a_file_of_a_killed_process_is_replayed_up_to_its_last_whole_call(tmp_path: Path) -> None:
    route(tmp_path)
    path = only(tmp_path)
    calls = replay(path).calls
    path.write_bytes(path.read_bytes()[:-5])
    assert equal(path).calls == calls - 1


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "no.journal"
    path.write_bytes(b"\x05\x00\x00\x00hello")
    with pytest.raises(BadMessage):
        replay(path)


def test_every_event_of_a_router_and_a_worker_can_be_read_back(tmp_path: Path) -> None:
    assert all(CORES["router"].events.knows(kind) for kind in Router(RouterSettings(cluster_key=KEY))._handlers)
    handed = {*PrefillMachine.takes, *DecodeMachine.takes, *worker.Messages}
    assert all(CORES["worker"].events.knows(kind) for kind in handed)

"""Promise: under ``transport: auto`` KV takes the way that goes from where two workers are, and another if it fails."""

from pathlib import Path

import pytest

from kv_transfer.transports import build, shm
from kv_transfer.transports.base import TransportError
from messages.common import FailReason, Role
from messages.ids import Attempt, RequestId
from messages.sampling import SamplingParams
from tests.workers.relay import config, relay_of
from tests.workers.test_relay import PAIR, prompt

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
PROMPT = prompt(70, 1)


@pytest.fixture(scope="module")
def alone(tiny_llama: Path) -> list[int]:
    with relay_of(tiny_llama, Role.COLOCATED) as relay:
        return relay.finish(relay.send(PROMPT, GREEDY, colocated="colocated-0"))[0].token_ids()


@pytest.fixture
def unmappable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something keeps processes from each other's memory, although they seem to be on one host."""

    def refuse(*_: object) -> None:
        raise TransportError("the system forbids it")

    monkeypatch.setattr(shm, "PeerMemory", refuse)


def test_a_way_that_turns_out_closed_fails_one_attempt_and_the_next_goes_another(
    tiny_llama: Path, alone: list[int], unmappable: None
) -> None:
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE, transport="auto") as relay:
        request = relay.send(PROMPT, GREEDY, **PAIR)
        (stream,) = relay.finish(request)
        assert stream.failed is not None and stream.failed.reason is FailReason.TRANSFER
        assert "the system forbids it" in stream.failed.detail
        relay.order(request, Attempt(2), PROMPT, GREEDY, [], **PAIR)
        (stream,) = relay.finish(request)
        assert stream.token_ids() == alone
        relay.wait_until_idle()
        assert relay.reports["decode-0"].transfers == 1


def test_workers_of_two_hosts_do_not_try_to_share_memory(
    tiny_llama: Path, alone: list[int], unmappable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with relay_of(tiny_llama) as relay:
        for role in (Role.PREFILL, Role.DECODE):
            monkeypatch.setattr(build, "mapping_host", lambda role=role: f"host of {role}")
            relay.start(config(relay, f"{role}-0", role, tiny_llama, transport="auto"))
        assert relay.finish(relay.send(PROMPT, GREEDY, **PAIR))[0].token_ids() == alone
        relay.wait_until_idle()


def test_a_named_transport_that_does_not_reach_is_refused_with_the_cure(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with relay_of(tiny_llama) as relay:
        for role in (Role.PREFILL, Role.DECODE):
            monkeypatch.setattr(build, "mapping_host", lambda role=role: f"host of {role}")
            relay.start(config(relay, f"{role}-0", role, tiny_llama, transport="shm"))
        relay.start(config(relay, "decode-1", Role.DECODE, tiny_llama, transport="zmq"))
        for decode, why in (("decode-0", "set kv.transport to auto or zmq"), ("decode-1", "offers zmq; give both")):
            request = RequestId(decode[-1] * 32)
            relay.order(request, Attempt(1), PROMPT, GREEDY, [], prefill="prefill-0", decode=decode)
            (stream,) = relay.finish(request)
            assert stream.failed is not None and stream.failed.reason is FailReason.REFUSED
            assert why in stream.failed.detail

"""Promise: a prompt prefilled by one worker and decoded by another gives the tokens that one worker alone gives."""

import json
import queue
import shutil
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from engine.core.outputs import StepOutput
from engine.core.scheduler import StepPlan
from engine.runner import ModelRunner
from messages.common import CacheCounts, DecisionCounts, FailReason, Role
from messages.ids import Attempt, RequestId
from messages.sampling import FinishReason, SamplingParams
from tests.kv_transfer.test_shared_memory import num_pidfds
from tests.workers.relay import Relay, config, relay_of
from worker.core.machine import WorkerMachine

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PAIR = {"prefill": "prefill-0", "decode": "decode-0"}


def prompt(length: int, seed: int = 3) -> list[int]:
    return [(seed * 7919 + place * 104729) % 2000 + 10 for place in range(length)]


@pytest.fixture(scope="module")
def alone(tiny_llama: Path) -> dict[int, list[int]]:
    """What a colocated worker answers, by length of prompt."""
    lengths = (1, 15, 16, 17, 100, 700)
    with relay_of(tiny_llama, Role.COLOCATED) as relay:
        requests = {length: relay.send(prompt(length, length), GREEDY, colocated="colocated-0") for length in lengths}
        relay.finish(*requests.values())
        return {length: relay.streams[request].token_ids() for length, request in requests.items()}


@pytest.mark.parametrize("transport", ["inproc", "shm", "zmq"])
@pytest.mark.parametrize("chunk", [16, 512])
def test_the_relay_gives_the_tokens_of_one_worker(
    tiny_llama: Path, alone: dict[int, list[int]], transport: str, chunk: int
) -> None:
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE, transport=transport, prefill_chunk=chunk) as relay:
        requests = {length: relay.send(prompt(length, length), GREEDY, **PAIR) for length in alone}
        relay.finish(*requests.values())
        for length, request in requests.items():
            stream = relay.streams[request]
            assert stream.token_ids() == alone[length], f"{length} tokens"
            assert stream.finish is FinishReason.LENGTH
            layout = 6 * 2 * 4 * 32 * 4 * 16
            assert sum(chunk.kv_bytes for chunk in stream.chunks) == -(-length // 16) * layout


def test_sampled_streams_go_on_elsewhere_with_the_same_tokens(tiny_llama: Path) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, seed=11, ignore_eos=True, frequency_penalty=0.5)
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE) as relay:
        whole = relay.send(prompt(40), params, **PAIR)
        relay.finish(whole)
        tokens = relay.streams[whole].token_ids()
        for cut in (1, 7, 19):
            again = relay.send(prompt(40), params, generated=tokens[:cut], **PAIR)
            relay.finish(again)
            assert relay.streams[again].token_ids() == tokens[cut:]
            assert min(relay.streams[again].tokens) == cut


def test_a_request_of_one_token_moves_no_kv(tiny_llama: Path) -> None:
    one = SamplingParams(max_tokens=1, temperature=0)
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE) as relay:
        request = relay.send(prompt(100), one, **PAIR)
        relay.finish(request)
        assert len(relay.streams[request].token_ids()) == 1
        relay.wait_until_idle()
        assert relay.reports["decode-0"].transfers == 0


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_an_abort_frees_every_block_on_both_sides(tiny_llama: Path, transport: str) -> None:
    endless = SamplingParams(max_tokens=3000, temperature=0, ignore_eos=True)
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE, transport=transport, prefill_chunk=16) as relay:
        requests = [relay.send(prompt(900, seed), endless, **PAIR) for seed in range(6)]
        relay.wait(lambda: relay.streams[requests[0]].tokens)
        for request in requests:
            relay.abort(request)
        relay.wait_until_idle()
        for worker in relay.workers.values():
            seen = worker.inspect()
            for counted in (*CacheCounts.__struct_fields__, *DecisionCounts.__struct_fields__):
                seen.pop(counted, None)
            assert seen.pop("free") + seen.pop("cached") == seen.pop("total")
            assert set(seen.values()) == {0}


def test_a_late_order_of_an_aborted_attempt_is_not_taken_up(tiny_llama: Path) -> None:
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE) as relay:
        request = RequestId("a" * 32)
        relay.abort(request, attempt=1)
        relay.order(request, Attempt(1), prompt(5), GREEDY, [], **PAIR)
        relay.order(request, Attempt(2), prompt(6), GREEDY, [], **PAIR)
        (stream,) = relay.finish(request)
        assert {chunk.attempt for chunk in stream.chunks} == {2}


def test_what_cannot_run_here_is_said_and_harms_nobody(tiny_llama: Path) -> None:
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE, num_blocks=16) as relay:
        good = relay.send(prompt(30), GREEDY, **PAIR)
        beyond = relay.send(prompt(400), GREEDY, **PAIR)
        strange = relay.send([5, 2048], GREEDY, **PAIR)
        streams = relay.finish(good, beyond, strange)
        assert streams[0].finish is FinishReason.LENGTH
        assert [stream.failed.reason for stream in streams[1:] if stream.failed] == [FailReason.CAPACITY] * 2


def test_more_requests_than_blocks_are_all_answered(tiny_llama: Path, alone: dict[int, list[int]]) -> None:
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE, num_blocks=50, transport="shm") as relay:
        requests = [relay.send(prompt(length, length), GREEDY, **PAIR) for length in (100, 700, 17) * 6]
        relay.finish(*requests)
        for request, length in zip(requests, (100, 700, 17) * 6, strict=True):
            assert relay.streams[request].token_ids() == alone[length]


def test_preempted_sequences_end_with_the_same_tokens(tiny_llama: Path) -> None:
    long = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    prompts = [prompt(20, seed) for seed in range(5)]
    with relay_of(tiny_llama, Role.COLOCATED) as relay:
        requests = [relay.send(each, long, colocated="colocated-0") for each in prompts]
        expected = [stream.token_ids() for stream in relay.finish(*requests)]
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE, num_blocks=20) as relay:
        requests = [relay.send(each, long, **PAIR) for each in prompts]
        assert [stream.token_ids() for stream in relay.finish(*requests)] == expected


def test_an_end_is_sent_again_until_it_is_acked(tiny_llama: Path) -> None:
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE) as relay:
        relay.ack = False
        request = relay.send(prompt(10), GREEDY, **PAIR)
        relay.wait(lambda: sum(chunk.finish is not None for chunk in relay.streams[request].chunks) >= 3)
        relay.ack = True
        relay.wait(lambda: relay.workers["decode-0"].inspect()["deliveries"] == 0)


def test_what_a_prefill_worker_in_a_long_step_may_still_write_into_stays_held(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router takes it for lost while it computes; it goes on, and writes no more once it has read the cancel."""
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE, transport="shm", prefill_chunk=16) as relay:
        computing, go_on = threading.Event(), threading.Event()
        run = ModelRunner.run

        def long_step(runner: ModelRunner, plan: StepPlan) -> StepOutput:
            if computing.is_set():
                go_on.wait(10)
            computing.set()
            return run(runner, plan)

        monkeypatch.setattr(ModelRunner, "run", long_step)
        decode = relay.workers["decode-0"]
        request = relay.send(prompt(100), GREEDY, **PAIR)
        relay.wait(lambda: computing.is_set() and decode.inspect()["held"] == 7)
        relay.lose("prefill-0", dead=False)
        seen = relay.reports["decode-0"].number
        relay.wait(lambda: relay.reports["decode-0"].number > seen + 2)  # it has long read it
        assert decode.inspect()["held"] == 7
        go_on.set()
        (stream,) = relay.finish(request)
        assert stream.failed is not None and stream.failed.reason is FailReason.TRANSFER
        relay.wait(lambda: decode.inspect()["held"] == 0)


def test_a_dead_peer_leaves_no_mapping_and_no_socket_behind(tiny_llama: Path) -> None:
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE, transport="shm") as relay:
        relay.finish(relay.send(prompt(40), GREEDY, **PAIR))
        relay.wait_until_idle()
        outbox = relay.outbox_of("prefill-0")
        assert (num_pidfds(), outbox.num_peers) == (1, 3)  # router, gateway, decode-0
        relay.lose("decode-0", dead=False)
        relay.wait_until_idle()
        assert num_pidfds() == 1
        relay.lose("decode-0", dead=True)
        relay.wait(lambda: (num_pidfds(), outbox.num_peers) == (0, 2))


def test_a_forged_ticket_opens_nothing(tiny_llama: Path) -> None:
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE, cluster_key=b"x" * 32) as relay:
        request = relay.send(prompt(10), GREEDY, **PAIR)
        relay.wait(lambda: relay.workers["prefill-0"].inspect()["forged"] == 1)
        assert not relay.streams[request].over  # whoever forges gets no answer


@pytest.mark.parametrize("failing", ["the digests", "the machine"])
def test_a_loop_that_fails_says_so_to_its_host(
    tiny_llama: Path, failing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> bytes:
        raise MemoryError("no room")

    relay = Relay()
    try:
        for role in (Role.PREFILL, Role.DECODE):
            relay.start(config(relay, f"{role}-0", role, tiny_llama))
        failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        worker = relay.workers["prefill-0"]
        worker.on_failure = failures.put
        if failing == "the digests":
            monkeypatch.setattr("runtime.kv_port.digests", broken)
        else:
            monkeypatch.setattr(WorkerMachine, "handle", broken)
        relay.send(prompt(40), GREEDY, **PAIR)
        error = failures.get(timeout=10)
        assert isinstance(error.__cause__ or error, MemoryError)
        assert "the loop of prefill-0 has failed" in caplog.text
        worker.stop()  # gives back what it can all the same
        del relay.workers["prefill-0"]
    finally:
        monkeypatch.undo()
        relay.stop()


def test_logprobs_travel_with_their_tokens(tiny_llama: Path) -> None:
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=3, prompt_logprobs=1)
    with relay_of(tiny_llama, Role.PREFILL, Role.DECODE) as relay:
        request = relay.send(prompt(20), params, **PAIR)
        (stream,) = relay.finish(request)
        entries = [chunk.logprobs for chunk in sorted(stream.chunks, key=lambda chunk: chunk.index) if chunk.tokens]
        assert all(entry is not None for entry in entries)
        ranks = [rank for entry in entries if entry for rank in entry.ranks]
        assert ranks == [1] * 6
        prompt_logprobs = next(chunk.prompt_logprobs for chunk in stream.chunks if chunk.prompt_logprobs)
        assert len(prompt_logprobs.sampled) == 19


def test_logits_that_are_no_numbers_fail_their_own_request_only(tiny_llama: Path, tmp_path: Path) -> None:
    folder = poisoned(tiny_llama, tmp_path / "model")
    with relay_of(folder, Role.PREFILL, Role.DECODE, Role.COLOCATED) as relay:
        requests = [
            relay.send(tokens, GREEDY, **pair)
            for tokens in ([5, 7, 9], [5, 6, 9])
            for pair in (PAIR, {"colocated": "colocated-0"})
        ]
        streams = relay.finish(*requests)
        assert [stream.failed.reason for stream in streams if stream.failed] == [FailReason.ENGINE] * 2
        assert [len(stream.tokens) for stream in streams] == [0, 0, 12, 12]


def test_blocks_that_held_no_numbers_do_no_harm_to_their_next_owner(tiny_llama: Path, tmp_path: Path) -> None:
    """Poison in the middle of a prompt of many chunks; the next request gets the same blocks."""
    folder = poisoned(tiny_llama, tmp_path / "model")
    with relay_of(folder, Role.PREFILL, Role.DECODE, transport="shm", prefill_chunk=16, num_blocks=64) as relay:
        poison = [*[5] * 40, 7, *[5] * 161]
        for _ in range(2):
            (bad,) = relay.finish(relay.send(poison, GREEDY, **PAIR))
            assert bad.failed is not None and bad.failed.reason is FailReason.ENGINE
        relay.wait_until_idle()
        for worker in relay.workers.values():  # nor can any of it be found
            assert (worker.inspect()["cached"], worker.inspect()["prefix_cache_hits"]) == (0, 0)
        long = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
        (good,) = relay.finish(relay.send([5] * 10, long, **PAIR))
        assert good.failed is None and len(good.tokens) == 40


def poisoned(model: Path, folder: Path) -> Path:
    """The same model, but token 7 has no embedding: whatever attends to it is not a number."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][7] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder

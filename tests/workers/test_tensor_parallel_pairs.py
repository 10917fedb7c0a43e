"""Promise: a prefill worker of so many ranks and a decode worker of so many others answer as transformers does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from messages.common import Role
from messages.sampling import SamplingParams
from tests.relay_cases import NEAR_TIE, transformers_answer
from tests.workers.relay import Relay, config, relay_of
from tests.workers.test_relay import prompt

OUTPUT_TOKENS = 12
GREEDY = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
PAIR = {"prefill": "prefill-0", "decode": "decode-0"}
LENGTHS = (1, 15, 17, 64, 200, 700)
Cases = list[tuple[list[int], list[int]]]


def answered(folder: Path) -> Cases:
    """Prompts without near ties, and transformers' answers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cases = []
    for length in LENGTHS:
        for seed in range(length, length + 50):
            tokens = prompt(length, seed)
            answer, gap = transformers_answer(model, tokens, OUTPUT_TOKENS)
            if gap > NEAR_TIE:
                cases.append((tokens, answer))
                break
    assert len(cases) == len(LENGTHS)
    return cases


@pytest.fixture(scope="module")
def four_heads(tiny_llama: Path) -> tuple[Path, Cases]:
    return tiny_llama, answered(tiny_llama)


@pytest.fixture(scope="module", params=[1, 2, 3], ids="{}-kv-heads".format)
def few_heads(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cases]:
    """Fewer KV heads than the ranks that share them, or as many as do not share evenly."""
    folder = tmp_path_factory.mktemp("few-heads")
    shape = LlamaConfig(
        vocab_size=2048, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=12,
        num_key_value_heads=request.param, head_dim=16, max_position_embeddings=1024, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(request.param)
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder, answered(folder)


def hand_over(model: Path, cases: Cases, prefill: int, decode: int, **changes: Any) -> tuple[list[list[int]], Relay]:
    """The answers of all at once, through workers of so many ranks."""
    changes = {"max_model_len": 1024, "prefill_chunk": 64, **changes}
    with relay_of(model) as relay:
        relay.start(config(relay, "prefill-0", Role.PREFILL, model, tensor_parallel=prefill, **changes))
        relay.start(config(relay, "decode-0", Role.DECODE, model, tensor_parallel=decode, **changes))
        streams = relay.finish(*(relay.send(tokens, GREEDY, **PAIR) for tokens, _ in cases))
        relay.wait_until_idle()
        assert relay.reports["decode-0"].transfers == len(cases)
        return [stream.token_ids() for stream in streams], relay


@pytest.mark.parametrize("transport", ["inproc", "shm", "zmq"])
@pytest.mark.parametrize("ranks", [(2, 1), (1, 2), (2, 4), (4, 2), (2, 2)], ids="{0[0]}-{0[1]}".format)
def test_every_pair_of_degrees_gives_the_tokens_of_transformers(
    four_heads: tuple[Path, Cases], ranks: tuple[int, int], transport: str
) -> None:
    model, cases = four_heads
    got, relay = hand_over(model, cases, *ranks, transport=transport)
    assert got == [answer for _, answer in cases]
    blocks = sum(-(-len(tokens) // 16) for tokens, _ in cases)
    sent = relay.reports["prefill-0"].kv_bytes_sent
    assert sent == relay.reports["decode-0"].kv_bytes_received == blocks * 6 * 2 * 4 * 16 * 32 * 4


@pytest.mark.parametrize("ranks", [(4, 2), (2, 4), (1, 3), (3, 2)], ids="{0[0]}-{0[1]}".format)
def test_heads_that_ranks_share_or_cannot_share_evenly_arrive_too(
    few_heads: tuple[Path, Cases], ranks: tuple[int, int]
) -> None:
    model, cases = few_heads
    got, _ = hand_over(model, cases, *ranks, transport="shm")
    assert got == [answer for _, answer in cases]


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_lanes_are_quantised_on_their_way(four_heads: tuple[Path, Cases], transport: str) -> None:
    """Into what gives the same answers, whichever ranks they come from and go to."""
    model, cases = four_heads
    answers = []
    for ranks in ((1, 1), (2, 1), (1, 2)):
        with relay_of(model) as relay:
            for role, size, dtype in ((Role.PREFILL, ranks[0], "auto"), (Role.DECODE, ranks[1], "int8")):
                relay.start(
                    config(relay, f"{role}-0", role, model, tensor_parallel=size, kv_dtype=dtype, transport=transport)
                )
            streams = [relay.finish(relay.send(tokens, GREEDY, **PAIR))[0] for tokens, _ in cases]
            answers.append([stream.token_ids() for stream in streams])
    assert answers[0] == answers[1] == answers[2]

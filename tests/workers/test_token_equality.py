"""Promise: whichever transport, degrees of tensor parallelism and KV dtype, the tokens are those of one worker alone:
32 at once, cold, and with what either side has cached.

What rounding could turn is no promise: the prompts are those with the widest gaps between their two best logits.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from messages.common import FailReason, Role
from messages.ids import Attempt
from messages.sampling import SamplingParams
from tests.relay_cases import transformers_answer
from tests.workers.relay import Relay, config, relay_of
from tests.workers.test_relay import prompt

AT_ONCE = 32
OUTPUT_TOKENS = 6
GREEDY = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
LENGTHS = (1, 15, 16, 17, 40, 64, 100, 150)
NUM_BLOCKS = 256
"""Room for all prompts at once and what stays cached of them; a larger pool takes longer to make than to use."""
Prompts = tuple[list[int], ...]


@cache
def clear_prompts(model: Path) -> Prompts:
    """Of each length the clearest of some."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    picked: list[list[int]] = []
    for length in LENGTHS:
        drawn = [prompt(length, 10 * length + some) for some in range(10)]
        drawn.sort(key=lambda tokens: -transformers_answer(reference, tokens, OUTPUT_TOKENS)[1])
        picked += drawn[: AT_ONCE // len(LENGTHS)]
    return tuple(picked)


@cache
def alone(model: Path, dtype: str) -> list[list[int]]:
    """What one worker answers, one prompt after the other."""
    with relay_of(model, Role.COLOCATED, kv_dtype=dtype, enable_prefix_caching=False) as relay:
        return [
            relay.finish(relay.send(tokens, GREEDY, colocated="colocated-0"))[0].token_ids()
            for tokens in clear_prompts(model)
        ]


def answers(relay: Relay, prompts: Prompts, prefill: str, decode: str) -> tuple[list[list[int]], int, int]:
    """All at once; the tokens that prefill did not compute, and the bytes that it sent.

    Where a hand-over is given up since another way may be quicker there is a second attempt, as from a gateway. It
    finds what the first has left at prefill, so only the first one's figure of that counts.
    """
    requests = [relay.send(tokens, GREEDY, prefill=prefill, decode=decode) for tokens in prompts]
    slow = [stream.failed for stream in relay.finish(*requests)]
    assert all(failed is None or failed.reason is FailReason.SLOW for failed in slow), slow
    for request, tokens, failed in zip(requests, prompts, slow, strict=True):
        if failed is not None:
            relay.order(request, Attempt(2), tokens, GREEDY, [], prefill=prefill, decode=decode)
    streams = relay.finish(*requests)
    assert not [stream.failed for stream in streams if stream.failed is not None]
    chunks = [chunk for stream in streams for chunk in stream.chunks]
    saved = sum(chunk.cached_tokens for chunk in chunks if chunk.attempt == 1)
    return [stream.token_ids() for stream in streams], saved, sum(chunk.kv_bytes for chunk in chunks)


@pytest.mark.slow  # all of them together
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "fp8"])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (1, 2), (2, 2)], ids="{0[0]}-{0[1]}".format)
@pytest.mark.parametrize("transport", ["shm", "zmq", "nccl"])
def test_the_tokens_are_those_of_one_worker(
    tiny_llama: Path, transport: str, ranks: tuple[int, int], dtype: str
) -> None:
    prompts, expected = clear_prompts(tiny_llama), alone(tiny_llama, dtype)
    with relay_of(tiny_llama) as relay:
        for worker in ("prefill-0", "decode-0", "prefill-1", "decode-1"):
            role = Role(worker.split("-")[0])
            degree = ranks[role is Role.DECODE]
            options = {"kv_dtype": dtype, "transport": transport, "num_blocks": NUM_BLOCKS}
            relay.start(config(relay, worker, role, tiny_llama, tensor_parallel=degree, **options))
        cold, _, everything = answers(relay, prompts, "prefill-0", "decode-0")
        known_to_prefill, saved, sent = answers(relay, prompts, "prefill-0", "decode-1")
        assert saved > sum(map(len, prompts)) / 2 and sent >= everything
        known_to_decode, saved, sent = answers(relay, prompts, "prefill-1", "decode-0")
        assert saved == 0 and sent < everything / 2
        assert cold == known_to_prefill == known_to_decode == expected

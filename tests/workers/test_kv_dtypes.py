"""Promise: KV is handed over into whatever dtype decode stores, with half the bytes where that is one byte a value."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from messages.common import Role
from messages.sampling import SamplingParams
from tests.workers.relay import config, relay_of
from tests.workers.test_relay import prompt

OUTPUT_TOKENS = 16
GREEDY = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
PAIR = {"prefill": "prefill-0", "decode": "decode-0"}


@dataclass(frozen=True)
class Case:
    prompt: list[int]
    answer: list[int]
    """Of one worker in fp32."""


@pytest.fixture(scope="module")
def cases(tiny_llama: Path) -> list[Case]:
    prompts = [Case(prompt(length, seed=length), []) for length in (1, 16, 17, 100, 300, 750)]
    return [Case(case.prompt, answer) for case, answer in zip(prompts, colocated(tiny_llama, prompts), strict=True)]


def colocated(model: Path, cases: list[Case], **changes: Any) -> list[list[int]]:
    """One request after the other, on one worker."""
    with relay_of(model, Role.COLOCATED, **changes) as relay:
        return [relay.finish(relay.send(case.prompt, GREEDY, colocated="colocated-0"))[0].token_ids() for case in cases]


def handed_over(
    model: Path, cases: list[Case], prefill: dict[str, Any], decode: dict[str, Any], **changes: Any
) -> tuple[list[list[int]], int, int]:
    """The same through two workers; the bytes that prefill pushed, and those that decode took."""
    with relay_of(model) as relay:
        relay.start(config(relay, "prefill-0", Role.PREFILL, model, **changes, **prefill))
        relay.start(config(relay, "decode-0", Role.DECODE, model, **changes, **decode))
        streams = [relay.finish(relay.send(case.prompt, GREEDY, **PAIR))[0] for case in cases]
        relay.wait_until_idle()
        reports = relay.reports["prefill-0"], relay.reports["decode-0"]
        return [stream.token_ids() for stream in streams], reports[0].kv_bytes_sent, reports[1].kv_bytes_received


def agreement(made: list[list[int]], cases: list[Case]) -> float:
    """The share of greedy tokens that one fp32 worker gives too, up to each answer's first that it does not."""
    same = 0
    for tokens, case in zip(made, cases, strict=True):
        differ = [place for place, token in enumerate(tokens) if token != case.answer[place]]
        same += differ[0] if differ else len(tokens)
    return same / (len(cases) * OUTPUT_TOKENS)


@pytest.mark.parametrize("transport", ["inproc", "shm", "zmq"])
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_quantised_decode_worker_gets_half_the_bytes_and_goes_on_in_the_same_sense(
    tiny_llama: Path, cases: list[Case], transport: str, dtype: str
) -> None:
    blocks = sum(-(-len(case.prompt) // 16) for case in cases)
    tokens, sent, taken = handed_over(tiny_llama, cases, {}, {"kv_dtype": dtype}, dtype="bfloat16", transport=transport)
    assert sent == taken == blocks * 6 * 2 * 4 * (16 * 32 + 16)
    assert sent < 0.52 * blocks * 6 * 2 * 4 * 16 * 32 * 2
    assert agreement(tokens, cases) > 0.75


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_quantised_kv_moves_with_its_scales(tiny_llama: Path, cases: list[Case], dtype: str) -> None:
    """Byte by byte: decode goes on just where one worker alone would."""
    alone = colocated(tiny_llama, cases, kv_dtype=dtype)
    tokens, _, _ = handed_over(tiny_llama, cases, {"kv_dtype": dtype}, {"kv_dtype": dtype}, transport="shm")
    assert tokens == alone
    assert agreement(tokens, cases) > 0.8


def test_a_float_may_become_another_float(tiny_llama: Path, cases: list[Case]) -> None:
    widths = {"dtype": "bfloat16"}, {"dtype": "float32"}
    widened, wide, _ = handed_over(tiny_llama, cases, *widths, transport="shm")
    narrowed, narrow, _ = handed_over(tiny_llama, cases, *reversed(widths), transport="shm")
    assert wide == 2 * narrow > 0  # what travels is what the receiver stores
    assert min(agreement(widened, cases), agreement(narrowed, cases)) > 0.75


def test_kv_of_another_float_than_the_models_is_stored_moved_and_read(tiny_llama: Path, cases: list[Case]) -> None:
    half, sent, _ = handed_over(tiny_llama, cases, {}, {}, kv_dtype="bfloat16", transport="shm")
    _, whole, _ = handed_over(tiny_llama, cases, {}, {}, transport="shm")
    assert whole == 2 * sent > 0
    assert half == colocated(tiny_llama, cases, kv_dtype="bfloat16")
    assert agreement(half, cases) > 0.75


def test_what_cannot_become_decodes_dtype_is_refused_with_the_reason(tiny_llama: Path, cases: list[Case]) -> None:
    with relay_of(tiny_llama) as relay:
        relay.start(config(relay, "prefill-0", Role.PREFILL, tiny_llama, kv_dtype="int8"))
        relay.start(config(relay, "decode-0", Role.DECODE, tiny_llama, dtype="bfloat16"))
        (stream,) = relay.finish(relay.send(cases[0].prompt, GREEDY, **PAIR))
        assert stream.failed is not None
        assert "decode-0: KV of dtype int8 cannot land in a pool of bfloat16" in stream.failed.detail
        assert stream.failed.reason == "refused"

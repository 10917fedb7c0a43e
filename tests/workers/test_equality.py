"""Promise: sixty prompts through real workers, alone and 32 at once, by every way of the KV: transformers' tokens."""

from pathlib import Path

import pytest

from messages.common import Role
from messages.ids import RequestId
from messages.sampling import SamplingParams
from tests.relay_cases import OUTPUT_TOKENS, Case, relay_cases
from tests.workers.relay import Relay, relay_of

GREEDY = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
AT_ONCE = 32
THREADS = {16: 1, 64: 2, 512: 1}
"""Of each worker, by its chunk. Beside other tests two of them mostly wait for each other."""
WAYS = {
    "colocated": ((Role.COLOCATED,), {"transport": "inproc"}, {"colocated": "colocated-0"}),
    "shm": ((Role.PREFILL, Role.DECODE), {"transport": "shm"}, {"prefill": "prefill-0", "decode": "decode-0"}),
    "zmq": ((Role.PREFILL, Role.DECODE), {"transport": "zmq"}, {"prefill": "prefill-0", "decode": "decode-0"}),
}


def run(relay: Relay, cases: list[Case], pair: dict[str, str], at_once: int) -> list[list[int]]:
    """Answers in the order of the cases, with so many requests in flight."""
    requests: list[RequestId] = []
    for case in cases:
        relay.wait(lambda: sum(not relay.streams[request].over for request in requests) < at_once)
        requests.append(relay.send(case.prompt, GREEDY, **pair))
    return [stream.token_ids() for stream in relay.finish(*requests)]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", THREADS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_tokens_of_transformers(tiny_llama: Path, way: str, chunk: int) -> None:
    roles, changes, pair = WAYS[way]
    cases = list(relay_cases(tiny_llama))
    expected = [case.answer for case in cases]
    with relay_of(tiny_llama, *roles, prefill_chunk=chunk, threads=THREADS[chunk], **changes) as relay:
        assert run(relay, cases, pair, AT_ONCE) == expected
        assert run(relay, cases, pair, 1) == expected

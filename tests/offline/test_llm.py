"""Promise: a script gets from ``LLM`` what the cluster would answer, without Ray, and hears what it did wrong."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baton import LLM, AsyncLLM, ModelError, RequestOutput, SamplingParams
from gateway.core.errors import Unavailable
from messages.sampling import SamplingParams as EngineParams
from offline.outputs import by_position
from tests.relay_cases import OUTPUT_TOKENS, relay_cases

GREEDY = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
TALE = "Once upon a time there was"


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with LLM(tiny_llama, dtype="float32") as llm:
        yield llm


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_sixty_prompts_at_once_are_answered_as_by_transformers(llm: LLM, tiny_llama: Path) -> None:
    cases = relay_cases(tiny_llama)
    outputs = llm.generate([case.prompt for case in cases], GREEDY)
    assert tokens(outputs) == [case.answer for case in cases]
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_a_topology_runs_as_threads_and_answers_the_same(tiny_llama: Path, transport: str) -> None:
    from cluster.topology import Topology

    pools = [{"name": "prefill", "role": "prefill"}, {"name": "decode", "role": "decode", "replicas": 2}]
    topology = Topology.parse(
        {"model": str(tiny_llama), "dtype": "float32", "pools": pools, "kv": {"transport": transport}}
    )
    cases = [case for case in relay_cases(tiny_llama) if len(case.prompt) < 600]
    before = threading.enumerate()
    with LLM(topology=topology) as relay:
        assert tokens(relay.generate([case.prompt for case in cases], GREEDY)) == [case.answer for case in cases]
    # tqdm and pyzmq each keep a thread for the process, of classes of their own.
    assert not [each for each in threading.enumerate() if type(each) is threading.Thread and each not in before]


def test_text_in_gives_text_out_with_the_fields_of_vllm(llm: LLM) -> None:
    asked = SamplingParams(max_tokens=6, temperature=0, logprobs=2, prompt_logprobs=1)
    [output] = llm.generate(TALE, asked)
    [sample] = output.outputs
    assert output.prompt == TALE and sample.text and len(sample.token_ids) == 6
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.prompt_logprobs[0] is None
    assert sample.logprobs is not None
    for token, entry in zip(sample.token_ids, sample.logprobs, strict=True):
        assert entry[token].rank == 1 and len(entry) == 2  # greedy: the likeliest, which is among the two
    assert sample.cumulative_logprob == pytest.approx(
        sum(entry[token].logprob for token, entry in zip(sample.token_ids, sample.logprobs, strict=True))
    )


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    [whole] = llm.generate(TALE, SamplingParams(max_tokens=24, temperature=0))
    word = whole.outputs[0].text.split()[3]
    [cut] = llm.generate(TALE, SamplingParams(max_tokens=24, temperature=0, stop=word))
    assert cut.outputs[0].finish_reason == "stop"
    assert cut.outputs[0].text == whole.outputs[0].text.split(word)[0]


def test_samples_draw_with_consecutive_seeds(llm: LLM) -> None:
    drawn = SamplingParams(n=3, max_tokens=8, temperature=1.0, seed=7)
    [together] = llm.generate(TALE, drawn)
    alone = llm.generate([TALE] * 3, [SamplingParams(max_tokens=8, temperature=1.0, seed=7 + i) for i in range(3)])
    assert [sample.token_ids for sample in together.outputs] == tokens(alone)
    assert [sample.index for sample in together.outputs] == [0, 1, 2]


def test_a_conversation_goes_through_the_models_template(llm: LLM) -> None:
    [output] = llm.chat([{"role": "user", "content": "Tell me a tale."}], SamplingParams(max_tokens=4, temperature=0))
    assert output.prompt is not None and "<|im_start|>" in output.prompt
    assert len(output.outputs[0].token_ids) == 4


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ("", SamplingParams(), "empty"),
        ([10**9], SamplingParams(), "token ids must be"),
        (TALE, SamplingParams(n=0), "n must be"),
        (TALE, SamplingParams(temperature=-1), "temperature must be"),
        (TALE, SamplingParams(max_tokens=10**6), "max_tokens"),
        (TALE, SamplingParams(top_p="much"), "top_p"),  # type: ignore[arg-type]
        ([1] * 5000, SamplingParams(), "context of 4096"),
        ("\ud800", SamplingParams(), "surrogates"),
        (None, SamplingParams(), "prompts must be"),
        ({"prompt": TALE}, SamplingParams(), "prompts must be .* got dict"),
        (TALE, {"n": 1}, "sampling_params must be"),
        (TALE, ["greedy"], "sampling_params must be .* got str"),
    ],
)
def test_what_cannot_be_generated_is_a_value_error_that_says_why(
    llm: LLM, prompt: Any, params: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        llm.generate(prompt, params)
    assert tokens(llm.generate(TALE, SamplingParams(max_tokens=1)))  # and harms nobody


def test_no_model_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        LLM(tmp_path)
    with pytest.raises(ValueError, match="give a model"):
        LLM()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("preemption", "swop", "preemption must be recompute or swap, got 'swop'"),
        ("preemption", "swap", "give swap_space"),
        ("swap_space", 1024, "a block of KV takes"),
        ("swap_space", -1, "a block of KV takes"),
        ("kv_bytes", 1024, "a block of KV takes"),
        ("max_model_len", 0, "max_model_len must be in"),
        ("max_model_len", 10**6, "max_model_len must be in"),
    ],
)
def test_an_option_that_cannot_be_is_a_value_error_that_says_why(
    tiny_llama: Path, option: str, value: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        LLM(tiny_llama, **{option: value})


def test_a_device_that_is_not_there_is_an_error_that_says_so(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="device must be cpu or cuda"):
        LLM(tiny_llama, device="tpu")


def test_options_may_be_words(tiny_llama: Path) -> None:
    with LLM(tiny_llama, dtype="float32", preemption="swap", swap_space=1 << 20) as llm:
        scheduler = llm._llm._backend._engine.scheduler  # type: ignore[union-attr]
        assert scheduler._swap


def test_max_tokens_none_fills_the_context(tiny_llama: Path) -> None:
    with LLM(tiny_llama, dtype="float32", max_model_len=40) as llm:
        [output] = llm.generate([[5] * 10], SamplingParams(max_tokens=None, temperature=0, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 30


def test_a_stream_grows_and_leaving_it_frees_its_blocks(tiny_llama: Path) -> None:
    async def run() -> None:
        llm = await AsyncLLM.load(tiny_llama, dtype="float32")
        try:
            seen: list[int] = []
            async for output in llm.generate(TALE, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)):
                seen.append(len(output.outputs[0].token_ids))
            assert seen == sorted(seen) and seen[-1] == 8 and len(seen) > 1
            stream = llm.generate(TALE, SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True))
            async for _ in stream:
                break
            await stream.aclose()  # type: ignore[attr-defined]
            async for output in llm.generate(TALE, SamplingParams(max_tokens=1, temperature=0)):
                final = output
            assert final.finished
            backend = llm._backend
            engine = backend._engine  # type: ignore[attr-defined]
        finally:
            await llm.close()
        engine.scheduler.check_integrity()
        assert engine.scheduler.num_running == 0 and engine.pool.counts().held == 0

    asyncio.run(run())


def test_closing_ends_what_runs_and_refuses_what_comes(tiny_llama: Path) -> None:
    async def run() -> None:
        llm = await AsyncLLM.load(tiny_llama, dtype="float32")
        try:
            stream = llm.generate(TALE, SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True))
            await anext(stream)
            runner = weakref.ref(llm._backend._engine.runner)  # type: ignore[attr-defined]
        finally:
            await llm.close()
        gc.collect()
        assert runner() is None  # the memory is there for the next model
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable, match="closed"):
                async for _ in stream:
                    pass
            with pytest.raises(RuntimeError, match="closed"):
                await anext(llm.generate(TALE))
            await llm.close()

    asyncio.run(run())


def test_a_failing_step_fails_its_own_sequences_and_the_engine_goes_on(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(tiny_llama, dtype="float32") as llm:
        runner = llm._llm._backend._engine.runner  # type: ignore[union-attr]
        run = runner.run

        def fails_once(plan: object) -> object:
            monkeypatch.setattr(runner, "run", run)
            raise RuntimeError("no luck")

        monkeypatch.setattr(runner, "run", fails_once)
        with pytest.raises(Exception, match="RuntimeError in the engine"):
            llm.generate(TALE)
        assert tokens(llm.generate(TALE, SamplingParams(max_tokens=2, temperature=0)))


def test_its_parameters_are_those_of_the_engine() -> None:
    engine = {name for name in EngineParams.__dataclass_fields__ if name != "seed"}
    assert engine <= set(SamplingParams.__dataclass_fields__)


def test_a_prompts_scores_are_made_into_words_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    def counted(tokens: list[int], *rest: Any) -> Any:
        lengths.append(len(tokens))
        return by_position(tokens, *rest)

    monkeypatch.setattr("offline.llm.by_position", counted)
    (output,) = llm.generate([[5, 6, 7, 8]], SamplingParams(max_tokens=6, ignore_eos=True, prompt_logprobs=1))
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 4
    assert lengths == [3]

"""Promise: a rank on a GPU generates what a rank on a CPU does. Here in Triton's interpreter, on CPU tensors, with all
that a GPU runs but the capture of graphs: what is captured is run again instead, on the same fixed tensors."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from engine import ops
from engine.core.errors import ModelError
from engine.core.moves import BlockMoves, pairs
from engine.core.step_input import StepInput
from engine.engine import Engine
from engine.kernels import reference
from engine.kernels.attention import AttentionMaker, upload
from engine.kernels.backend import KernelBackend
from engine.kernels.graphs import MAX_ROWS, DecodeGraphs, buckets
from messages.sampling import SamplingParams

SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen 3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=9)),
}
PROMPTS = [list(range(5, 8)), list(range(20, 57)), list(range(100, 117))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny random model of each kind."""

    def make(kind: str) -> Path:
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp("model")
        MODELS[kind]().save_pretrained(path)
        return path

    return make


def engine_on(folder: Path, kernels: bool, graphs: bool = True, **options: Any) -> Engine:
    """An engine; with ``kernels`` its rank runs as on a GPU."""
    if torch.cuda.is_available() and kernels:
        return Engine(folder, dtype="float32", kv_bytes=1 << 20, prefill_chunk=16, device="cuda", **options)
    engine = Engine(folder, dtype="float32", kv_bytes=1 << 20, prefill_chunk=16, **options)
    if kernels:
        rank = engine.runner._model
        maker = AttentionMaker(rank.kv_cache, 4, torch.float32)
        decode = DecodeGraphs(rank._model, maker, 256, lambda run: run) if graphs else None
        rank._backend = KernelBackend(rank._model, rank.kv_cache, maker, decode)
    return engine


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "INTERPRET", not torch.cuda.is_available())


def answers(engine: Engine, params: SamplingParams | list[SamplingParams]) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(PROMPTS, params)]


GREEDY = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("graphs", [False, True], ids=["kernel by kernel", "padded to a bucket"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_rank_on_the_kernels_generates_what_one_on_a_cpu_does(folder, monkeypatch, kind, graphs):
    model = folder(kind)
    expected = answers(engine_on(model, kernels=False), GREEDY)
    monkeypatch.setattr(ops, "INTERPRET", not torch.cuda.is_available())
    assert answers(engine_on(model, kernels=True, graphs=graphs), GREEDY) == expected


def test_the_kernels_draw_the_tokens_that_the_cpu_draws(folder, monkeypatch):
    model = folder("llama")
    params = [
        SamplingParams(max_tokens=4, temperature=0.9, seed=1, top_p=0.9, ignore_eos=True, logprobs=2),
        SamplingParams(max_tokens=4, temperature=1.2, seed=2, ignore_eos=True, frequency_penalty=1.0),
        SamplingParams(max_tokens=4, temperature=1.0, seed=3, top_k=9, ignore_eos=True, logit_bias={7: 3.0}),
    ]
    expected = engine_on(model, kernels=False).generate(PROMPTS, params)
    monkeypatch.setattr(ops, "INTERPRET", not torch.cuda.is_available())
    made = engine_on(model, kernels=True).generate(PROMPTS, params)
    assert [each.token_ids for each in made] == [each.token_ids for each in expected]
    for found, wanted in zip(made[0].logprobs, expected[0].logprobs, strict=True):
        assert found.token_id == wanted.token_id
        assert found.logprob == pytest.approx(wanted.logprob, abs=1e-4)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_quantised_cache_serves_padded_steps_and_others_as_on_a_cpu(folder, monkeypatch, kv_dtype):
    model = folder("llama")
    made, caches = [], []
    for kernels, graphs in ((False, False), (True, False), (True, True)):
        monkeypatch.setattr(ops, "INTERPRET", kernels and not torch.cuda.is_available())
        engine = engine_on(model, kernels=kernels, graphs=graphs, kv_dtype=kv_dtype)
        made.append(engine.generate(PROMPTS[::2], replace(GREEDY, max_tokens=3)))
        cache = engine.runner.kv_cache
        caches.append(reference.dequantize(cache.data.flatten(0, 1), cache.scales.flatten(0, 1)).cpu())
    expected = caches[0]
    for tokens, found in zip(made[1:], caches[1:], strict=True):
        assert tokens == made[0]
        # Products round differently for another number of rows, and what is stored then by one step now and then.
        written = expected != 0
        assert (found - expected)[written].abs().mean() < 1e-3 * expected[written].abs().mean()


def test_padded_rows_write_to_no_block(folder, interpreted):
    engine = engine_on(folder("llama"), kernels=True)
    rank = engine.runner._model
    before = rank.kv_cache.bytes.clone()
    tables = np.array([[4], [9], [2]], np.int32)
    step = StepInput(
        tokens=np.array([5, 6, 7], np.int32),
        num_tokens=np.ones(3, np.int32),
        num_computed=np.array([3, 0, 15], np.int32),
        block_tables=tables,
        logit_rows=np.arange(3, dtype=np.int32),
        num_sampled=3,
    )
    rank.forward(step)
    changed = (rank.kv_cache.bytes != before).any(1).nonzero().squeeze(1)
    assert changed.tolist() == [2, 4, 9]


def test_blocks_are_copied_before_the_step_writes_into_them(folder, interpreted):
    rank = engine_on(folder("llama"), kernels=True).runner._model
    rank.kv_cache.data.copy_(torch.arange(rank.kv_cache.data.numel()).view(rank.kv_cache.data.shape) % 7)
    before = rank.kv_cache.data.clone()
    step = StepInput(
        tokens=np.array([5], np.int32),
        num_tokens=np.ones(1, np.int32),
        num_computed=np.array([3], np.int32),
        block_tables=np.array([[5]], np.int32),
        logit_rows=np.zeros(1, np.int32),
        num_sampled=1,
        moves=BlockMoves(copies=pairs([(4, 5)])),
    )
    rank.forward(step)
    after = rank.kv_cache.data
    others = [token for token in range(16) if token != 3]
    assert torch.equal(after[5][..., others, :], before[4][..., others, :])
    assert not torch.equal(after[5][..., 3, :], before[4][..., 3, :])
    assert torch.equal(after[4], before[4])


def test_arrays_arrive_in_one_piece_each_aligned():
    arrays = [np.arange(5, dtype=np.int32), np.zeros((0, 2), np.int32), np.arange(6, dtype=np.int32).reshape(2, 3).T]
    found = upload(torch.device("cpu"), arrays)
    for tensor, array in zip(found, arrays, strict=True):
        assert np.array_equal(tensor.numpy(), array)
    assert all((tensor.data_ptr() - found[0].data_ptr()) % 16 == 0 for tensor in found if tensor.numel())


def test_every_number_of_rows_has_a_bucket_that_is_not_much_larger():
    sizes = buckets(MAX_ROWS)
    assert sizes == sorted(sizes) and sizes[-1] == MAX_ROWS
    for rows in range(1, MAX_ROWS + 1):
        assert next(size for size in sizes if size >= rows) < max(2 * rows, rows + 16) + 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_to_be_missing(folder):
    with pytest.raises(ModelError, match="no CUDA device"):
        Engine(folder("llama"), device="cuda")

"""Promise: loading takes little more memory than what is loaded, and serving little more than weights and KV pool."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests.conftest import ROOT

WORKING_MEMORY = 32 << 20
# Reads calls, one a line, and has a fork of its own run each: so the libraries are imported once.
SERVER = """
import os
import sys
from pathlib import Path
import torch
import transformers.pytorch_utils  # what any fall-back model imports is not part of its weights
from engine.engine import Engine
from engine.models.config import ModelConfig
from engine.models.registry import load_model
from engine.parallel import ParallelGroup
from messages.sampling import SamplingParams

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))

def begin_anew():
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return before

def load(folder, small, rank, size, quantization):
    # Prints the bytes that loading has left, and the most that it took on the way.
    group = ParallelGroup()
    group.rank, group.size = rank, size
    config = ModelConfig.from_folder(folder)
    first = load_model(small, ModelConfig.from_folder(small), ParallelGroup(), torch.bfloat16, 64)
    first.logits(first.forward(torch.arange(4), torch.arange(4), lambda layer, query, *_, **__: query.flatten(1)))
    before = begin_anew()
    with torch.inference_mode():
        model = load_model(folder, config, group, torch.bfloat16, 64, quantization)
    print(memory("VmRSS") - before, memory("VmHWM") - before, flush=True)

def serve(folder, small, kv_bytes):
    # Prints the most that an engine took, loading and with its KV pool full, beyond what one of a small model had
    # taken: that is the interpreter with its libraries and compiled kernels.
    generate(small, 1 << 16)
    before = begin_anew()
    pool = generate(folder, kv_bytes)
    print(pool, memory("VmHWM") - before, flush=True)

def generate(folder, kv_bytes):
    engine = Engine(folder, dtype="bfloat16", kv_bytes=kv_bytes)
    pool = engine.runner.kv_cache.bytes
    # A prompt fills 4 of the 16 tokens' blocks.
    prompts = [[1 + i] * 60 for i in range(len(pool) // 4)]
    made = engine.generate(prompts, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    assert all(len(each.token_ids) == 4 for each in made)
    return pool.nbytes

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        exec(line)
        sys.exit()
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"{line}: {status}")
"""


class Measurer:
    """A process that loads and serves models, and says how much memory it took."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, function: str, folder: Path, small: Path, *arguments: object) -> tuple[int, int]:
        assert self._server.stdin is not None and self._server.stdout is not None
        given = ", ".join(map(repr, arguments))
        self._server.stdin.write(f"{function}(Path({str(folder)!r}), Path({str(small)!r}), {given})\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline().split()
        assert len(answer) == 2, "what was wrong stands in the captured stderr"
        return int(answer[0]), int(answer[1])

    def close(self) -> None:
        self._server.communicate()
        assert self._server.returncode == 0


@pytest.fixture(scope="module")
def measure() -> Iterator[Measurer]:
    measurer = Measurer()
    yield measurer
    measurer.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of 150 MB, and small ones of the same kinds."""
    made = {}
    for kind, config in (
        ("llama", transformers.LlamaConfig),
        ("tied llama", transformers.LlamaConfig),
        ("gemma", transformers.GemmaConfig),
        ("qwen3_moe", transformers.Qwen3MoeConfig),
    ):
        for name, hidden, layers in ((kind, 768, 6), (f"small {kind}", 128, 1)):
            shape = config(
                vocab_size=4000, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
                num_attention_heads=8, num_key_value_heads=8, head_dim=hidden // 8, max_position_embeddings=64,
            )  # fmt: skip
            if name == "tied llama":
                shape.vocab_size, shape.tie_word_embeddings = 40_000, True
            if kind == "qwen3_moe":
                shape.num_experts, shape.num_experts_per_tok, shape.moe_intermediate_size = 8, 2, hidden // 2
            made[name] = tmp_path_factory.mktemp(name.replace(" ", "-"))
            transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(made[name])
    return made


@pytest.mark.parametrize(
    ("kind", "size", "quantization", "bound"),
    [
        ("llama", 1, None, 1.0),
        ("tied llama", 1, None, 1.0),
        ("llama", 1, "int8", 0.55),  # embeddings and head stay as they are
        ("qwen3_moe", 2, None, 0.5),
        ("gemma", 1, None, 1.0),
    ],
)
def test_loading_peaks_near_one_copy_of_the_shard(
    folders: dict[str, Path], measure: Measurer, kind: str, size: int, quantization: str | None, bound: float
) -> None:
    """``bound``: of the checkpoint's bytes, without what it takes to convert one matrix."""
    weights = (folders[kind] / "model.safetensors").stat().st_size
    for _ in range(3):  # what loading needs it needs every time; once in a while there is more on a busy machine
        left, peak = measure("load", folders[kind], folders[f"small {kind}"], size - 1, size, quantization)
        print(f"{kind} {size} {quantization}: {left / weights:.2f} left, {peak / weights:.2f} at most")
        assert left <= 1.15 * bound * weights
        if peak <= bound * weights + WORKING_MEMORY:
            break
    assert peak <= bound * weights + WORKING_MEMORY


def test_serving_peaks_near_the_weights_and_the_pool(folders: dict[str, Path], measure: Measurer) -> None:
    weights = (folders["llama"] / "model.safetensors").stat().st_size
    pool, peak = measure("serve", folders["llama"], folders["small llama"], 160 << 20)
    print(f"{peak / (weights + pool):.2f} of weights and pool")
    assert pool > weights  # so that what a step takes, which does not grow with either, is little beside them
    assert peak <= 1.2 * (weights + pool)

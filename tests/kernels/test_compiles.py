"""What Triton's interpreter lets through: every kernel must compile for the GPUs that it is meant for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = 227 << 10
"""Bytes that a block of threads can have on Hopper."""


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for_hopper"],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    made = [json.loads(line) for line in run.stdout.splitlines()]
    assert {entry["kernel"] for entry in made} == kernels_in_the_source()
    assert all(entry["shared"] <= SHARED_MEMORY for entry in made), made
    assert any(entry["wgmma"] for entry in made if entry["kernel"] == "prefill_kernel")


def kernels_in_the_source() -> set[str]:
    """Names of the functions that are launched: by convention they end in ``_kernel``."""
    sources = (ROOT / "engine" / "kernels").glob("*.py")
    lines = [line for source in sources for line in source.read_text().splitlines()]
    return {line.removeprefix("def ").split("(")[0] for line in lines if line.startswith("def ") and "_kernel(" in line}

"""Shared by all tests: no network, no second thread for torch, and nothing left behind."""

import gc
import os

os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    OMP_NUM_THREADS="1",
    # Where a test asks for two threads: one that waits for the other shall not keep it from the processor.
    GOMP_SPINCOUNT="1000",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

import sys
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter then. Triton settles this when it is first imported, and transformers does
    # that too: hence here, before all others.
    assert "triton" not in sys.modules, "Triton was imported before TRITON_INTERPRET could be set"
    os.environ["TRITON_INTERPRET"] = "1"

# How long an example takes says what else the machine does.
hypothesis.settings.register_profile("gate", deadline=None)
hypothesis.settings.load_profile("gate")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """The tiny real model that ships with the project."""
    return ROOT / "models" / "tiny-llama"


def pytest_collection_finish() -> None:
    """What is loaded now stays until the end. Whoever collects garbage to see what a test has left need not walk
    through it: a third of a second each time, with all that PyTorch and transformers bring along."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Name at once what has failed, for a run that does not come to its summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED ({report.when}) {report.nodeid}", flush=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that nobody is left with one of them when all others are through."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)

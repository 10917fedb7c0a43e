"""One linear layer with weights in bf16, int8 and fp8: milliseconds of CPU time by number of rows.

OMP_NUM_THREADS=1 python -m benchmarks.quantized
"""

import time
from collections.abc import Callable

import torch

from engine.linear import Linear
from engine.quantized import linear_maker

SHAPES = ((8192, 2048), (2048, 8192), (1536, 576))
ROWS = (1, 4, 8, 9, 16, 64, 256, 512)
ROUNDS = 7


def main() -> None:
    torch.set_num_threads(1)
    for outputs, inputs in SHAPES:
        weight = torch.randn(outputs, inputs).bfloat16()
        layers = {"bf16": Linear(weight), **{name: linear_maker(name)(weight, None) for name in ("int8", "fp8")}}
        print(f"\n| {inputs} -> {outputs} | " + " | ".join(str(rows) for rows in ROWS) + " |")
        print("|---" * (len(ROWS) + 1) + "|")
        inputs_of = {rows: torch.randn(rows, inputs).bfloat16() for rows in ROWS}
        for name, layer in layers.items():
            times = [fastest(lambda layer=layer, x=inputs_of[rows]: layer(x)) for rows in ROWS]  # type: ignore[misc]
            print(f"| {name} | " + " | ".join(f"{1e3 * spent:.2f}" for spent in times) + " |")


def fastest(call: Callable[[], object]) -> float:
    """Seconds of CPU time, the least of several rounds."""
    call()
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.thread_time()
        call()
        best = min(best, time.thread_time() - started)
    return best


if __name__ == "__main__":
    with torch.inference_mode():
        main()

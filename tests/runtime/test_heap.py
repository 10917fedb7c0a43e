"""Promise: what dies in cycles does not stay until it is a quarter of all that a process has loaded."""

import subprocess
import sys

PROGRAM = """
import gc, weakref
from runtime import heap

class Cycle:
    def __init__(self):
        self.me, self.more = self, bytearray(100)

loaded = [[index] for index in range(1_000_000)]
gc.collect()
if {settled}:
    heap.settle()
old = [Cycle() for _ in range(100)]
alive = [weakref.ref(each) for each in old]
kept = []
while len(kept) < 50_000:  # so that `old` is old when it dies
    kept.append([])
old.clear()
while len(kept) < 150_000:
    kept.append([])
print(sum(ref() is not None for ref in alive))
"""


def left(settled: bool) -> int:
    program = PROGRAM.format(settled=settled)
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout)


def test_what_dies_in_cycles_goes_soon_once_a_process_has_settled() -> None:
    assert left(settled=False) == 100
    assert left(settled=True) == 0

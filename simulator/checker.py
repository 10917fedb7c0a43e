"""Judges a history: did every promise hold, whatever happened?

Written apart from the cores, in the manner of Jepsen: it shares their vocabulary and nothing else, and knows what the
clients, the network and the pools showed. It reads a history once, in the order of time; ``judges/`` has its parts.

Where a promise has a time bound, the clock runs only while the promise is owed: a silence counts from the last fault
that began or ended, and only while there is capacity (``judges/health.py``). So a run full of faults is judged mildly
in its middle, and strictly wherever it comes to rest. That each request ends once, with the right tokens, holds
throughout.
"""

from collections.abc import Callable, Iterable
from typing import Any

from simulator import history as h
from simulator.judges.case import Case
from simulator.judges.clients import Clients
from simulator.judges.faults import Faults
from simulator.judges.pools import Pools
from simulator.judges.waits import Waits
from simulator.verdict import Bounds, Truth, Verdict


def check(history: Iterable[h.Anything], truth: Truth, bounds: Bounds | None = None) -> Verdict:
    """The verdict on a whole history; ``truth`` tells what the run without faults answers."""
    checker = Checker(truth, bounds)
    for record in history:
        checker.take(record)
    return checker.finish()


class Checker:
    """Takes the records one by one; ``finish`` after the last."""

    def __init__(self, truth: Truth, bounds: Bounds | None = None) -> None:
        self._case = Case(truth, bounds if bounds is not None else Bounds())
        self._waits = Waits(self._case)
        self._clients = clients = Clients(self._case, self._waits)
        self._faults = faults = Faults(self._case, self._waits)
        pools = Pools(self._case, faults)
        self._takers: dict[type[h.Record], tuple[Callable[[Any], None], ...]] = {
            h.Asked: (clients.asked, pools.asked),
            h.Got: (clients.got,),
            h.Ended: (clients.ended,),
            h.Failed: (clients.failed,),
            h.Left: (clients.left,),
            h.Attached: (clients.attached,),
            h.AttemptBegun: (clients.begun,),
            h.AttemptPlaced: (clients.placed,),
            h.Offered: (clients.offered,),
            h.Started: (faults.started,),
            h.Stopped: (faults.stopped,),
            h.Killed: (faults.killed,),
            h.Frozen: (faults.frozen,),
            h.Thawed: (faults.thawed,),
            h.Cut: (faults.cut,),
            h.Healed: (faults.healed,),
            h.Injected: (faults.injected,),
            h.Draining: (faults.draining,),
            h.DeclaredLost: (faults.declared_lost,),
            h.Crashed: (faults.crashed,),
            h.Blocks: (pools.blocks,),
            h.Ledger: (pools.ledger,),
            h.Wrote: (pools.wrote,),
            h.Read: (pools.read,),
            h.Idle: (pools.idle,),
        }

    def take(self, record: h.Anything) -> None:
        """The next record; ``ValueError`` where it is older than the one before."""
        if record.at < self._case.now:
            raise ValueError(f"{record} comes after {self._case.now} s")
        self._case.now = record.at
        for taker in self._takers.get(type(record), ()):  # others tell a story, and nothing to judge
            taker(record)

    def finish(self) -> Verdict:
        """Nothing happened any more."""
        self._waits.look()
        self._faults.look()
        self._clients.finish()
        verdict = self._case.verdict
        verdict.requests, verdict.faults = len(self._case.requests), self._case.health.troubles
        return verdict

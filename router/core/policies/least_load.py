"""The least loaded worker; among equals, the one whose load has not changed for the longest time."""

import heapq
from collections.abc import Callable

from router.core.policies.base import LOOK, Suits
from router.core.views import WorkerView

Load = tuple[int, ...]


FULL = 8


def outstanding_tokens(worker: WorkerView) -> Load:
    """For prefill: its work is proportional to tokens."""
    return worker.tokens, len(worker.requests)


def outstanding_sequences(worker: WorkerView) -> Load:
    """For decode: a step's time grows with the batch first, with the length of its sequences second. Before both, by
    eighths of the KV pool, comes how full it is, and last are those whose batch is full."""
    sequences, pool = len(worker.requests), worker.pool_tokens
    if sequences >= worker.max_num_seqs:
        return FULL, sequences, worker.tokens
    return min(FULL, 8 * worker.tokens // pool) if pool else 0, sequences, worker.tokens


class LeastLoad:
    """A lazy heap: a change pushes a new entry, and an entry that is no longer its worker's newest is dropped when
    it comes up. Stale entries never outnumber the workers by more than a constant."""

    def __init__(self, load: Callable[[WorkerView], Load]) -> None:
        self._load = load
        self._heap: list[tuple[Load, int, WorkerView]] = []
        self._newest: dict[WorkerView, int] = {}
        self._changes = 0

    def add(self, worker: WorkerView) -> None:
        self._newest[worker] = 0
        self.changed(worker)

    def remove(self, worker: WorkerView) -> None:
        self._newest.pop(worker, None)

    def changed(self, worker: WorkerView) -> None:
        if worker not in self._newest:
            return
        self._changes += 1
        self._newest[worker] = self._changes
        heapq.heappush(self._heap, (self._load(worker), self._changes, worker))
        if len(self._heap) > 2 * len(self._newest) + 64:
            self._heap = [entry for entry in self._heap if self._newest.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def choose(self, suits: Suits, has_room: Suits | None = None) -> WorkerView | None:
        heap, unsuitable = self._heap, []
        chosen, full = None, 0
        while heap and chosen is None and full < LOOK:
            _, change, worker = heap[0]
            if self._newest.get(worker) != change:
                heapq.heappop(heap)
                continue
            suitable = suits(worker)
            if suitable and (has_room is None or has_room(worker)):
                chosen = worker
            else:
                full += suitable
                unsuitable.append(heapq.heappop(heap))
        for entry in unsuitable:
            heapq.heappush(heap, entry)
        return chosen

    def __len__(self) -> int:
        return len(self._newest)

    def __contains__(self, worker: WorkerView) -> bool:
        return worker in self._newest

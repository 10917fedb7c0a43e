"""What is being computed just now and wanted by others too, so that nothing is computed twice at the same time.

A running sequence is the producer of the blocks of its prompt that it has yet to fill. A sequence that would need one
of them next waits, out of line, until the last of them is final, or until its producer ends or is preempted. Producers
run and wait for nobody, so no two sequences can wait for each other.
"""

from collections.abc import Hashable, Iterable, Iterator

from engine.core.sequence import Sequence


class InFlight:
    def __init__(self) -> None:
        self._producers: dict[bytes, Sequence] = {}
        self._waiters: dict[Hashable, list[Sequence]] = {}
        self.num_waiting = 0

    def begin(self, seq: Sequence, names: Iterable[bytes]) -> None:
        """``seq`` runs, and is going to fill the blocks of these names."""
        for name in names:
            self._producers.setdefault(name, seq)

    def last_in_flight(self, names: list[bytes], first: int) -> bytes | None:
        """Of the blocks ``first``, ... the last one before which all are being computed; None if that is none."""
        last = None
        for name in names[first:]:
            if name not in self._producers:
                break
            last = name
        return last

    def park(self, seq: Sequence, awaited: Hashable) -> None:
        """``seq`` waits for the block of this name, or for whatever else ``wake`` is called with."""
        seq.awaits = awaited
        self._waiters.setdefault(awaited, []).append(seq)
        self.num_waiting += 1

    def settle(self, names: Iterable[bytes]) -> Iterator[Sequence]:
        """The blocks of these names are final; gives those that waited for them."""
        for name in names:
            if self._producers.pop(name, None) is not None:
                yield from self.wake(name)

    def drop(self, seq: Sequence, names: Iterable[bytes]) -> Iterator[Sequence]:
        """``seq`` computes no further; gives those that waited for its blocks."""
        for name in names:
            if self._producers.get(name) is seq:
                del self._producers[name]
                yield from self.wake(name)

    def wake(self, awaited: Hashable) -> list[Sequence]:
        """Those that waited for this."""
        woken = self._waiters.pop(awaited, [])
        self.num_waiting -= len(woken)
        for seq in woken:
            seq.awaits = None
        return woken

    def forget(self, seq: Sequence) -> None:
        """``seq`` waits no longer."""
        waiters = self._waiters[seq.awaits]
        waiters.remove(seq)
        if not waiters:
            del self._waiters[seq.awaits]
        seq.awaits = None
        self.num_waiting -= 1

    def check_integrity(self) -> None:
        """Whoever waits for a block has somebody who computes it."""
        waiting = [(seq, awaited) for awaited, waiters in self._waiters.items() for seq in waiters]
        assert len(waiting) == self.num_waiting and all(seq.awaits == awaited for seq, awaited in waiting)
        for awaited in self._waiters:
            assert not isinstance(awaited, bytes) or awaited in self._producers, "someone waits for nothing"

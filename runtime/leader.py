"""Rank 0's end of a tensor-parallel worker: gathers the ranks, gives them steps and commands, hears what came of them.

1. Each other rank sends ``Join``; when all have, ``Welcome`` tells them where to meet for their arithmetic.
2. All load their part of the model, side by side; each then sends ``Ready``.
3. From then on every rank runs the steps that rank 0 broadcasts, in order, and performs commands between them.
4. Who finds another rank dead or silent ends with ``GroupLost``, and so do then the rest; or rank 0 says ``Dismissed``.

Messages go over the worker's own mailbox and are sealed with the cluster's key.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.core.errors import GroupLost
from engine.core.step_input import StepInput
from engine.parallel import ParallelGroup
from engine.process_group import ProcessGroup, check_backend
from engine.shared_memory_group import SharedMemoryGroup, supported
from messages.ids import Address, Epoch, WorkerId
from messages.leader_to_rank import Command, Dismissed, LeaderMessage, Step, Welcome
from messages.rank_to_leader import Join, RankEvent, RankMessage, Ready
from messages.seals import Sealed, genuine, seal
from runtime.core.wire import Wire
from runtime.mailbox import Mailbox, warn_now_and_then

JOIN_WITHIN = 120.0
"""Seconds from the first rank to the last: each process imports its code."""
LOAD_WITHIN = 600.0
STEPS = Wire(StepInput)

RANK_MESSAGES = (Join, Ready, RankEvent)
"""What rank 0's mailbox takes from the other ranks."""


def backend_for(device: str) -> str:
    """How ranks on ``device`` meet; ``ModelError`` where there is no way."""
    if device == "cpu" and supported():
        return "shared_memory"
    backend = "gloo" if device == "cpu" else "nccl"
    check_backend(backend)
    return backend


class Leader:
    """Belongs to the thread that its mailbox belongs to."""

    def __init__(
        self,
        mailbox: Mailbox,
        worker: WorkerId,
        epoch: Epoch,
        size: int,
        key: bytes,
        *,
        commands: Wire,
        events: Wire,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """``commands`` and ``events``: what ``command`` may give to a rank, and what may come back. ``look`` is called
        now and then, and raises if a rank is known to be lost."""
        self.size = size
        self.group = ParallelGroup()
        self._mailbox = mailbox
        self._worker, self._epoch, self._key = worker, epoch, key
        self._commands, self._events = commands, events
        self._ranks: dict[int, Address] = {}
        self._look = look
        self._steps = 0
        self._listen = False
        self._forged = 0

    def assemble(self, device: str, *, within: float = JOIN_WITHIN) -> ParallelGroup:
        """Wait for all ranks, and meet them. ``GroupLost`` if they do not come."""
        for message in self._expect(Join, within):
            if message.rank < self.size:
                self._ranks[message.rank] = message.mailbox
            if len(self._ranks) == self.size - 1:
                break
        else:
            missing = sorted(set(range(1, self.size)) - set(self._ranks))
            raise GroupLost(f"ranks {missing} of {self.size} did not come within {within:g} s")
        backend = backend_for(device)
        if backend == "shared_memory":
            shared = SharedMemoryGroup.create(self.size)
            self._welcome(backend, shared.address)
            self.group = SharedMemoryGroup(0, self.size, shared)
        else:
            with tempfile.TemporaryDirectory(prefix="baton-group-") as folder:
                rendezvous = Path(folder) / "rendezvous"
                self._welcome(backend, str(rendezvous))
                self.group = ProcessGroup(0, self.size, backend, rendezvous)
        return self.group

    def wait_until_ready(self, *, within: float = LOAD_WITHIN) -> list[Ready]:
        """What ranks 1, 2, ... say when they have loaded their parts. ``GroupLost`` if one dies over it."""
        ready: dict[int, Ready] = {}
        for message in self._expect(Ready, within):
            ready[message.rank] = message
            if len(ready) == self.size - 1:
                return [ready[rank] for rank in range(1, self.size)]
        missing = sorted(set(range(1, self.size)) - set(ready))
        raise GroupLost(f"ranks {missing} of {self.size} did not load the model within {within:g} s")

    def broadcast(self, step: StepInput) -> None:
        """Have all other ranks run ``step`` too."""
        self._steps += 1
        _, body = STEPS.pack(step)
        message = Step(worker=self._worker, epoch=self._epoch, number=self._steps, listen=self._listen, body=body)
        self._listen = False
        self._tell(message, *self._ranks)

    def listen(self) -> None:
        """Have the other ranks perform commands between two layers of the step that is broadcast next."""
        self._listen = True

    def command(self, rank: int, value: Any) -> None:
        """Have ``rank`` perform ``value`` after the steps that it was given, or in the last of them where that listens;
        what it brings about comes as events."""
        kind, body = self._commands.pack(value)
        self._tell(Command(worker=self._worker, epoch=self._epoch, kind=kind, body=body), rank)

    def event(self, message: RankEvent) -> Any | None:
        """The value that a rank of this very group has sent; None for a message from anyone else."""
        if not self._genuine(message):
            return None
        return self._events.unpack(message.kind, message.body)

    def check(self) -> None:
        """``GroupLost`` if a rank is known to be dead."""
        self._look()
        self.group.check()

    def close(self) -> None:
        """Dismiss the ranks, and leave the group; harmless twice. A rank that takes no messages sees that we left."""
        dismissed = seal(self._key, Dismissed(worker=self._worker, epoch=self._epoch))
        for address in self._ranks.values():
            self._mailbox.send(address, dismissed)
        self._ranks.clear()
        self.group.close()

    def _welcome(self, backend: str, address: str) -> None:
        message = Welcome(worker=self._worker, epoch=self._epoch, backend=backend, address=address)
        self._tell(message, *self._ranks)

    def _tell(self, message: LeaderMessage, *ranks: int) -> None:
        sealed = seal(self._key, message)
        for rank in ranks:
            if not self._mailbox.send(self._ranks[rank], sealed):
                raise GroupLost(f"rank {rank} of {self.size} takes no messages any more")

    def _expect(self, kind: Any, within: float) -> Iterator[Any]:
        """Genuine messages of one kind, until the time is over."""
        deadline = time.monotonic() + within
        while (left := deadline - time.monotonic()) > 0:
            self.check()
            for message in self._mailbox.receive(min(left, 0.2)):
                if isinstance(message, kind) and self._genuine(message):
                    yield message

    def _genuine(self, message: Sealed) -> bool:
        mine = isinstance(message, Join | RankMessage) and message.worker == self._worker
        if isinstance(message, RankMessage):
            mine = mine and message.epoch == self._epoch and message.rank in self._ranks
        if mine and genuine(self._key, message):
            return True
        self._forged += 1
        warn_now_and_then(self._forged, "dropped a message that is of no rank of ours: %s", type(message).__name__)
        return False

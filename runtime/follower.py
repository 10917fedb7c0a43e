"""The life of a rank other than 0; see ``runtime.leader``."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.core.errors import GroupLost
from engine.layer_gate import StepLayers
from engine.parallel import ParallelGroup
from engine.process_group import ProcessGroup
from engine.rank import STEP_ERRORS, RankModel
from engine.shared_memory_group import SharedMemoryGroup
from kv_transfer.core.fanout import RankAction
from messages.common import KVRank, WorkerAddress
from messages.ids import Address, Epoch, WorkerId
from messages.leader_to_rank import Command, Dismissed, LeaderMessage, Step, Welcome
from messages.rank_to_leader import Join, RankEvent, Ready
from messages.seals import genuine, seal
from runtime.core.actions import ForgetPeer
from runtime.core.wire import Wire
from runtime.kv_port import FromRank, PortFailed, RankPort
from runtime.leader import JOIN_WITHIN, STEPS, Leader
from runtime.mailbox import MESSAGES_A_TURN, Mailbox, warn_now_and_then

log = logging.getLogger(__name__)

LAST_WORDS_WITHIN = 0.5
LOOK_EVERY = 0.25
"""Seconds between two looks at whether the other ranks live, while there is nothing to do."""


FOLLOWER_MESSAGES = (Welcome, Step, Command, Dismissed)
"""What the mailbox of a rank other than 0 takes."""


class Follower:
    """``join``, load the model, ``serve``; ``stop`` from any thread. ``GroupLost`` when the group cannot go on."""

    def __init__(
        self, mailbox: Mailbox, worker: WorkerId, rank: int, size: int, key: bytes, leader: Address,
        *, commands: Wire, events: Wire,
    ) -> None:  # fmt: skip
        self.group = ParallelGroup()
        self._mailbox = mailbox
        self._worker, self._rank, self._size, self._key = worker, rank, size, key
        self._epoch: Epoch | None = None
        self._leader = leader
        self._commands, self._events = commands, events
        self._steps = 0
        self._forged = 0
        self._came: deque[Any] = deque()
        """What is still to be done, in order."""
        self._stopping = threading.Event()

    def join(self, *, within: float = JOIN_WITHIN) -> ParallelGroup:
        """Tell rank 0 that this rank is there, and meet the others."""
        join = Join(worker=self._worker, rank=self._rank, mailbox=self._mailbox.address)
        self._mailbox.send(self._leader, seal(self._key, join))
        deadline = time.monotonic() + within
        while (left := deadline - time.monotonic()) > 0:
            for message in self._mailbox.receive(left):
                if isinstance(message, Welcome) and self._genuine(message):
                    self._epoch = message.epoch
                    self.group = self._meet(message)
                    return self.group
        raise GroupLost(f"rank 0 of {self._worker} did not answer within {within:g} s")

    def ready(self, kv: KVRank) -> None:
        """Tell rank 0 that the model is loaded."""
        assert self._epoch is not None, "not joined"
        ready = Ready(worker=self._worker, epoch=self._epoch, rank=self._rank, kv=kv)
        self._mailbox.send(self._leader, seal(self._key, ready))

    def close(self) -> None:
        self.group.close()

    def serve(self, model: RankModel, perform: Callable[[Any], None]) -> None:
        """Run steps and ``perform`` commands until rank 0 dismisses us, or until ``stop``."""
        while not self._stopping.is_set():
            self._came.extend(self._mailbox.receive(LOOK_EVERY) or self._last_words())
            while self._came:
                match self._came.popleft():
                    case None:
                        pass
                    case LeaderMessage() as message if not self._genuine(message):
                        pass
                    case Step() as step:
                        self._run(model, step, perform)
                    case Command() as command:
                        perform(self._commands.unpack(command.kind, command.body))
                    case Dismissed():
                        return
                    case LeaderMessage() as message:
                        raise GroupLost(f"rank 0 has begun anew: {type(message).__name__}")
                    case PortFailed(error):
                        raise RuntimeError("taking a digest failed") from error
                    case FromRank(_, event):
                        self.report(event)
                    case other:
                        raise AssertionError(f"nobody here takes {other}")

    def stop(self) -> None:
        self._stopping.set()
        self._mailbox.post(None)

    def _meet(self, welcome: Welcome) -> ParallelGroup:
        if welcome.backend == "shared_memory":
            return SharedMemoryGroup(self._rank, self._size, welcome.address)
        return ProcessGroup(self._rank, self._size, welcome.backend, Path(welcome.address))

    def _last_words(self) -> list[Any]:
        """Nothing has come for a while: if another rank is gone, what rank 0 said of it; else nothing."""
        try:
            self.group.check()
        except GroupLost:
            last = self._mailbox.receive(LAST_WORDS_WITHIN)
            if not any(isinstance(message, Dismissed) for message in last):
                raise
            return last
        return []

    def _run(self, model: RankModel, message: Step, perform: Callable[[Any], None]) -> None:
        self._steps += 1
        if message.number != self._steps:
            raise GroupLost(f"rank {self._rank} expected step {self._steps} and got {message.number}")
        step = STEPS.unpack("StepInput", message.body)
        if message.listen:
            layers = model.layers.upcoming
            layers.listen(lambda: self._between_layers(layers, perform))
        try:
            model.follow(step)
        except STEP_ERRORS:  # the other ranks have been told
            log.exception("a step of %d sequences failed on rank %d", len(step.num_tokens), self._rank)

    def _between_layers(self, layers: StepLayers, perform: Callable[[Any], None]) -> None:
        """More of the step that runs is there: perform the commands that have come, up to what has to wait for its
        end. This is called by the model, in the thread that serves."""
        if layers.failed or len(self._came) >= MESSAGES_A_TURN:
            return
        self._came.extend(self._mailbox.receive(0.0))
        while self._came and isinstance(self._came[0], Command | FromRank):
            match self._came.popleft():
                case FromRank(_, event):
                    self.report(event)
                case command if self._genuine(command):
                    perform(self._commands.unpack(command.kind, command.body))

    def report(self, value: Any) -> None:
        """An event of this process, for rank 0."""
        assert self._epoch is not None, "not joined"
        kind, body = self._events.pack(value)
        event = RankEvent(worker=self._worker, epoch=self._epoch, rank=self._rank, kind=kind, body=body)
        self._mailbox.send(self._leader, seal(self._key, event))

    def _genuine(self, message: LeaderMessage) -> bool:
        mine = message.worker == self._worker and self._epoch in (None, message.epoch)
        if mine and genuine(self._key, message):
            return True
        self._forged += 1
        warn_now_and_then(self._forged, "dropped a message that is not rank 0's: %s", type(message).__name__)
        return False


class FollowerLoop:
    """Serves until rank 0 dismisses us, or until it is stopped from another thread."""

    def __init__(self, follower: Follower, model: RankModel, port: RankPort) -> None:
        self._follower = follower
        self._model = model
        self._port = port

    def run(self) -> None:
        self._follower.serve(self._model, self._perform)

    def stop(self) -> None:
        self._follower.stop()

    def _perform(self, command: Any) -> None:
        if isinstance(command, ForgetPeer):
            self._port.forget(command.peer)
            return
        answer = self._port.perform(command)
        if answer is not None:
            self._follower.report(answer)


class RemoteRank:
    """Another rank's port, as rank 0 uses it: everything is answered later."""

    def __init__(self, leader: Leader, ready: Ready) -> None:
        self._leader = leader
        self._rank = ready.rank
        self.kv = ready.kv

    def perform(self, action: RankAction) -> None:
        self._leader.command(self._rank, action)

    def forget(self, peer: WorkerAddress) -> None:
        self._leader.command(self._rank, ForgetPeer(peer))

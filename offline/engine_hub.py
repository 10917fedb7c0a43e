"""The engine behind the same calls as the gateway's hub: sequences in, tokens to listeners, no process in between.

One thread steps the engine; listeners are called on the event loop, once a step each.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from engine.core.errors import CapacityError
from engine.core.scheduler import Progress
from engine.engine import Engine
from engine.rank import STEP_ERRORS
from gateway.core.errors import ContextExceeded, GatewayError, InternalError, Unavailable
from gateway.core.salts import cache_salt
from gateway.core.session import Deliver
from gateway.hub import Listener, Order
from messages.codec import unpack_tokens
from messages.sampling import FinishReason
from runtime.core.work import NOT_NUMBERS, wire_logprobs

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Running:
    """One sequence under way."""

    order: Order
    listener: Listener
    over: bool = False
    sample_of: "Running | None" = None
    """The first sample of the same prompt, whose KV this one begins with."""
    seq_id: str | None = None
    """Known to the engine's thread once it has taken the sequence."""


class _Cancel(NamedTuple):
    running: Running


class _Stop(NamedTuple):
    pass


class _News(NamedTuple):
    """What a step did for one sequence."""

    running: Running
    deliver: Deliver | None
    error: GatewayError | None = None


class EngineHub:
    """Made on the event loop that calls it; ``close`` when done."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Running | _Cancel | _Stop] = queue.SimpleQueue()
        self._by_id: dict[str, Running] = {}
        self._unfinished: set[Running] = set()
        self._failure: BaseException | None = None
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def open(self, orders: Iterable[tuple[Order, Listener]]) -> list[Running]:
        """Run all these sequences."""
        if self._failure is not None:
            raise Unavailable(f"the engine has failed: {self._failure}")
        opened = [Running(order, listener) for order, listener in orders]
        for first, running in pairwise(opened):  # samples of a prompt come one after the other
            if _source(running.order) == _source(first.order):
                running.sample_of = first.sample_of or first
        self._unfinished.update(opened)
        for running in opened:
            self._commands.put(running)
        return opened

    def cancel(self, running: Running) -> None:
        """Nobody waits for this sequence any more; nothing happens where it has ended."""
        if not running.over:
            self._end(running)
            self._commands.put(_Cancel(running))

    async def close(self) -> None:
        """End the thread, and let go of the engine; what still runs is dropped."""
        self._commands.put(_Stop())
        await asyncio.to_thread(self._thread.join)
        del self._engine  # and its memory with it, though somebody may hold on to us

    # On the engine's thread

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP counts threads for each thread that calls
        try:
            while self._obey():
                self._step()
        except BaseException as error:
            log.exception("the engine has failed")
            self._loop.call_soon_threadsafe(self._failed, error)

    def _obey(self) -> bool:
        """Carry out what was asked; wait where there is nothing to compute. False at the end."""
        while True:
            try:
                command = self._commands.get(block=not self._by_id)
            except queue.Empty:
                return True
            match command:
                case Running():
                    self._add(command)
                case _Cancel(running):
                    if running.seq_id is not None and self._by_id.pop(running.seq_id, None) is not None:
                        self._engine.abort(running.seq_id)
                case _Stop():
                    return False

    def _add(self, running: Running) -> None:
        order = running.order
        try:
            first = running.sample_of
            running.seq_id = self._engine.add(
                unpack_tokens(order.prompt),
                order.sampling,
                salt=cache_salt(order.tenant, order.cache_salt),
                fork_of=first.seq_id if first is not None and first.seq_id in self._by_id else None,
            )
        except CapacityError as error:
            self._tell([_News(running, None, ContextExceeded(str(error)))])
        else:
            self._by_id[running.seq_id] = running

    def _step(self) -> None:
        plan = self._engine.scheduler.schedule()
        if plan is None:
            return
        try:
            output = self._engine.runner.run(plan)
        except STEP_ERRORS as error:
            log.exception("a step of %d sequences failed", len(plan.sequences))
            failed = [self._by_id.pop(seq.seq_id) for seq in plan.sequences]
            self._engine.scheduler.failed(plan)
            for seq in plan.sequences:
                self._engine.abort(seq.seq_id)
            detail = f"{type(error).__name__} in the engine"
            self._tell([_News(running, None, InternalError(detail)) for running in failed])
            return
        self._tell([self._news(progress) for progress in self._engine.scheduler.update(plan, output)])

    def _news(self, progress: Progress) -> _News:
        seq_id, reason = progress.seq.seq_id, progress.finish_reason
        running = self._by_id[seq_id]
        if reason is not None:
            del self._by_id[seq_id]
        if reason is FinishReason.ABORT:
            return _News(running, None, InternalError(NOT_NUMBERS))
        if progress.token is None and reason is None:
            return _News(running, None)
        deliver = Deliver(
            [] if progress.token is None else [progress.token],
            None if progress.logprobs is None else wire_logprobs([progress.logprobs]),
            wire_logprobs(progress.prompt_logprobs),
            reason,
        )
        return _News(running, deliver)

    def _tell(self, news: list[_News]) -> None:
        worth = [each for each in news if each.deliver is not None or each.error is not None]
        if worth:
            self._loop.call_soon_threadsafe(self._hear, worth)

    # On the event loop

    def _hear(self, news: list[_News]) -> None:
        now = self._loop.time()
        for running, deliver, error in news:
            if running.over:
                continue
            if deliver is None:
                self._end(running)
                running.listener.failed(error or InternalError("internal error"))
            elif running.listener.deliver(deliver, now):
                self.cancel(running)
                running.listener.ended(FinishReason.STOP, now)
            elif deliver.finish is not None:
                self._end(running)
                running.listener.ended(deliver.finish, now)

    def _end(self, running: Running) -> None:
        running.over = True
        self._unfinished.discard(running)

    def _failed(self, error: BaseException) -> None:
        self._failure = error
        for running in list(self._unfinished):
            self._end(running)
            running.listener.failed(Unavailable(f"the engine has failed: {error}"))


def _source(order: Order) -> tuple[bytes, str, str]:
    """What the KV of a prompt depends on."""
    return order.prompt, order.tenant, order.cache_salt

"""What the router has placed and not yet seen finished: the load of every worker between its reports.

Tokens are counted on the prefill worker from ``Placed`` to ``Prefilled``, on the decode worker from ``Placed`` to
``Finished``; prompts that a decode worker computes itself also apart, up to ``Prefilled``. A newer attempt of a request
takes the place of the older one. Where such a word was lost, the worker's reports show it: it has fewer requests than
are counted on it. Which of them are over its gateway knows, and is asked. What nobody will ever finish, because the
gateway died, is found when that is lost, and at last by its age.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from messages.gateway_to_router import PlacementWanted
from messages.ids import Address, Attempt, Epoch, RequestId, WorkerId
from messages.router_to_gateway import Placed, WorkerLost
from router.core.views import WorkerView

DOUBT_AFTER = 1.0
"""Seconds after its placement in which a request reaches its worker, and its worker's report the router."""
ASK_AGAIN = 1.0
"""Seconds between two questions about a request."""
LOOK_AGAIN = 0.5
"""Seconds between two looks at all requests of a worker."""
ASKED_AT_ONCE = 64
"""Requests of a worker that one of its reports brings into doubt."""
REMEMBERED = 16_384
"""Closed requests of which is known where they were."""


@dataclass(slots=True)
class Entry:
    """One placed attempt."""

    attempt: Attempt
    gateway: Address
    placed: Placed
    """The answer, to be given again to whoever asks again."""
    since: float
    prefill: WorkerView | None
    prefill_tokens: int
    decode: WorkerView | None
    decode_tokens: int
    prompt_tokens: int
    """Of a prompt that ``decode`` computes itself."""
    lost: WorkerLost | None = None
    """Set when one of the workers left before its part was over."""
    begun: bool = False
    """Its first token is there."""
    asked: float = 0.0
    """When its gateway was last asked whether it goes on."""

    def to_begin(self, worker: WorkerView) -> bool:
        """Whether the first token is still to come, from ``worker``, which hands over."""
        return self.prefill is worker and not self.begun


class Ledger:
    """The entries by request, oldest first; ``changed`` hears of every worker whose load is another one."""

    def __init__(self, changed: Callable[[WorkerView], None]) -> None:
        self._changed = changed
        self._entries: dict[RequestId, Entry] = {}
        self._closed: OrderedDict[RequestId, list[tuple[WorkerId, Epoch]]] = OrderedDict()  # which workers they were on

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, request: RequestId) -> Entry | None:
        return self._entries.get(request)

    def where(self, request: RequestId) -> list[tuple[WorkerId, Epoch]] | None:
        """Workers that may have something of a request that is placed, or was not long ago; None: not known."""
        entry = self._entries.get(request)
        if entry is None:
            return self._closed.get(request)
        return [(view.worker, view.epoch) for view in (entry.decode, entry.prefill) if view is not None]

    def place(
        self,
        wanted: PlacementWanted,
        placed: Placed,
        prefill: WorkerView | None,
        decode: WorkerView,
        expected: int,
        now: float,
    ) -> None:
        """Count an attempt on its workers, in place of an older one; on ``decode`` with ``expected`` tokens."""
        self.close(wanted.request)
        entry = Entry(
            attempt=wanted.attempt,
            gateway=wanted.gateway,
            placed=placed,
            since=now,
            prefill=prefill,
            prefill_tokens=wanted.num_tokens if prefill is not None else 0,
            decode=decode,
            decode_tokens=expected,
            prompt_tokens=wanted.num_tokens if prefill is None else 0,
        )
        self._entries[wanted.request] = entry
        if prefill is not None:
            self._add(prefill, wanted.request, entry.prefill_tokens)
        decode.prompt_tokens += entry.prompt_tokens
        decode.unreported += 1
        decode.unreported_tokens += expected
        self._add(decode, wanted.request, entry.decode_tokens)

    def prefilled(self, request: RequestId, attempt: Attempt) -> None:
        """The prompt is computed; a prefill worker still holds the KV until the hand-over is through."""
        entry = self._entries.get(request)
        if entry is None or entry.attempt != attempt:
            return
        entry.begun = True
        if entry.prefill is not None:
            entry.prefill.tokens -= entry.prefill_tokens
            entry.prefill_tokens = 0
            self._changed(entry.prefill)
        if entry.decode is not None:
            entry.decode.prompt_tokens -= entry.prompt_tokens
            entry.prompt_tokens = 0

    def close(self, request: RequestId) -> None:
        """The request is over, or gets another placement; harmless for one that is not in the ledger."""
        entry = self._entries.pop(request, None)
        if entry is not None:
            workers = (entry.placed.decode, entry.placed.prefill)
            self._closed[request] = [(each.worker, each.epoch) for each in workers if each is not None]
            self._closed.move_to_end(request)
            if len(self._closed) > REMEMBERED:
                self._closed.popitem(last=False)
            self._leave_prefill(request, entry)
            self._leave_decode(request, entry)

    def lose(self, worker: WorkerView, lost: WorkerLost) -> list[Address]:
        """Take a lost worker off the ledger; the gateways that have requests on it, each once.

        What such a request still has on another worker stays counted until its gateway gives it up.
        """
        gateways: dict[Address, None] = {}
        for request in list(worker.requests):
            entry = self._entries[request]
            gateways[entry.gateway] = None
            if entry.decode is worker or entry.prefill_tokens:
                entry.lost = lost
            if entry.prefill is worker:
                self._leave_prefill(request, entry)
            if entry.decode is worker:
                self._leave_decode(request, entry)
        return list(gateways)

    def of(self, gateway: Address) -> list[RequestId]:
        """Its requests."""
        return [request for request, entry in self._entries.items() if entry.gateway == gateway]

    def release(self, worker: WorkerView) -> None:
        """``worker`` says that nothing is left there."""
        for request in list(worker.requests):
            entry = self._entries[request]
            if entry.decode is worker:
                self.close(request)
            else:
                self._leave_prefill(request, entry)

    def forget_before(self, time: float) -> int:
        """Close entries older than ``time``: their gateway must have died. Returns how many."""
        old = []
        for request, entry in self._entries.items():
            if entry.since >= time:
                break
            old.append(request)
        for request in old:
            self.close(request)
        return len(old)

    def forget_deserted(self, time: float) -> int:
        """Close entries older than ``time`` of which no worker is left: their gateway has heard that it is lost, and
        asks for no other, so the word that they are over must have been lost. Returns how many."""
        old = []
        for request, entry in self._entries.items():
            if entry.since >= time:
                break
            if entry.prefill is None and entry.decode is None:
                old.append(request)
        for request in old:
            self.close(request)
        return len(old)

    def doubtful(self, worker: WorkerView, present: int, now: float) -> list[Entry]:
        """``worker`` says that it has ``present`` requests: where more than those must have reached it by now, some are
        over, and which ones their gateways shall say. Each comes once in ``ASK_AGAIN``, oldest first.

        Until its first token a request is in its prefill worker's queue, from then on in its decode worker's batch;
        where that is lost, its next attempt is due. Of a worker that is draining, all are asked about whose first token
        is not known to be there.
        """
        if worker.looked_at + LOOK_AGAIN > now:
            return []
        worker.looked_at = now
        old: list[Entry] = []
        unbegun: list[Entry] = []
        for request in worker.requests:
            entry = self._entries[request]
            if entry.since + DOUBT_AFTER > now:
                break
            waits = entry.prefill is not None and (not entry.begun or entry.decode is None)
            if (entry.prefill is worker) if waits else (entry.decode is worker):
                old.append(entry)
            if not entry.begun:
                unbegun.append(entry)
        doubtful = old if len(old) > present else unbegun if worker.draining else []
        due = [entry for entry in doubtful if entry.asked + ASK_AGAIN <= now][:ASKED_AT_ONCE]
        for entry in due:
            entry.asked = now
        return due

    def check_integrity(self, workers: Iterator[WorkerView]) -> None:
        """Every worker's load is the sum of its entries."""
        tokens: dict[WorkerView, int] = {}
        requests: dict[WorkerView, set[RequestId]] = {}
        prompts: dict[WorkerView, int] = {}
        for request, entry in self._entries.items():
            for worker, count in ((entry.prefill, entry.prefill_tokens), (entry.decode, entry.decode_tokens)):
                if worker is None:
                    assert count == 0, f"{request}: {count} tokens on no worker"
                    continue
                assert worker.alive, f"{request} is placed on {worker.worker}, which is lost"
                tokens[worker] = tokens.get(worker, 0) + count
                requests.setdefault(worker, set()).add(request)
            if entry.decode is not None:
                prompts[entry.decode] = prompts.get(entry.decode, 0) + entry.prompt_tokens
        for worker in workers:
            assert worker.prompt_tokens == prompts.get(worker, 0), f"{worker.worker}: {worker.prompt_tokens} of prompts"
            assert worker.tokens == tokens.get(worker, 0), f"{worker.worker}: {worker.tokens} tokens"
            assert worker.requests.keys() == requests.get(worker, set()), f"{worker.worker}: {worker.requests}"

    def _add(self, worker: WorkerView, request: RequestId, tokens: int) -> None:
        worker.requests[request] = None
        worker.tokens += tokens
        self._changed(worker)

    def _leave_prefill(self, request: RequestId, entry: Entry) -> None:
        if entry.prefill is not None:
            self._remove(entry.prefill, request, entry.prefill_tokens)
            entry.prefill, entry.prefill_tokens = None, 0

    def _leave_decode(self, request: RequestId, entry: Entry) -> None:
        if entry.decode is not None:
            entry.decode.prompt_tokens -= entry.prompt_tokens
            self._remove(entry.decode, request, entry.decode_tokens)
            entry.decode, entry.decode_tokens, entry.prompt_tokens = None, 0, 0

    def _remove(self, worker: WorkerView, request: RequestId, tokens: int) -> None:
        del worker.requests[request]
        worker.tokens -= tokens
        self._changed(worker)

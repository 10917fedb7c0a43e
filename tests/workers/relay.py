"""Real workers in threads of the test, with real mailboxes and transports; the test itself plays router and gateway."""

import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from messages.codec import decoder_for, pack_tokens, unpack_tokens
from messages.common import Generation, Role, WorkerAddress
from messages.gateway_to_worker import Abort, EndAck, Generate, Prefill
from messages.ids import Attempt, RequestId
from messages.router_to_worker import PeerLost
from messages.sampling import FinishReason, SamplingParams
from messages.seals import seal
from messages.tickets import mint
from messages.worker_to_gateway import AttemptFailed, TokenBatch, TokenChunk
from messages.worker_to_router import Leaving, Register, Report
from runtime.actor import WorkerActor
from runtime.mailbox import Mailbox, Outbox
from runtime.worker_config import WorkerConfig
from worker.actor import Worker

KEY = b"k" * 32
PATIENCE = 60.0
"""Seconds after which a test that waits has failed."""


@dataclass
class Stream:
    """What the gateway has of a request."""

    attempt: Attempt = field(default=Attempt(1))
    """The one that counts."""
    tokens: dict[int, int] = field(default_factory=dict)
    chunks: list[TokenChunk] = field(default_factory=list)
    finish: FinishReason | None = None
    failed: AttemptFailed | None = None

    @property
    def over(self) -> bool:
        return self.finish is not None or self.failed is not None

    def token_ids(self) -> list[int]:
        assert sorted(self.tokens) == list(range(min(self.tokens), min(self.tokens) + len(self.tokens))), "a gap"
        return [self.tokens[index] for index in sorted(self.tokens)]


class Relay:
    """Two mailboxes (router, gateway) and the workers that were started."""

    def __init__(self) -> None:
        self.router = Mailbox("127.0.0.1", decoder_for(Register, Report, Leaving))
        self.gateway = Mailbox("127.0.0.1", decoder_for(TokenBatch, AttemptFailed))
        self.workers: dict[str, WorkerActor] = {}
        self.ranks: dict[str, list[WorkerActor]] = {}
        """By worker: its ranks but 0."""
        self.addresses: dict[str, WorkerAddress] = {}
        self.roles: dict[str, Role] = {}
        self.reports: dict[str, Report] = {}
        self.streams: dict[RequestId, Stream] = {}
        self.ack = True

    def start(self, config: WorkerConfig) -> None:
        """A worker; of one with several ranks each starts in a thread of its own, as each does in its own process."""
        worker = Worker(config)
        others = []
        if config.tensor_parallel > 1:
            leader = worker.prepare()
            others = [Worker(replace(config, rank=rank, leader=leader)) for rank in range(1, config.tensor_parallel)]
        with ThreadPoolExecutor(config.tensor_parallel) as threads:
            list(threads.map(lambda each: each.start(), [worker, *others]))
        self.workers[config.worker] = worker
        self.ranks[config.worker] = others
        self.wait(lambda: config.worker in self.addresses)

    def send(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        generated: list[int] = (),
        salt: bytes = b"",
        **pair: str,  # type: ignore[assignment]
    ) -> RequestId:
        """Start a request on ``prefill=`` and ``decode=``, or on ``colocated=``."""
        request = RequestId(secrets.token_hex(16))
        self.order(request, Attempt(1), prompt, params, list(generated), salt=salt, **pair)
        return request

    def order(
        self, request: RequestId, attempt: Attempt, prompt: list[int], params: SamplingParams,
        generated: list[int], *, salt: bytes = b"", **pair: str,
    ) -> None:  # fmt: skip
        stream = self.streams.setdefault(request, Stream())
        stream.attempt, stream.failed = attempt, None
        generation = Generation(pack_tokens(prompt), params, pack_tokens(generated), salt)
        if "colocated" in pair:
            order: Any = Generate(request, attempt, self.gateway.address, generation)
            self.gateway.send(self.addresses[pair["colocated"]].mailbox, order)
            return
        prefill, decode = self.addresses[pair["prefill"]], self.addresses[pair["decode"]]
        ticket = mint(KEY, request, attempt, prefill, decode)
        order = Prefill(request, attempt, self.gateway.address, generation, decode, ticket)
        self.gateway.send(prefill.mailbox, order)

    def lose(self, worker: str, *, dead: bool) -> None:
        """Tell the others that a worker has left; it goes on all the same."""
        lost = seal(KEY, PeerLost(peer=self.addresses[worker], dead=dead, detail="the test says so"))
        for name, address in self.addresses.items():
            if name != worker:
                self.router.send(address.mailbox, lost)

    def outbox_of(self, worker: str) -> Outbox:
        mailbox = self.workers[worker]._mailbox
        assert mailbox is not None
        return mailbox.outbox

    def abort(self, request: RequestId, attempt: int = 1) -> None:
        for address in self.addresses.values():
            self.gateway.send(address.mailbox, Abort(request, Attempt(attempt)))

    def wait(self, done: Any, patience: float = PATIENCE) -> None:
        """Play router and gateway until ``done()``."""
        deadline = time.monotonic() + patience
        while not done():
            assert time.monotonic() < deadline, "waited in vain"
            for message in self.router.receive(0):
                if isinstance(message, Register):
                    self.addresses[message.address.worker] = message.address
                    self.roles[message.address.worker] = message.role
                elif isinstance(message, Report):
                    self.reports[message.worker] = message
            for message in self.gateway.receive(0.005):
                self._take(message)

    def finish(self, *requests: RequestId) -> list[Stream]:
        """Wait until they are over."""
        self.wait(lambda: all(self.streams[request].over for request in requests))
        return [self.streams[request] for request in requests]

    def wait_until_idle(self) -> None:
        """Until every worker reports that it holds no block."""
        seen = {name: report.number for name, report in self.reports.items()}

        def idle() -> bool:
            return all(
                (report := self.reports.get(name)) is not None
                and report.number > seen.get(name, 0)
                and report.blocks.held == 0
                and report.blocks.free + report.blocks.cached == report.blocks.total
                for name in self.workers
            )

        self.wait(idle)

    def _take(self, message: TokenBatch | AttemptFailed) -> None:
        if isinstance(message, AttemptFailed):
            stream = self.streams[message.request]
            if message.attempt == stream.attempt:
                stream.failed = message
            return
        for chunk in message.chunks:
            stream = self.streams[chunk.request]
            if not (self.ack and chunk.finish is not None and stream.finish is not None):
                # An end that is acked is told again where the ack was late: the chunks are counted once all the same.
                stream.chunks.append(chunk)
            for place, token in enumerate(unpack_tokens(chunk.tokens).tolist()):
                assert stream.tokens.setdefault(chunk.index + place, token) == token, "two tokens at one position"
            if chunk.finish is not None:
                stream.finish = chunk.finish
                if self.ack:
                    self.gateway.send(self.addresses[message.worker].mailbox, EndAck(chunk.request, chunk.attempt))

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.inspect()
            worker.stop()
        for ranks in self.ranks.values():
            for rank in ranks:
                rank.stop()
        self.router.close()
        self.gateway.close()


def config(relay: Relay, worker: str, role: Role, model: Path, **changes: Any) -> WorkerConfig:
    settings: dict[str, Any] = {
        "worker": worker, "role": role, "host": "127.0.0.1", "router": relay.router.address, "cluster_key": KEY,
        "model": str(model), "dtype": "float32", "device": "cpu", "num_blocks": 1024, "block_size": 16,
        "kv_dtype": "auto", "transport": "inproc", "max_num_seqs": 64, "max_num_batched_tokens": 512,
        "prefill_chunk": 512, "max_model_len": 4096, "threads": 1,
    }  # fmt: skip
    return WorkerConfig(**{**settings, **changes})


@contextmanager
def relay_of(model: Path, *roles: Role, **changes: Any) -> Iterator[Relay]:
    """Workers ``prefill-0``, ``decode-0``, ... of these roles; checks at the end that nothing is held."""
    relay = Relay()
    try:
        for role in roles:
            number = sum(name.startswith(role) for name in relay.workers)
            relay.start(config(relay, f"{role}-{number}", role, model, **changes))
        yield relay
        relay.wait_until_idle()
    finally:
        relay.stop()

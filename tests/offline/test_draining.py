"""Promise: workers are drained and change their roles under requests: none of these is lost, wrong, or halted for long.

Router, gateway and workers are the real ones, as threads of this process.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.topology import Topology
from gateway.core.errors import GatewayError
from gateway.core.session import Deliver
from gateway.hub import Order
from messages.codec import pack_tokens
from messages.sampling import FinishReason, SamplingParams
from offline.relay_hub import RelayHub, relay_plan
from router.core.drains import Refused
from tests.workers.test_relay import prompt

TOKENS = 500
PARAMS = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
PROMPTS = [prompt(length, length) for length in (5, 47, 300, 64)]
PATIENCE = 90.0
MOST_PAUSE = 2.0
"""Seconds without a token of a stream that has begun."""


class Client:
    """One stream: its tokens, and when they came."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.over: asyncio.Future[FinishReason] = asyncio.get_running_loop().create_future()

    def deliver(self, tokens: Deliver, now: float) -> bool:
        self.tokens += tokens.tokens
        self.times.append(now)
        return False

    def ended(self, reason: FinishReason, now: float) -> None:
        self.over.set_result(reason)

    def failed(self, error: GatewayError) -> None:
        self.over.set_exception(error)

    @property
    def longest_pause(self) -> float:
        return max(later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False))


class Cluster:
    def __init__(self, hub: RelayHub) -> None:
        self.hub = hub
        self.router = hub._router

    def send(self) -> list[Client]:
        clients = [Client() for _ in PROMPTS]
        orders = [Order(prompt=pack_tokens(tokens), sampling=PARAMS) for tokens in PROMPTS]
        self.hub.open(zip(orders, clients, strict=True))
        return clients

    async def ask(self, method: str, *arguments: Any) -> Any:
        return await asyncio.to_thread(getattr(self.router, method), *arguments)

    async def until(self, worker: str, done: Callable[[dict[str, Any]], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not done(await self.ask("standing", worker)):
                await asyncio.sleep(0.02)

    async def streaming(self, clients: list[Client], count: int = 10) -> None:
        async with asyncio.timeout(PATIENCE):
            while any(len(client.tokens) < count for client in clients):
                await asyncio.sleep(0.01)

    async def answers(self, clients: list[Client]) -> list[list[int]]:
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(client.over for client in clients))
        return [client.tokens for client in clients]

    async def check_idle(self) -> None:
        """All books are balanced, and nothing is held."""
        async with asyncio.timeout(PATIENCE):
            while True:
                seen = [await asyncio.to_thread(worker.inspect) for worker in self.hub._workers]
                placed = (await self.ask("inspect"))["placed"]
                if not placed and not any(each["held"] + each["deliveries"] + each["handoffs"] for each in seen):
                    return
                await asyncio.sleep(0.05)


@asynccontextmanager
async def cluster(model: Path, pools: list[dict[str, Any]], **kv: Any) -> AsyncIterator[Cluster]:
    topology = Topology.parse({
        "model": str(model), "dtype": "float32", "pools": pools, "kv": {"num_blocks": 2048, **kv},
        "disaggregation": {"policy": "always"},
    })  # fmt: skip
    hub = await RelayHub(relay_plan(topology)).start()
    try:
        yield Cluster(hub)
    finally:
        await hub.close()


PAIRS = [{"name": "prefill", "role": "prefill", "replicas": 2}, {"name": "decode", "role": "decode", "replicas": 2}]


def test_workers_drain_flip_and_flip_back_under_requests(tiny_llama: Path) -> None:
    async def run() -> None:
        async with cluster(tiny_llama, PAIRS, transport="shm") as it:
            expected = await it.answers(it.send())
            clients = it.send()
            await it.streaming(clients)
            await it.ask("drain", "decode-0")
            with pytest.raises(Refused, match="decode-1 is the last decode worker"):
                await it.ask("drain", "decode-1")
            await it.until("decode-0", lambda standing: standing["drained"])
            assert not all(client.over.done() for client in clients), "they have moved, not ended"
            await it.ask("undrain", "decode-0")
            await it.ask("flip", "decode-1", "prefill")  # and all of them back
            await it.until("decode-1", lambda standing: standing["role"] == "prefill")
            more = it.send()
            assert await it.answers(clients) == expected
            await it.streaming(more)
            await it.ask("flip", "prefill-0", "decode")
            await it.until("prefill-0", lambda standing: standing["role"] == "decode")
            await it.ask("drain", "decode-0")
            await it.until("decode-0", lambda standing: standing["drained"])
            await it.ask("undrain", "decode-0")
            await it.ask("flip", "decode-1", "decode")
            await it.until("decode-1", lambda standing: standing["role"] == "decode")
            assert await it.answers(more) == expected
            print("longest pauses:", sorted(round(client.longest_pause, 3) for client in clients + more))
            assert max(client.longest_pause for client in clients + more) < MOST_PAUSE
            await it.check_idle()

    asyncio.run(run())


def test_colocated_workers_drain_one_after_the_other(tiny_llama: Path) -> None:
    async def run() -> None:
        async with cluster(tiny_llama, [{"name": "c", "role": "colocated", "replicas": 2}]) as it:
            expected = await it.answers(it.send())
            clients = it.send()
            await it.streaming(clients)
            for worker in ("c-0", "c-1"):
                await it.ask("drain", worker)
                await it.until(worker, lambda standing: standing["drained"])
                await it.ask("undrain", worker)
            with pytest.raises(Refused, match="cannot become"):
                await it.ask("flip", "c-0", "prefill")
            assert await it.answers(clients) == expected
            print("longest pauses:", sorted(round(client.longest_pause, 3) for client in clients))
            assert max(client.longest_pause for client in clients) < MOST_PAUSE
            await it.check_idle()

    asyncio.run(run())

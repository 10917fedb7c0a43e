"""A topology's router and workers as threads of this process, without Ray: the whole relay, KV hand-over and all."""

import asyncio
from collections.abc import Iterable
from typing import Self

from cluster.errors import LaunchError
from cluster.plan import LOOPBACK, Plan, make_plan
from cluster.topology import Topology
from gateway.core.dispatch import Messages
from gateway.core.session import SessionTimeouts
from gateway.hub import Hub, Listener, Order, Relay
from gateway.metrics import Metrics
from messages.codec import decoder_for
from messages.ids import Address
from router.actor import RouterActor
from runtime.actor import WorkerActor
from runtime.mailbox import AsyncMailbox
from worker.actor import Worker

READY_WITHIN = 30.0
"""Seconds from loaded workers to a router that knows them all."""
PATIENT = {
    "router.wait_timeout": 3600.0, "router.max_waiting": 1_000_000, "limits.max_concurrent_requests": 1_000_000,
    "router.liveness_timeout": 600.0,
}  # fmt: skip
"""Nobody else waits here, and a script may be stopped in a debugger."""


def relay_plan(topology: Topology) -> Plan:
    """What to start for ``topology`` in one process; ``TopologyError`` where that cannot be."""
    for index, pool in enumerate(topology.pools):
        if pool.tensor_parallel > 1:
            text = "tensor_parallel needs a process for each rank, and here is only one; use baton up"
            raise topology.error(("pools", index, "tensor_parallel"), text)
    return make_plan(topology.with_overrides(PATIENT))


class RelayHub:
    """``start`` it on the event loop that calls it; ``close`` when done."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._router = RouterActor(plan.router_config())
        self._workers: list[WorkerActor] = []
        self._mailbox: AsyncMailbox | None = None
        self._hub: Hub | None = None
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> Self:
        """Load every worker's model; returns when requests can be placed. Raises what kept it from that."""
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise
        return self

    def open(self, orders: Iterable[tuple[Order, Listener]]) -> list[Relay]:
        """Run all these sequences."""
        assert self._hub is not None, "not started"
        return self._hub.open(orders)

    def cancel(self, relay: Relay) -> None:
        """Nobody waits for this sequence any more; nothing happens where it has ended."""
        assert self._hub is not None, "not started"
        self._hub.cancel(relay)

    async def close(self) -> None:
        """Stop workers and router; what still runs is dropped. Harmless twice."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self._running = None
        for worker in self._workers:
            await asyncio.to_thread(worker.stop)
        self._workers.clear()
        await asyncio.to_thread(self._router.stop)
        if self._mailbox is not None:
            self._mailbox.close()
            self._mailbox = None

    async def _start(self) -> None:
        router = Address(self._router.start()["address"])
        for planned in self._plan.workers(router):
            config = planned.config
            worker = Worker(config)
            self._workers.append(worker)
            await asyncio.to_thread(worker.start)
        gateway = self._plan.gateway_config(router)
        self._mailbox = AsyncMailbox(LOOPBACK, decoder_for(*Messages))
        self._hub = Hub(
            self._mailbox,
            router,
            limits=gateway.limits,
            timeouts=SessionTimeouts(placement=gateway.timeouts.placement),
            max_attempts=gateway.max_attempts,
            metrics=Metrics(),
            state_every=gateway.state_every,
        )
        self._running = asyncio.create_task(self._hub.run())
        try:
            async with asyncio.timeout(READY_WITHIN):
                while not (self._hub.ready and self._router.inspect()["workers"] == len(self._workers)):
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise LaunchError(f"the router did not know every worker after {READY_WITHIN:.0f} s") from None

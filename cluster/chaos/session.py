"""One chaos run on a cluster that is ready.

1. Every request's answer is learned while nothing fails, and what idle processes have open is noted.
2. Load begins, and with it memory is watched. A fault every so often; each is undone when its time is over.
3. Load ends: what has begun comes to its end, and all links and processes are sound again.
4. What is still held or open a while later is leaked.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import httpx

from cluster.chaos.catalogue import catalogue
from cluster.chaos.core.answers import Verdict
from cluster.chaos.core.faults import HEAD_SECONDS, Kind, Planner, Victim
from cluster.chaos.core.report import Memory, Report, Strike, Tally, held, resumes_of, unexplained
from cluster.chaos.load import NO_TLS, Load, Stream
from cluster.chaos.meters import LATE, Meters, Uses, shared_memory, uses
from cluster.chaos.processes import Gone, Life, Processes, kill, set_links, stop
from cluster.chaos.recorder import Recorder, incarnation, lost
from cluster.client import credentials, only_model
from cluster.errors import ClusterError
from kv_transfer.transports.faulty import Fault as LinkFault
from kv_transfer.transports.switched import SOUND, LinkState
from kv_transfer.transports.zmq import STALLED_AFTER
from runtime.threads import thread_pool
from simulator import history as h

LINKS = {
    Kind.CORRUPT: LinkState(
        {LinkFault.CORRUPT: 0.3, LinkFault.SWAP: 0.15, LinkFault.DUPLICATE: 0.15, LinkFault.DROP: 0.1}
    ),
    Kind.CUT: LinkState({LinkFault.FAIL: 1.0}),
    Kind.SLOW: LinkState({}, latency=0.2, bytes_per_second=1e6),
}
CUT_SILENTLY = LinkState({LinkFault.FAIL: 1.0}, latency=STALLED_AFTER)
"""As long as a transport takes to find that its peer takes nothing any more."""
NEARLY_SOUND = LinkState(latency=1e-6)
"""All goes through what makes faults, and none is made."""
REHEARSAL_SECONDS = 4.0
"""For which a process stands still once before the run: long enough to be taken for lost."""
LAUNCHER = Life("launcher", os.getpid(), os.getpid())
"""This process, which also makes the load."""
CALLERS = 4
"""Threads that call the cluster's processes."""
SAMPLE_EVERY = 0.5
LOOK_EVERY = 0.1
"""Seconds between two looks at what changes by itself, such as a process that is started anew."""
SETTLE_WITHIN = 100.0
"""Seconds in which everything must be given back; sockets to a process that is gone are kept for 60."""
BACK_WITHIN = 90.0 + HEAD_SECONDS
"""Seconds in which a process that was hit must serve again, also if it has to wait for Ray's head."""


@dataclass(frozen=True, slots=True)
class Settings:
    topology: str
    kinds: Sequence[Kind]
    duration: float
    every: float
    seed: int
    concurrency: int
    longest: int = 240
    """Most tokens of an answer."""
    num_cases: int = 48


@dataclass(slots=True)
class Now:
    """What is going on, for who looks on; read from another thread."""

    phase: str = "asking every request once"
    progress: tuple[float, float] = (0, 1)
    strikes: list[Strike] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    in_flight: int = 0
    tokens_per_second: float = 0.0


class Session:
    """``run`` it once; ``now`` tells how far it is."""

    def __init__(
        self,
        processes: Processes,
        settings: Settings,
        recorder: Recorder,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """``note`` hears of every fault and of every stream that did not end as it should."""
        self.now = Now()
        self._processes = processes
        self._settings = settings
        self._recorder = recorder
        self._note = note
        self._meters = Meters()
        self._planner = Planner(settings.kinds, lambda number: Random(f"{settings.seed}/faults/{number}"))
        self._held: set[str] = set()  # victims that a fault holds
        self._undo: set[asyncio.Task[None]] = set()
        self._unhealed: list[str] = []  # what did not come back after its fault, or broke without one
        self._skipped = 0
        self._rates: list[tuple[float, float]] = []
        self._began = 0.0
        self._known: set[h.Incarnation] = set()
        urls = list(processes.urls.values())
        cases = catalogue(only_model(urls[0]), settings.seed, settings.num_cases, settings.longest)
        self._load = Load(urls, cases, settings.concurrency, settings.seed, recorder, self._ended)

    async def run(self) -> Report:
        """``ClusterError`` where the cluster does not do what it should even without faults."""
        settings = self._settings
        asyncio.get_running_loop().set_default_executor(thread_pool(CALLERS, "chaos-calls"))
        await self._load.learn(self._learned)
        await self._rehearse()
        self.now.phase = "waiting until nothing is held"
        await self._settle(self._held_now, within=SETTLE_WITHIN)
        before, shared = self._uses(), shared_memory()
        stopping = asyncio.Event()
        self._began = time.monotonic()
        self._know()
        self.now.phase = "faults"
        async with asyncio.TaskGroup() as tasks:
            watching = [tasks.create_task(self._sample()), tasks.create_task(self._watch_losses())]
            load = tasks.create_task(self._load.run(stopping))
            await self._faults(self._began + settings.duration)
            while self._undo:
                await asyncio.wait(self._undo)
            stopping.set()
            self.now.phase = "waiting for the last streams"
            await load
            for task in watching:
                task.cancel()
        seconds = time.monotonic() - self._began
        self.now.phase = "waiting until everything is given back"
        leaked = await self._settle(partial(self._leaked, before, shared), within=SETTLE_WITHIN)
        await self._look_into_pools(idle=True)
        judged = await asyncio.to_thread(self._recorder.judge)
        return Report(
            topology=settings.topology,
            seed=settings.seed,
            every=settings.every,
            concurrency=settings.concurrency,
            began=self._began,
            seconds=seconds,
            strikes=self.now.strikes,
            skipped=self._skipped,
            tally=self.now.tally,
            tokens=self._load.tokens,
            tokens_per_second=self._rates,
            leaked=leaked,
            left_out=self._load.unstable,
            violations=[*self._unhealed, *(str(violation) for violation in judged.violations)],
            memory=[
                Memory(life.name, life.pid, [at - self._began for at in series.times], series.bytes)
                for life, series in self._meters.memory.items()
            ],
        )

    async def _rehearse(self) -> None:
        """Have every way used once that faults make use of, so that whatever is open then stays open; and ask twice
        more meanwhile. What stands still comes first: who is lost is known to nobody when it is back."""
        self.now.phase = "rehearsing"
        victims = self._processes.victims()
        senders = [victim.name for victim in victims if victim.sends]
        workers = sorted(victim.name for victim in victims if victim.usable and victim.role == "decode")
        if workers and (Kind.STOP in self._settings.kinds or Kind.KILL in self._settings.kinds):
            wake = stop(self._life(workers[0]).pid)
            await asyncio.sleep(REHEARSAL_SECONDS)
            wake()
            await self._serves(workers[0], "decode")
            # The router has closed its way to that one, told the others of it, and may not have spoken to it since.
            await asyncio.to_thread(self._processes.call, "router", "undrain", workers[0])
        await asyncio.to_thread(self._set_links, senders, NEARLY_SOUND)
        await self._load.confirm(self._learned)
        few = self._load.cases[: self._settings.concurrency]
        for sender in senders:
            await asyncio.to_thread(self._set_links, [sender], LINKS[Kind.CUT])
            await self._load.once(few)
            await asyncio.to_thread(self._set_links, [sender], SOUND)
        await self._load.confirm(self._learned)

    def _set_links(self, names: Sequence[str], state: LinkState) -> None:
        for name in names:
            set_links(self._processes, name, state)

    # Load

    def _learned(self, done: int, total: int) -> None:
        self.now.progress = (done, total)

    def _ended(self, stream: Stream) -> None:
        resumed = resumes_of(stream.pauses, stream.attempts, self.now.strikes)
        story = f"{stream.case} ({stream.request}, {stream.attempts} attempts): {stream.detail}"
        self.now.tally.add(stream.verdict, stream.attempts, stream.refusals, stream.longest_pause, story, resumed)
        self.now.tally.attached += stream.attached
        outages = (strike for strike in self.now.strikes if strike.fault.kind is Kind.HEAD)
        self.now.tally.headless += any(
            each.began < stream.last and (each.ended is None or stream.begun < each.ended) for each in outages
        )
        if stream.verdict is not Verdict.SAME:
            self._note(f"{stream.verdict.value}: {story}")
        gateways = {url: name for name, url in self._processes.urls.items()}
        for name in unexplained([(at, gateways[url]) for at, url in stream.cuts], self.now.strikes):
            self._unhealed.append(f"{name} broke off {story} after its headers, and was not killed")
            self._note(self._unhealed[-1])

    async def _sample(self) -> None:
        """Tokens a second and memory."""
        tokens, since = self._load.tokens, time.monotonic()
        while True:
            await asyncio.sleep(SAMPLE_EVERY)
            now = time.monotonic()
            rate = (self._load.tokens - tokens) / (now - since)
            tokens, since = self._load.tokens, now
            self._rates.append((round(now - self._began, 2), round(rate, 1)))
            self.now.tokens_per_second = rate
            self.now.in_flight = len(self._load.in_flight)
            self.now.progress = (min(now - self._began, self._settings.duration), self._settings.duration)
            self._meters.sample(self._measured().values(), now)
            self._know()

    def _know(self) -> None:
        """Write down who has started since the last time."""
        for started in self._processes.records(time.monotonic()):
            if started.process not in self._known:
                self._known.add(started.process)
                self._recorder.write(started)

    async def _look_into_pools(self, *, idle: bool = False) -> None:
        figures = await asyncio.to_thread(self._processes.inspect)
        if idle:
            self._recorder.write(h.Idle(time.monotonic()))
        self._recorder.blocks(time.monotonic(), self._processes.lives(), figures)

    # Faults

    async def _faults(self, until: float) -> None:
        settings, number = self._settings, 1
        while (at := self._began + number * settings.every) < until:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            self._strike()
            number += 1
        await asyncio.sleep(max(0.0, until - time.monotonic()))

    def _strike(self) -> None:
        victims = [self._seen(victim) for victim in self._processes.victims()]
        fault = self._planner.next(victims)
        if fault is None:
            self._skipped += 1
            return
        role = next(victim.role for victim in victims if victim.name == fault.victim)
        self._held.add(fault.victim)
        task = asyncio.create_task(self._put_in(Strike(fault, role, time.monotonic())))
        self._undo.add(task)
        task.add_done_callback(self._undo.discard)

    def _seen(self, victim: Victim) -> Victim:
        """A victim that a fault holds cannot be hit again, nor do the work of another."""
        usable = victim.usable and victim.name not in self._held
        return Victim(victim.name, victim.role, usable, victim.restarts, victim.sends)

    async def _put_in(self, strike: Strike) -> None:
        fault = strike.fault
        try:
            if fault.kind is Kind.KILL:
                await self._kill(strike)
            elif fault.kind is Kind.STOP:
                await self._stop(strike)
            elif fault.kind is Kind.HEAD:
                await self._kill_head(strike)
            else:
                await self._spoil(strike)
        except Gone:
            self._note(f"fault {fault.number}: {fault.victim} is gone already")
        except ClusterError as error:
            self._unhealed.append(f"after fault {fault.number}: {error}")
        else:
            strike.ended = time.monotonic()
        finally:
            self._held.discard(fault.victim)

    def _struck(self, strike: Strike, life: Life | None = None) -> None:
        fault = strike.fault
        strike.began = time.monotonic()
        strike.epoch = 0 if life is None else life.epoch
        self.now.strikes.append(strike)
        lasts = f" for {fault.seconds:g} s" if fault.seconds else ""
        how = ", silently" if fault.silent else ""
        self._note(f"{strike.began - self._began:6.1f} s  {fault.kind.value} {fault.victim}{lasts}{how}")

    async def _kill(self, strike: Strike) -> None:
        name = strike.fault.victim
        life = self._life(name)
        kill(life.pid)
        self._struck(strike, life)
        self._recorder.write(h.Killed(strike.began, incarnation(life)))
        await self._wait(lambda: self._processes.lives().get(name, life) != life, f"{name} was not started anew")
        await self._serves(name, strike.role)
        strike.restarted = time.monotonic()

    async def _kill_head(self, strike: Strike) -> None:
        pid = self._processes.head()
        if pid is None:
            raise Gone(strike.fault.victim)
        kill(pid)
        self._struck(strike)
        await self._wait(lambda: self._processes.head() not in (None, pid), "Ray's head was not started anew")
        strike.restarted = time.monotonic()

    async def _stop(self, strike: Strike) -> None:
        name = strike.fault.victim
        life = self._life(name)
        wake = stop(life.pid)
        try:
            self._struck(strike, life)
            self._recorder.write(h.Frozen(strike.began, incarnation(life)))
            await asyncio.sleep(strike.fault.seconds)
        finally:
            wake()
            self._recorder.write(h.Thawed(time.monotonic(), incarnation(life)))
        await self._serves(name, strike.role)

    async def _spoil(self, strike: Strike) -> None:
        fault = strike.fault
        state = CUT_SILENTLY if fault.silent else LINKS[fault.kind]
        await asyncio.to_thread(set_links, self._processes, fault.victim, state)
        try:
            self._struck(strike)
            until = strike.began + fault.seconds
            self._recorder.write(h.Injected(strike.began, fault.kind.value, fault.victim, until))
            await asyncio.sleep(fault.seconds)
        finally:
            await asyncio.to_thread(set_links, self._processes, fault.victim, SOUND)

    def _life(self, name: str) -> Life:
        life = self._processes.lives().get(name)
        if life is None:
            raise Gone(name)
        return life

    async def _serves(self, name: str, role: str) -> None:
        """Until it is in the membership again."""
        if role in ("router", "gateway"):
            return
        await asyncio.sleep(1.0)  # longer than the gateway's view of the cluster is old
        url = next(iter(self._processes.urls.values()))
        async with httpx.AsyncClient(trust_env=False, timeout=5.0, verify=NO_TLS, headers=credentials()) as client:

            async def alive() -> bool:
                try:
                    status = (await client.get(url + "/status")).json()
                except httpx.TransportError:
                    return False
                workers = (status["cluster"] or {"workers": []})["workers"]
                return any(worker["worker"] == name and worker["alive"] for worker in workers)

            deadline = time.monotonic() + BACK_WITHIN
            while not await alive():
                if time.monotonic() > deadline:
                    raise ClusterError(f"{name} does not serve {BACK_WITHIN:.0f} s after its fault was over")
                await asyncio.sleep(LOOK_EVERY)

    async def _wait(self, done: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + BACK_WITHIN
        while not done():
            if time.monotonic() > deadline:
                raise ClusterError(f"{otherwise} within {BACK_WITHIN:.0f} s")
            await asyncio.sleep(LOOK_EVERY)

    async def _watch_losses(self) -> None:
        """Note when the router took a victim for lost."""
        since = time.monotonic()
        while True:
            await asyncio.sleep(SAMPLE_EVERY)
            losses = await asyncio.to_thread(self._processes.losses, since)
            self._recorder.write(*lost(losses))
            for at, worker, epoch in losses:
                since = max(since, at)
                self._detected(worker, epoch, at)

    def _detected(self, worker: str, epoch: int, at: float) -> None:
        for strike in reversed(self.now.strikes):
            hit = (strike.fault.victim, strike.epoch) == (worker, epoch) and not strike.fault.kind.of_links
            if hit and strike.began <= at:
                strike.detected = strike.detected or at
                return

    # What is left

    async def _settle(self, left: Callable[[], list[str]], *, within: float) -> list[str]:
        """What is left after at most ``within`` seconds."""
        deadline = time.monotonic() + within
        while (found := await asyncio.to_thread(left)) and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_EVERY)
        return found

    def _held_now(self) -> list[str]:
        return held(self._processes.inspect())

    def _measured(self) -> dict[str, Life]:
        return {**self._processes.lives(), LAUNCHER.name: LAUNCHER}

    def _uses(self) -> dict[str, Uses]:
        found = {name: uses(life.pid) for name, life in self._measured().items()}
        return {name: each for name, each in found.items() if each is not None}

    def _leaked(self, before: dict[str, Uses], shared: set[str]) -> list[str]:
        left = self._held_now()
        for name, each in self._uses().items():
            late = LATE if name == LAUNCHER.name else None
            beyond: dict[str, Any] = each.beyond(before[name], late) if name in before else {}
            left += [f"{name}: {count} more {what} than before" for what, count in beyond.items()]
        return [*left, *(f"/dev/shm/{name}" for name in sorted(shared_memory() - shared))]

"""Starts everything that a plan names, keeps it running, and takes it down.

1. A Ray: our own on loopback, or the one at the given address. Is there room for everything? On a Ray of several
   hosts each worker waits for room: a host may still be joining.
2. The controller (``core/controller.py``) has every unit started, all at once, in a thread of its own. The processes
   import their code while the router starts; with its address, the workers load the model, the gateway its tokenizer.
3. When the router knows every worker and the gateway says that it is ready, the cluster is up. What fails until then
   is the end of it.
4. From then on whatever dies is started again, and nobody has to wait for that: not the launcher, nor other deaths.
5. Down: the gateway lets requests finish, then workers, router, Ray; what does not go is killed.
"""

import contextlib
import itertools
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from cluster.core.controller import Controller
from cluster.core.events import Action, Begin, Done, Event, GiveUp, Note, Tick, Up, Wanted
from cluster.core.operations import Refused
from cluster.core.units import NEVER, BackOff, Kind, Phase, Status
from cluster.errors import ClusterError, LaunchError
from cluster.hosts import Hosts
from cluster.plan import Plan, PlannedWorker
from cluster.processes import (
    POLL,
    ROUTER_NAME,
    Needs,
    Process,
    Processes,
    Progress,
    amount_of,
    needs,
    units_of,
)
from cluster.ray_session import RaySession
from runtime import heap
from runtime.core.actions import WakeAt

AS_KUBERNETES = BackOff()
READY_WITHIN = 30.0
"""Seconds from loaded models to a cluster that answers."""


@dataclass(frozen=True)
class Remains:
    """What is still there after the end; nothing, if all went well."""

    items: list[str] = field(default_factory=list)
    logs: Path | None = None
    """Where the processes' logs were kept because something went wrong."""


class Asked(NamedTuple):
    """Somebody wants something of the controller."""

    wanted: Wanted
    answers: "queue.SimpleQueue[Answer]"


Answer = Note | Done | Refused


class Cluster:
    """``start``, then whatever it is for, then ``stop``; or use it in a ``with`` statement. What dies in between is
    started again."""

    def __init__(
        self,
        plan: Plan,
        progress: Progress = lambda who, what: None,
        keep_logs_in: Path | None = None,
        check: Callable[[], None] = lambda: None,
        *,
        back_off: BackOff = AS_KUBERNETES,
        head_back_off: BackOff = AS_KUBERNETES,
    ) -> None:
        """``check`` is called every moment while the cluster starts; what it raises ends the start. ``progress`` is
        called from several threads, by one at a time."""
        self.plan = plan
        self.url = ""
        self._progress = progress
        self._keep_logs_in = keep_logs_in
        self._check = check
        joined = plan.topology.cluster
        self._session = RaySession(joined.address, f"baton-{plan.topology.name}", allow_open=joined.allow_open_ray)
        self._controller = Controller(units_of(plan, back_off, head_back_off))
        self._processes: Processes | None = None
        self._events: queue.SimpleQueue[Event | Asked | None] = queue.SimpleQueue()
        self._tickets = itertools.count(1)
        self._asking: dict[int, queue.SimpleQueue[Answer]] = {}
        """Who waits for the end of something, by ticket; used by the controller's thread."""
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        """Held by who uses the controller."""
        self._one_at_a_time = threading.Lock()
        self._wake = NEVER
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._failed = False

    @property
    def ray_folder(self) -> Path | None:
        """The private folder of our own Ray."""
        return self._session.folder

    @property
    def ray_address(self) -> str | None:
        """HOST:PORT of a Ray that was joined."""
        return self._session.joined

    @property
    def head_pid(self) -> int | None:
        """Of our own Ray's head."""
        return self._session.head_pid

    @property
    def urls(self) -> list[str]:
        """Of all gateways."""
        return [] if self._processes is None else [self._processes.urls[name] for name in self.plan.gateways]

    @property
    def grpc_ports(self) -> list[int | None]:
        """Of all gateways."""
        return [] if self._processes is None else [self._processes.grpc_ports[name] for name in self.plan.gateways]

    @property
    def processes(self) -> dict[str, Process]:
        """By name, in their newest incarnation."""
        return {} if self._processes is None else dict(self._processes.newest)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Bring everything up; whatever goes wrong, nothing is left running."""
        try:
            self._start()
        except BaseException as error:
            self._failed = not isinstance(error, ClusterError) or error.exit_code == 1
            remains = self.stop()
            if remains.logs is not None:
                error.add_note(f"the processes' logs are in {remains.logs}")
            raise

    def _start(self) -> None:
        where = self.plan.topology.cluster.address
        self._note("ray", "starting" if where == "local" else f"joining {where}")
        self._session.start()
        self._note("ray", "ready")
        if self.plan.spread:
            self._wait_for_hosts(Hosts(self._session.ray))
            self._check_room([])  # workers wait for theirs
        else:
            self._check_room(self.plan.workers(router=""))
        self._processes = Processes(self.plan, self._session, self._events.put, self._note)
        self._thread = threading.Thread(target=self._control, args=(self._processes,), name="controller", daemon=True)
        self._thread.start()
        threading.Thread(target=self._trim, name="heap", daemon=True).start()
        self._events.put(Begin())
        while not all(status.phase is Phase.RUNNING for status in self.status()):
            self._check()
            self.supervise(POLL / 4)
        self.url = self._processes.urls[self.plan.gateways[0]]
        self._wait_until_ready()
        heap.settle()
        self._events.put(Up())
        self._processes.up = True

    def supervise(self, seconds: float) -> None:
        """Wait as long; raises what has ended the controller, if anything has."""
        if self._ended.wait(seconds) and self._error is not None:
            raise self._error

    def status(self) -> list[Status]:
        """Of everything that runs, or shall."""
        with self._lock:
            return self._controller.status(time.monotonic())

    def operate(self, wanted: Wanted) -> Iterator[Note | Done]:
        """Have something done, whatever its ``ticket``; what happens until it is. Raises ``Refused``."""
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._events.put(Asked(wanted, answers))
        while not self._ended.is_set():
            with contextlib.suppress(queue.Empty):
                answer = answers.get(timeout=POLL)
                if isinstance(answer, Refused):
                    raise answer
                yield answer
                if isinstance(answer, Done):
                    return
        yield Done(0, "the cluster is being stopped")

    def call(self, name: str, method: str, *arguments: Any, within: float = 60.0) -> Any:
        """Call a method of the actor ``name`` ("router", "decode-0") and wait for its answer; for tests and tools."""
        return self._session.ray.get(self.processes[name].handle.call.remote(method, *arguments), timeout=within)

    def inspect(self) -> dict[str, dict[str, int]]:
        """``inspect()`` of every worker that is ready and the router, each after its ``check_integrity``."""
        ready = [
            status.name
            for status in self.status()
            if status.kind in (Kind.ROUTER, Kind.WORKER) and status.phase is Phase.RUNNING
        ]
        processes = self.processes
        refs = {name: processes[name].handle.call.remote("inspect") for name in ready}
        return {name: self._session.ray.get(ref, timeout=60) for name, ref in refs.items()}

    def stop(self) -> Remains:
        """Take everything down; harmless twice."""
        if self._thread is not None:
            self._events.put(None)
            self._thread.join()
            self._thread = None
        processes, self._processes = self._processes, None
        try:
            left = [] if processes is None else processes.close()
        except BaseException as error:
            logs = self._keep_logs()
            if logs is not None:
                error.add_note(f"the processes' logs are in {logs}")
            for each in self._session.stop():
                error.add_note(f"{each} is still there")
            raise
        died = any(status.cause for status in self.status())
        logs = self._keep_logs() if self._failed or died else None
        return Remains([*left, *self._session.stop()], logs)

    # Up

    def _wait_for_hosts(self, hosts: Hosts) -> None:
        wanted = self.plan.topology.cluster
        deadline, told = time.monotonic() + wanted.wait_for_room, 0
        while len(there := hosts.alive()) < wanted.min_hosts:
            if len(there) != told:
                told = len(there)
                self._note("ray", f"{told} of {wanted.min_hosts} hosts have joined")
            self._check()
            if time.monotonic() > deadline:
                text = f"{wanted.min_hosts} are wanted, and after {wanted.wait_for_room:g} s there are {told}"
                advice = "`ray status` says what is known of the others"
                raise self.plan.topology.error(
                    ("cluster", "min_hosts"), f"cluster.min_hosts: {text}: {', '.join(map(str, there))}; {advice}"
                )
            self.supervise(POLL)

    def _check_room(self, workers: list[PlannedWorker]) -> None:
        """Say what is missing before Ray waits for it."""
        ray = self._session.ray
        node = ray.get_runtime_context().get_node_id()
        free: Needs = ray._private.state.available_resources_per_node().get(node, {})
        topology = self.plan.topology
        wanted: Needs = {"CPU": topology.router.cpus + topology.gateway.cpus * topology.gateway.replicas}
        for worker in workers:
            for name, amount in needs(worker).items():
                wanted[name] = wanted.get(name, 0.0) + amount
        missing = [
            f"{amount_of(name, amount)} wanted, {amount_of(name, free.get(name, 0.0))} free"
            for name, amount in wanted.items()
            if amount > free.get(name, 0.0) + 1e-9
        ]
        if missing:
            if self.plan.spread:
                advice = "give this host more, as with `ray start --num-cpus`, or lower router.cpus and gateway.cpus"
                raise topology.error(
                    ("router", "cpus"), f"this host has no room for router and gateways: {'; '.join(missing)}; {advice}"
                )
            advice = "lower replicas or resources of the pools"
            raise topology.error(("pools",), f"this machine has no room for the pools: {'; '.join(missing)}; {advice}")

    def _wait_until_ready(self) -> None:
        workers = sum(status.kind is Kind.WORKER for status in self.status())
        deadline = time.monotonic() + READY_WITHIN
        while self.call(ROUTER_NAME, "inspect")["workers"] < workers or not all(
            self.call(gateway, "ready") for gateway in self.plan.gateways
        ):
            self._check()
            self.supervise(POLL / 4)
            if time.monotonic() > deadline:
                known = self.call(ROUTER_NAME, "inspect")["workers"]
                raise LaunchError(
                    f"not ready after {READY_WITHIN:.0f} s: the router knows {known} of {workers} workers"
                )

    def _trim(self) -> None:
        """In a thread of its own, until the controller ends: starting and watching others leaves much that is free."""
        while not self._ended.wait(heap.TRIM_EVERY):
            heap.trim()

    # The controller's thread

    def _control(self, processes: Processes) -> None:
        """Until ``None`` comes: events in, actions out."""
        try:
            while not self._ended.is_set() and (event := self._next()) is not None:
                if isinstance(event, Asked):
                    self._ask(processes, event)
                else:
                    self._handle(processes, event)
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._ended.set()

    def _next(self) -> Event | Asked | None:
        try:
            return self._events.get(timeout=None if self._wake == NEVER else max(0.0, self._wake - time.monotonic()))
        except queue.Empty:
            return Tick()

    def _ask(self, processes: Processes, asked: Asked) -> None:
        ticket = next(self._tickets)
        self._asking[ticket] = asked.answers
        try:
            self._handle(processes, asked.wanted._replace(ticket=ticket))
        except Refused as error:
            self._asking.pop(ticket).put(error)

    def _handle(self, processes: Processes, event: Event) -> None:
        now = time.monotonic()
        with self._lock:
            actions = self._controller.handle(event, now)
        for action in actions:
            self._perform(processes, action)

    def _perform(self, processes: Processes, action: Action) -> None:
        match action:
            case WakeAt(when):
                self._wake = when
            case Note(who, what):
                self._note(who, what)
                for answers in self._asking.values():
                    answers.put(action)
            case Done(ticket, _):
                self._asking.pop(ticket).put(action)
            case GiveUp(cause):
                self._error = LaunchError(cause)
                self._ended.set()
            case _:
                processes.perform(action)

    def _note(self, who: str, what: str) -> None:
        with self._one_at_a_time:
            self._progress(who, what)

    # Down

    def _keep_logs(self) -> Path | None:
        logs, target = self._session.logs, self._keep_logs_in
        if logs is None or target is None or not logs.is_dir():
            return None
        shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(shutil.Error, OSError):
            shutil.copytree(logs, target, ignore=lambda _, names: [name for name in names if name.endswith(".sock")])
        return target

"""The cluster's processes: actors on Ray. Made, started, stopped and killed a unit at a time.

Starting and stopping take long and wait for Ray, so each goes on in a thread of its own, and posts what came of it to
the controller. On this host a death is heard of by the process's pidfd, at once and also while Ray's head is away; on
another one by the call of ``Host.hold``, which Ray ends with the process or its host. The cause comes by the call of
``Host.watch``, where the process could still say one.

Router and gateways run on this host, beside the launcher; workers where their pool's placement says.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from cluster.core.events import (
    Died,
    Drain,
    Event,
    Failed,
    Flip,
    Gone,
    Kill,
    Moved,
    Ready,
    Retire,
    Start,
    Stop,
    TellDied,
    ToProcesses,
    Undrain,
)
from cluster.core.placing import Node
from cluster.core.pulse import Pulse
from cluster.core.units import BackOff, Kind, Unit
from cluster.deaths import Deaths, Pid
from cluster.errors import LaunchError
from cluster.host import GATEWAY, ROUTER, WORKER, Host
from cluster.hosts import Hosts
from cluster.marks import name_of
from cluster.plan import LOOPBACK, Plan, PlannedWorker, size
from cluster.ray_session import RaySession
from cluster.state import started_at
from messages.common import Role
from router.core.drains import Refused, Unknown

log = logging.getLogger(__name__)

Progress = Callable[[str, str], None]
"""Called with who ("prefill-0") and what ("loading the model")."""
HEAD, ROUTER_NAME = "ray", "router"
STARTS_WITHIN = 60.0
"""Seconds from a place to a process that can say who it is."""
PLACE_WITHIN = 10.0
"""Seconds in which Ray finds a place on this host."""
NAME_WITHIN = 10.0
"""Seconds in which Ray lets go of the name of an actor that is dead."""
RETIRE_WITHIN = 600.0
"""Seconds that the streams of a gateway that is replaced get to finish."""
STOP_WITHIN = 20.0
"""Seconds that actors get to end in good order before they are killed."""
POLL = 0.2
LOOK_EVERY = 0.1
"""Seconds between two looks for the router's answer."""
GONE_WITHIN = 10.0
"""Seconds from SIGKILL to a process's end, after which people are told that it is stuck."""

Needs = dict[str, float]
"""Ray's name of a resource -> how much of it."""


@dataclass(slots=True, eq=False)
class Process:
    """One actor of the cluster."""

    name: str
    handle: Any
    watch: Any
    """The call of ``Host.watch``."""
    node: Node
    """Where it runs."""
    worker: str = ""
    """That it is a rank of; empty for the router and the gateway."""
    pid: int | None = None
    """Once it serves."""
    epoch: int | None = None
    address: str = ""
    """The mailbox of a gateway or router."""
    watched: Pid | None = None
    """Of a process of this host."""
    held: bool = False
    """Of one of another host: its call of ``Host.hold`` goes on."""
    alive: bool = True
    cause: str = ""
    """Why it will end in a moment, in its own words."""
    gone: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class Incarnation:
    """A unit's processes from one start to their end."""

    unit: str
    number: int
    role: str
    processes: dict[str, Process] = field(default_factory=dict)
    cancelled: bool = False
    """Whatever is made of it from now on is killed."""


def units_of(plan: Plan, back_off: BackOff, head_back_off: BackOff) -> list[Unit]:
    """Everything that shall run, Ray's head first."""
    ranks: dict[str, list[str]] = {}
    roles: dict[str, str] = {}
    for worker in plan.workers(router=""):
        ranks.setdefault(worker.config.worker, []).append(worker.config.process)
        roles[worker.config.worker] = worker.config.role.value
    return [
        Unit(name=HEAD, kind=Kind.HEAD, processes=(HEAD,), back_off=head_back_off),
        Unit(name=ROUTER_NAME, kind=Kind.ROUTER, processes=(ROUTER_NAME,), back_off=back_off),
        *(Unit(name=name, kind=Kind.GATEWAY, processes=(name,), back_off=back_off) for name in plan.gateways),
        *(
            Unit(name=name, kind=Kind.WORKER, processes=tuple(names), back_off=back_off, role=roles[name])
            for name, names in ranks.items()
        ),
    ]


class Processes:
    """Performs the controller's wishes; see ``core/events.py`` for what they mean."""

    def __init__(self, plan: Plan, session: RaySession, post: Callable[[Event], None], progress: Progress) -> None:
        """``session`` is started."""
        self.newest: dict[str, Process] = {}
        """By name, alive or not."""
        self.urls: dict[str, str] = {}
        self.grpc_ports: dict[str, int | None] = {}
        """Of each gateway that has listened."""
        self._plan = plan
        self._session = session
        self._post = post
        self._progress = progress
        self._deaths = Deaths()
        self._lock = threading.Lock()
        self._incarnations: dict[str, Incarnation] = {}
        self._former: dict[tuple[str, int], Incarnation] = {}
        """Gateways that are replaced, and not gone yet."""
        self._router: Future[str] = Future()
        """Its address, the same for every router to come."""
        self.up = False
        """Whether all have started, so that who dies is started again."""
        self._headless = False
        """Whether our own Ray has no head, so that nothing could be started."""
        self._threads: set[threading.Thread] = set()
        ray = session.ray
        self._host: Any = ray.remote(Host)
        self._hosts = Hosts(ray)
        self._here = next(node for node in self._hosts.alive() if node.id == self._hosts.here)
        self._on_this_host = {f"node:{self._here.address}": 0.001}
        self._mark = name_of(plan.topology.name, ray.get_runtime_context().gcs_address)
        self._performers: dict[type[Any], Callable[..., None]] = {
            Start: self.start,
            Stop: self.stop,
            Retire: self.retire,
            Kill: self.kill,
            TellDied: self.tell_died,
            Drain: self.drain,
            Undrain: self.undrain,
            Flip: self.flip,
        }
        self._watch_head(1)

    # What the controller wants

    def perform(self, action: ToProcesses) -> None:
        """What comes of it is posted; nothing here takes long."""
        self._performers[type(action)](*action)

    def start(self, unit: str, number: int, role: str) -> None:
        if unit == HEAD:
            threading.Thread(target=self._restart_head, args=(number,), name="ray's head", daemon=True).start()
            return
        incarnation = Incarnation(unit, number, role)
        with self._lock:
            former = self._incarnations.get(unit)
            self._incarnations[unit] = incarnation
            if former is not None and any(process.alive for process in former.processes.values()):
                self._former[unit, former.number] = former
        self._in_background(f"start {unit}", lambda: self._start(incarnation))

    def stop(self, unit: str, number: int) -> None:
        incarnation = self._incarnations[unit]
        assert incarnation.number == number, f"{unit} is not what it was"
        self._in_background(f"stop {unit}", lambda: self._stop(incarnation))

    def retire(self, unit: str, number: int) -> None:
        former = self._former.get((unit, number))
        if former is not None:
            self._in_background(f"retire {unit}", lambda: self._retire(former))

    def kill(self, unit: str, number: int) -> None:
        incarnation = self._incarnations.get(unit)
        if incarnation is None or incarnation.number != number:
            self._post(Gone(unit, number))
            return
        self._in_background(f"kill {unit}", lambda: self._kill(incarnation))

    def tell_died(self, unit: str, number: int, detail: str) -> None:
        """Without waiting for the router's answer, for there is none."""
        incarnation, router = self._incarnations[unit], self.newest[ROUTER_NAME]
        leader = incarnation.processes.get(unit) if incarnation.number == number else None
        if leader is not None and not leader.worker:
            if leader.address:
                router.handle.call.remote("gateway_died", leader.address, detail)
        else:
            router.handle.call.remote("worker_died", unit, None if leader is None else leader.epoch, detail)

    def drain(self, worker: str, number: int) -> None:
        self._move(worker, number, "drain", lambda standing: bool(standing["drained"]))

    def undrain(self, worker: str, number: int) -> None:
        self._move(worker, number, "undrain", lambda standing: not standing["draining"], post=False)

    def flip(self, worker: str, number: int, role: str) -> None:
        def flipped(standing: Mapping[str, Any]) -> bool:
            return bool(standing["role"] == role and not standing["draining"])

        self._move(worker, number, "flip", flipped, role)

    def _move(
        self,
        worker: str,
        number: int,
        method: str,
        through: Callable[[Mapping[str, Any]], bool],
        *arguments: str,
        post: bool = True,
    ) -> None:
        """Tell the router, and wait until it says that it is ``through`` or was called off, or the worker is dead. A
        router that is new, or does not know the worker yet, is told again. ``post`` what became of it."""
        process = self.newest[worker]

        def move() -> None:
            from ray.exceptions import RayActorError, RayTaskError

            told: int | None = None  # which router
            while True:
                try:
                    standing = self._ask_router("standing", worker)
                    if standing["router"] != told:
                        self._ask_router(method, worker, *arguments)
                        told, standing = standing["router"], self._ask_router("standing", worker)
                    if standing["called_off"] or through(standing):
                        if post:
                            self._post(Moved(worker, number, standing["called_off"]))
                        return
                except RayTaskError as error:
                    if isinstance(error.cause, Refused) and not isinstance(error.cause, Unknown):
                        if post:
                            self._post(Moved(worker, number, _first_line(error.cause)))
                        return
                    told = None  # the router starts, or has to hear of the worker first
                except RayActorError:  # there is no router now; the next one has to be told
                    told = None
                if process.gone.wait(POLL):
                    return

        self._in_background(f"{method} {worker}", move)

    def _ask_router(self, method: str, *arguments: str) -> Any:
        return self._session.ray.get(self.newest[ROUTER_NAME].handle.call.remote(method, *arguments))

    def close(self) -> list[str]:
        """Stop all processes, the gateways first, which let requests finish; what does not go is killed. Returns what
        is still there, which should be nothing."""
        with self._lock:
            for incarnation in self._incarnations.values():
                incarnation.cancelled = True
        every = list(self.newest.values())
        gateways = [process for process in every if process.name in self._plan.gateways]
        workers = [process for process in every if process.name == process.worker]
        ranks = [process for process in every if process.worker not in ("", process.name)]
        router = [process for process in every if process.name == ROUTER_NAME]
        for group in (gateways, workers, ranks, router):  # rank 0 dismisses the others
            self._stop_together([process for process in group if process.alive])
        with self._lock:
            for former in self._former.values():
                every += former.processes.values()
        for process in every:
            self._end(process)
        for thread in list(self._threads):
            thread.join(STOP_WITHIN)
        self._deaths.close()
        if self._session.folder is not None:  # our own Ray takes along what there is
            return []
        self._hosts.remove_groups()
        if not self._plan.spread:
            return []
        for node in self._hosts.lost():
            self._progress("ray", f"{node} is lost: what runs there ends with its Ray")
        return self._hosts.sweep(self._mark)

    # Up

    def _start(self, incarnation: Incarnation) -> None:
        """In a thread of its own."""
        unit, number = incarnation.unit, incarnation.number
        try:
            if unit == ROUTER_NAME:
                self._start_router(incarnation)
            elif unit in self._plan.gateways:
                self._start_gateway(incarnation)
            else:
                self._start_worker(incarnation)
        except LaunchError as error:
            self._post(Failed(unit, number, str(error)))
        except Exception as error:  # whatever it is, somebody waits to hear of it
            log.exception("%s could not be started", unit)
            self._post(Failed(unit, number, f"{unit}: {_first_line(error)}"))
        else:
            self._post(Ready(unit, number))

    def _start_router(self, incarnation: Incarnation) -> None:
        cpus = self._plan.topology.router.cpus
        process = self._create_here(incarnation, ROUTER_NAME, ROUTER, cpus)
        port = urlsplit(self._router.result()).port if self._router.done() else 0
        assert port is not None
        config = replace(self._plan.router_config(port), host=self._address_on(process.node))
        started = self._configure(incarnation, {process: config}, "starting")[ROUTER_NAME]
        if not self._router.done():
            self._router.set_result(started["address"])
        self._in_background("the router's pulse", lambda: self._feel(process))

    def _feel(self, router: Process) -> None:
        """Kill the router when it stands still: a new one is there soon, and learns what it has to know. Not before all
        is up, when nothing is started again; nor while our own Ray has no head, and nothing can be."""
        within = self._plan.topology.router.liveness_timeout
        pulse, asked = Pulse(within), None
        beat = router.handle.call.options(enable_task_events=False)  # Ray's head need not hear of each
        while not router.gone.wait(LOOK_EVERY):
            if asked is None:
                asked = beat.remote("beat")
                pulse.ask(time.monotonic())
            if self._session.ray.wait([asked], timeout=0)[0]:
                if self._answered(asked):
                    pulse.beat()
                asked = None
            if pulse.still(time.monotonic()) and self.up and not self._headless:
                router.cause = f"it stood still for {within:g} s"
                self._end(router)
                return

    def _answered(self, asked: Any) -> bool:
        from ray.exceptions import RayError, RayTaskError

        try:
            return bool(self._session.ray.get(asked))
        except RayTaskError:  # it stops, and says so
            return True
        except RayError:  # it cannot be reached; of its end we hear in another way
            return False

    def _start_gateway(self, incarnation: Incarnation) -> None:
        name, cpus = incarnation.unit, self._plan.topology.gateway.cpus
        process = self._create_here(incarnation, name, GATEWAY, cpus)
        config = self._plan.gateway_config(self._router_address(incarnation), self._plan.gateways.index(name))
        config = replace(config, mailbox_host=self._address_on(process.node))
        if name in self.urls:
            port = urlsplit(self.urls[name]).port
            assert port is not None
            # The former one may listen still.
            config = replace(config, port=port, grpc_port=self.grpc_ports[name], reuse_port=True)
        started = self._configure(incarnation, {process: config}, "loading")[name]
        self.urls[name], self.grpc_ports[name] = started["http_url"], started["grpc_port"]

    def _start_worker(self, incarnation: Incarnation) -> None:
        planned = [each for each in self._plan.workers("") if each.config.worker == incarnation.unit]
        group, node = self._place(incarnation, planned)
        processes = [self._create_rank(incarnation, each, group, node) for each in planned]
        model = str(self._plan.model)
        if node.id != self._here.id:
            self._progress(incarnation.unit, f"looking for the model on {node}")
            found = processes[0].handle.locate.remote(self._plan.model_source, str(node))
            model = self._result(found, incarnation.unit)
        told: dict[str, Any] = {
            "router": self._router_address(incarnation),
            "host": self._address_on(node),
            "model": model,
            "role": Role(incarnation.role),
            "incarnation": incarnation.number,
        }
        configs = [replace(each.config, **told) for each in planned]
        if len(configs) > 1:  # the first opens its mailbox, which the others must know
            leader = self._result(processes[0].handle.prepare.remote(configs[0]), incarnation.unit)
            configs[1:] = [replace(config, leader=leader) for config in configs[1:]]
        self._configure(incarnation, dict(zip(processes, configs, strict=True)), "loading")
        self._wait_until_known(processes[0])

    def _wait_until_known(self, leader: Process) -> None:
        """Until the router counts on it: whoever is stopped after it is ready may leave everything to it."""
        from ray.exceptions import RayActorError, RayTaskError

        while True:
            try:
                standing = self._ask_router("standing", leader.worker)
                if standing["alive"] and standing["epoch"] == leader.epoch:
                    return
            except (RayTaskError, RayActorError):  # it knows nothing of it yet, or there is no router now
                pass
            if leader.gone.wait(POLL):
                raise LaunchError(f"{leader.name}: its process ended before the router knew it")

    def _place(self, incarnation: Incarnation, planned: list[PlannedWorker]) -> tuple[Any, Node]:
        """The room that Ray keeps for a worker's ranks, from their first start to the end of the cluster, or of the
        host."""
        worker, spread, placement = incarnation.unit, self._plan.spread, planned[0].pool.placement
        labels = {} if placement is None else placement.labels
        return self._hosts.place(
            worker,
            planned[0].pool.name,
            [needs(each) if spread else {**needs(each), **self._on_this_host} for each in planned],
            labels,
            within=self._plan.topology.cluster.wait_for_room if spread else PLACE_WITHIN,
            waits=lambda: self._progress(worker, f"waits for a host with room {placement or ''}".rstrip()),
            cancelled=lambda: incarnation.cancelled,
        )

    def _address_on(self, node: Node) -> str:
        """What a process there listens on."""
        return node.address if self._plan.spread else LOOPBACK

    def _create_here(self, incarnation: Incarnation, name: str, target: str, cpus: float) -> Process:
        options = {"num_cpus": cpus, "resources": self._on_this_host}
        return self._create(incarnation, name, target, options, self._here)

    def _create_rank(self, incarnation: Incarnation, planned: PlannedWorker, group: Any, node: Node) -> Process:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        wanted = dict(needs(planned))
        options = {
            "num_cpus": wanted.pop("CPU"),
            "num_gpus": wanted.pop("GPU", 0),
            "memory": wanted.pop("memory", None),
            "resources": wanted if self._plan.spread else {**wanted, **self._on_this_host},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, planned.config.rank),
        }
        return self._create(incarnation, planned.config.process, WORKER, options, node, incarnation.unit)

    def _create(
        self,
        incarnation: Incarnation,
        name: str,
        target: str,
        options: Mapping[str, Any],
        node: Node,
        worker: str = "",
    ) -> Process:
        """An actor that imports its code; by ``_watch`` its death is heard of."""
        former, actor = self.newest.get(name), name
        if former is not None and not worker:  # a former gateway may be there still, and have the name
            actor = f"{name}.{incarnation.number}"
        elif former is not None:  # Ray has to see its end too; and this process's Ray keeps the name until it kills it
            self._session.ray.wait([former.watch], timeout=NAME_WITHIN)
            self._session.ray.kill(former.handle)
        try:
            # Calls run beside each other: `watch` waits all the time, and a status is asked for while a model loads.
            actors = self._host.options(name=actor, max_restarts=0, max_concurrency=8, **options)
            handle = actors.remote(target, self._mark)
        except ValueError as error:  # the name is taken
            raise LaunchError(f"a cluster {self._plan.topology.name!r} runs on this Ray already: {error}") from error
        process = Process(name, handle, handle.watch.remote(), node, worker)
        with self._lock:
            incarnation.processes[name] = process
            self.newest[name] = process
        self._progress(name, "starting")
        if incarnation.cancelled:
            self._end(process)
            raise LaunchError(f"{name}: it was stopped while it started")
        process.watch.future().add_done_callback(lambda watch: self._last_words(incarnation, process, watch))
        return process

    def _configure(self, incarnation: Incarnation, configs: Mapping[Process, Any], what: str) -> dict[str, Any]:
        """Start what the processes are made for, side by side; what each says, by name. The first to fail ends it."""
        pids = {process: self._identify(incarnation, process) for process in configs}
        pending = {process.handle.start.remote(config): process for process, config in configs.items()}
        for process in configs:
            self._progress(process.name, what)
        started: dict[str, Any] = {}
        while pending:
            done, _ = self._session.ray.wait(list(pending), num_returns=1)
            for ref in done:
                process = pending.pop(ref)
                started[process.name] = self._result(ref, process.name)
                process.pid = pids[process]
                process.epoch = started[process.name].get("epoch")
                process.address = started[process.name].get("address", "")
                self._progress(process.name, "ready")
        return started

    def _identify(self, incarnation: Incarnation, process: Process) -> int:
        """Its pid. From now on its death is heard of, on this host without Ray."""
        checked = process.worker or not self._plan.spread  # else others may have taken its room since
        within = None if checked else STARTS_WITHIN + self._plan.topology.cluster.wait_for_room
        pid, began = self._result(process.handle.identity.remote(), process.name, within)
        if process.node.id != self._here.id:
            process.held = True
            held = process.handle.hold.remote().future()
            held.add_done_callback(lambda ended: self._died(incarnation, process, _first_line(ended.exception())))
            return int(pid)
        died = partial(self._died, incarnation, process, f"its process (pid {pid}) ended")
        process.watched = self._deaths.watch(pid, began, died)
        if process.watched is None:
            died()
            raise LaunchError(f"{process.name}: its process ended while it started")
        return int(pid)

    def _router_address(self, incarnation: Incarnation) -> str:
        while True:
            try:
                return self._router.result(POLL)
            except TimeoutError:
                if incarnation.cancelled:
                    raise LaunchError(f"{incarnation.unit}: it was stopped while it started") from None

    def _result(self, ref: Any, name: str, within: float | None = None) -> Any:
        """What the call returned; what it raised, in one line. ``within``: seconds that Ray has to find room."""
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        try:
            return self._session.ray.get(ref, timeout=within)
        except GetTimeoutError as error:
            why = f"{self._here} had no room for it within {within:g} s"
            raise LaunchError(f"{name}: {why}; `ray status` says what takes it") from error
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise LaunchError(f"{name}: {str(cause) or type(cause).__name__}") from error
        except RayActorError as error:
            raise LaunchError(f"{name}: its process ended while it started: {_first_line(error)}") from error

    # Ends

    def _died(self, incarnation: Incarnation, process: Process, cause: str) -> None:
        process.alive = False
        process.gone.set()
        self._post(Died(incarnation.unit, incarnation.number, process.name, process.cause or cause))

    def _last_words(self, incarnation: Incarnation, process: Process, watch: Future[None]) -> None:
        """``Host.watch`` has ended, in whatever way; called by Ray, in a thread of its own."""
        from ray.exceptions import RayTaskError

        error = watch.exception()
        if isinstance(error, RayTaskError):  # its loop has failed, and it says so before it ends
            process.cause = _first_line(error.cause if isinstance(error.cause, Exception) else error)
            self._end(process)
        if error is not None and process.watched is None and not process.held:
            self._died(incarnation, process, _first_line(error))

    def _end(self, process: Process) -> None:
        """Kill it, if it is alive; ``gone`` is set soon."""
        if process.watched is not None:
            self._deaths.kill(process.watched)
        elif process.alive:
            self._session.ray.kill(process.handle)

    def _stop(self, incarnation: Incarnation) -> None:
        """In a thread of its own."""
        leader, *others = incarnation.processes.values()
        self._stop_together([leader])  # it dismisses the others
        self._stop_together(others)
        self._kill(incarnation)

    def _retire(self, former: Incarnation) -> None:
        """In a thread of its own."""
        from ray.exceptions import RayError

        (process,) = former.processes.values()
        self._progress(process.name, "the former one lets its streams finish")
        try:
            finished = self._session.ray.get(process.handle.call.remote("drain", RETIRE_WITHIN))
            self._progress(
                process.name, f"the former one has {'ended' if finished else 'streams left, and is stopped'}"
            )
        except RayError as error:
            self._progress(process.name, f"the former one has died: {_first_line(error)}")
        if process.alive:
            self._stop_together([process])
        self._kill(former)
        self.newest[ROUTER_NAME].handle.call.remote("gateway_died", process.address, "it was replaced")
        with self._lock:
            del self._former[former.unit, former.number]

    def _kill(self, incarnation: Incarnation) -> None:
        """In a thread of its own."""
        incarnation.cancelled = True
        processes = list(incarnation.processes.values())
        for process in processes:
            self._end(process)
        for process in processes:
            while not process.gone.wait(GONE_WITHIN):  # its memory and devices are not free before
                why = "stuck in the kernel?" if process.watched is not None else f"{process.node} does not answer"
                self._progress(process.name, f"still there {GONE_WITHIN:.0f} s after SIGKILL: {why}")
        self._post(Gone(incarnation.unit, incarnation.number))

    def _stop_together(self, processes: Iterable[Process]) -> None:
        from ray.exceptions import RayError

        stopping = {process.handle.stop.remote(): process for process in processes}
        for process in stopping.values():
            self._progress(process.name, "stopping")
        pending, deadline = list(stopping), time.monotonic() + STOP_WITHIN
        while pending and time.monotonic() < deadline:
            done, pending = self._session.ray.wait(pending, num_returns=1, timeout=POLL)
            for ref in done:
                try:
                    self._session.ray.get(ref)
                    self._progress(stopping[ref].name, "stopped")
                except RayError as error:  # it is killed in a moment
                    self._progress(stopping[ref].name, f"did not stop in good order: {_first_line(error)}")
        for ref in pending:
            self._progress(stopping[ref].name, f"did not stop within {STOP_WITHIN:.0f} s; killed")

    def _restart_head(self, number: int) -> None:
        """In a thread of its own, which stays as long as the head does."""
        try:
            wait = self._session.restart_head()
        except (RuntimeError, OSError) as error:
            log.exception("Ray's head could not be started again")
            self._post(Failed(HEAD, number, _first_line(error)))
            return
        self._watch_head(number)
        self._post(Ready(HEAD, number))
        wait()

    def _watch_head(self, number: int) -> None:
        """Where Ray is our own."""
        pid = self._session.head_pid
        if pid is not None:

            def died() -> None:
                self._headless = True
                self._post(Died(HEAD, number, HEAD, f"its process (GCS, pid {pid}) ended"))

            self._headless = False
            if self._deaths.watch(pid, started_at(pid), died) is None:
                died()

    def _in_background(self, name: str, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            finally:
                self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.add(thread)
        thread.start()


def needs(worker: PlannedWorker) -> Needs:
    resources = worker.pool.resources
    wanted: Needs = {"CPU": resources.cpus}
    if resources.gpus:
        wanted["GPU"] = resources.gpus
    if resources.memory is not None:
        wanted["memory"] = resources.memory
    if worker.pool.placement is not None:
        wanted |= worker.pool.placement.resources
    return wanted


def amount_of(name: str, amount: float) -> str:
    if name == "memory":
        return f"{size(amount)} of memory"
    return f"{amount:.4g} {name}s" if name in ("CPU", "GPU") else f"{amount:.4g} {name}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]

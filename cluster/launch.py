"""Starts everything that a plan names, watches over it, and takes it down.

1. A Ray: our own on loopback, or the one at the given address. Is there room for everything?
2. A placement group for each worker, and all processes at once, each importing its code.
3. The router starts; then, with its address, the workers load the model, and the gateway its tokenizer.
4. When the router knows every worker and the gateway says that it is ready, the cluster is up.
5. From then on the launcher waits for deaths: a worker's is told to the router, the router's or gateway's is the end.
6. Down: the gateway lets requests finish, then workers, router, Ray; what does not go is killed.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.errors import ClusterError, LaunchError
from cluster.host import GATEWAY, ROUTER, WORKER, Host
from cluster.plan import Plan, PlannedWorker, size
from cluster.ray_session import RaySession
from runtime.worker_config import WorkerConfig

Progress = Callable[[str, str], None]
"""Called with who ("prefill-0") and what ("loading the model")."""

START_WITHIN = 600.0
"""Seconds for loading a model."""
READY_WITHIN = 30.0
"""Seconds from there to a cluster that answers."""
PLACE_WITHIN = 10.0
STOP_WITHIN = 20.0
"""Seconds that actors get to end in good order before they are killed."""
END_WITHIN = 2.0
"""Seconds from the death of one rank to the end of its worker's other ranks, which are killed then."""
POLL = 0.2

Needs = dict[str, float]
"""Ray's name of a resource -> how much of it."""


@dataclass(slots=True)
class Process:
    """One actor of the cluster."""

    name: str
    handle: Any
    watch: Any = None
    epoch: int | None = None
    pid: int | None = None
    worker: str = ""
    """That it is a rank of; empty for the router and the gateway."""
    alive: bool = True
    kill_at: float | None = None
    """When it is killed if it has not ended by itself: another rank of its worker is dead."""


@dataclass(frozen=True)
class Remains:
    """What is still there after the end; nothing, if all went well."""

    items: list[str] = field(default_factory=list)
    logs: Path | None = None
    """Where the processes' logs were kept because something went wrong."""


class Cluster:
    """``start``, then ``supervise`` for as long as it shall run, then ``stop``; or use it in a ``with`` statement."""

    def __init__(
        self,
        plan: Plan,
        progress: Progress = lambda who, what: None,
        keep_logs_in: Path | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """``check`` is called every moment while the cluster starts; what it raises ends the start."""
        self.plan = plan
        self.url = ""
        self.processes: dict[str, Process] = {}
        self._progress = progress
        self._keep_logs_in = keep_logs_in
        self._check = check
        self._namespace = f"baton-{plan.topology.name}"
        self._session = RaySession(plan.topology.cluster.address, self._namespace)
        self._groups: list[Any] = []
        self._failed = False

    @property
    def ray_folder(self) -> Path | None:
        """The private folder of our own Ray."""
        return self._session.folder

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
        self._progress("ray", "starting" if where == "local" else f"joining {where}")
        self._session.start()
        self._progress("ray", "ready")
        planned = self.plan.workers(router="")
        self._check_room(planned)
        self._create_processes(planned)

        started = self._start_actors({"router": self.plan.router_config()}, "starting")
        router = started["router"]["address"]
        configs: dict[str, Any] = {"gateway": self.plan.gateway_config(router)}
        configs.update((config.process, config) for config in self._worker_configs(router))
        started = self._start_actors(configs, "loading")
        self.url = started["gateway"]["http_url"]
        self._wait_until_ready(len({worker.config.worker for worker in planned}))

    def supervise(self, seconds: float) -> None:
        """Watch for this long; ``LaunchError`` when the cluster cannot go on."""
        watched = {process.watch: process for process in self.processes.values() if process.alive}
        done, _ = self._session.ray.wait(list(watched), num_returns=1, timeout=seconds)
        for watch in done:
            self._died(watched[watch], _reason(self._session.ray, watch))
        for process in watched.values():
            if process.alive and process.kill_at is not None and time.monotonic() > process.kill_at:
                self._session.ray.kill(process.handle)

    def call(self, name: str, method: str, *arguments: Any, within: float = 60.0) -> Any:
        """Call a method of the actor ``name`` ("router", "decode-0") and wait for its answer; for tests and tools."""
        return self._session.ray.get(self.processes[name].handle.call.remote(method, *arguments), timeout=within)

    def inspect(self) -> dict[str, dict[str, int]]:
        """``inspect()`` of every live worker and the router, each after its ``check_integrity``."""
        named = {name: p for name, p in self.processes.items() if p.alive and name in ("router", p.worker)}
        refs = {name: process.handle.call.remote("inspect") for name, process in named.items()}
        return {name: self._session.ray.get(ref, timeout=60) for name, ref in refs.items()}

    def stop(self) -> Remains:
        """Take everything down; harmless twice."""
        if self._session.ray is not None and self._session.ray.is_initialized():
            self._stop_actors()
        logs = self._keep_logs() if self._failed else None
        remains = Remains(self._session.stop(), logs)
        self.processes.clear()
        self._groups.clear()
        return remains

    # Up

    def _check_room(self, workers: list[PlannedWorker]) -> None:
        """Say what is missing before Ray waits for it."""
        ray = self._session.ray
        node = ray.get_runtime_context().get_node_id()
        free: Needs = ray._private.state.available_resources_per_node().get(node, {})
        topology = self.plan.topology
        needs: Needs = {"CPU": topology.router.cpus + topology.gateway.cpus}
        for worker in workers:
            for name, amount in _needs(worker).items():
                needs[name] = needs.get(name, 0.0) + amount
        missing = [
            f"{_amount(name, amount)} wanted, {_amount(name, free.get(name, 0.0))} free"
            for name, amount in needs.items()
            if amount > free.get(name, 0.0) + 1e-9
        ]
        if missing:
            advice = "lower replicas or resources of the pools"
            raise topology.error(("pools",), f"this machine has no room for the pools: {'; '.join(missing)}; {advice}")

    def _create_processes(self, workers: list[PlannedWorker]) -> None:
        """All actors at once; they import their code while the router starts."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        ray = self._session.ray
        here = {f"node:{ray.util.get_node_ip_address()}": 0.001}  # processes find each other on loopback
        bundles: dict[str, list[Needs]] = {}
        for worker in workers:
            bundles.setdefault(worker.config.worker, []).append({**_needs(worker), **here})
        groups = {name: placement_group(needs, strategy="STRICT_PACK", name=name) for name, needs in bundles.items()}
        self._groups = list(groups.values())
        topology = self.plan.topology
        self._create("router", ROUTER, {"num_cpus": topology.router.cpus, "resources": here})
        self._create("gateway", GATEWAY, {"num_cpus": topology.gateway.cpus, "resources": here})
        deadline = time.monotonic() + PLACE_WITHIN
        for worker in workers:
            group = groups[worker.config.worker]
            while not group.wait(1):
                self._check()
                if time.monotonic() > deadline:
                    wanted = ", ".join(_amount(name, amount) for name, amount in _needs(worker).items())
                    raise LaunchError(f"Ray found no place for {worker.config.worker} ({wanted}) on this machine")
            needs = _needs(worker)
            options = {
                "num_cpus": needs.pop("CPU"),
                "num_gpus": needs.pop("GPU", 0),
                "memory": needs.pop("memory", None),
                "resources": here,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, worker.config.rank),
            }
            self._create(worker.config.process, WORKER, options, worker.config.worker)

    def _create(self, name: str, target: str, options: Mapping[str, Any], worker: str = "") -> None:
        remote: Any = self._session.ray.remote(Host)
        try:
            # Calls run beside each other: `watch` waits all the time, and a status is asked for while a model loads.
            handle = remote.options(name=name, max_restarts=0, max_concurrency=8, **options).remote(target)
        except ValueError as error:  # the name is taken
            raise LaunchError(f"a cluster {self.plan.topology.name!r} runs on this Ray already: {error}") from error
        self.processes[name] = Process(name, handle, handle.watch.remote(), worker=worker)
        self._progress(name, "starting")

    def _worker_configs(self, router: str) -> Iterator[WorkerConfig]:
        """Every rank's; the first ranks of those that have several open their mailboxes, which the others must know."""
        configs = [worker.config for worker in self.plan.workers(router)]
        leaders = {
            config.worker: self.processes[config.process].handle.prepare.remote(config)
            for config in configs
            if config.rank == 0 and config.tensor_parallel > 1
        }
        addresses = {name: self._result(ref, name) for name, ref in leaders.items()}
        for config in configs:
            yield replace(config, leader=addresses[config.worker]) if config.rank else config

    def _start_actors(self, configs: Mapping[str, Any], what: str) -> dict[str, dict[str, Any]]:
        """Start these actors side by side; the first that fails ends it."""
        pending = {self.processes[name].handle.start.remote(config): name for name, config in configs.items()}
        for name in configs:
            self._progress(name, what)
        started: dict[str, dict[str, Any]] = {}
        deadline = time.monotonic() + START_WITHIN
        while pending:
            self._check()
            done, _ = self._session.ray.wait(list(pending), num_returns=1, timeout=POLL)
            for ref in done:
                name = pending.pop(ref)
                started[name] = self._result(ref, name)
                self.processes[name].epoch = started[name].get("epoch")
                self.processes[name].pid = started[name].get("pid")
                self._progress(name, "ready")
            if time.monotonic() > deadline:
                raise LaunchError(f"{', '.join(pending.values())} did not start within {START_WITHIN:.0f} s")
        return started

    def _wait_until_ready(self, workers: int) -> None:
        deadline = time.monotonic() + READY_WITHIN
        while self.call("router", "inspect")["workers"] < workers or not self.call("gateway", "ready"):
            self._check()
            self.supervise(POLL / 4)
            if time.monotonic() > deadline:
                known = self.call("router", "inspect")["workers"]
                raise LaunchError(
                    f"not ready after {READY_WITHIN:.0f} s: the router knows {known} of {workers} workers"
                )

    def _result(self, ref: Any, name: str) -> Any:
        """What the call returned; what it raised, in one line."""
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return self._session.ray.get(ref)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise LaunchError(f"{name}: {cause}") from error
        except RayActorError as error:
            raise LaunchError(f"{name}: its process ended while it started: {_first_line(error)}") from error

    # Running

    def _died(self, process: Process, reason: str) -> None:
        process.alive = False
        self._failed = True
        self._progress(process.name, f"died: {reason}")
        if not process.worker:
            raise LaunchError(f"the {process.name} died: {reason}; the cluster cannot go on without it")
        if process.kill_at is None:  # the first of its worker's ranks: the others end by themselves
            first = self.processes[process.worker]
            detail = reason if process is first else f"{process.name} died: {reason}"
            self.processes["router"].handle.call.remote("worker_died", process.worker, first.epoch, detail)
            for other in self.processes.values():
                if other.worker == process.worker:
                    other.kill_at = time.monotonic() + END_WITHIN
        if all(other.kill_at is not None for other in self.processes.values() if other.worker):
            raise LaunchError(f"{process.name} died, and it was the last worker: {reason}")

    # Down

    def _stop_actors(self) -> None:
        gateway = [process for name, process in self.processes.items() if name == "gateway"]
        workers = [process for name, process in self.processes.items() if name == process.worker]
        ranks = [process for name, process in self.processes.items() if process.worker not in ("", name)]
        router = [process for name, process in self.processes.items() if name == "router"]
        for group in (gateway, workers, ranks, router):  # rank 0 dismisses the others
            self._stop_together([process for process in group if process.alive])
        for process in self.processes.values():
            self._session.ray.kill(process.handle)
        if self._session.folder is None:  # our own Ray takes them along
            from ray.util.placement_group import remove_placement_group

            for placement in self._groups:
                remove_placement_group(placement)

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

    def _keep_logs(self) -> Path | None:
        logs, target = self._session.logs, self._keep_logs_in
        if logs is None or target is None or not logs.is_dir():
            return None
        shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(shutil.Error, OSError):
            shutil.copytree(logs, target, ignore=lambda _, names: [name for name in names if name.endswith(".sock")])
        return target


def _needs(worker: PlannedWorker) -> Needs:
    resources = worker.pool.resources
    needs: Needs = {"CPU": resources.cpus}
    if resources.gpus:
        needs["GPU"] = resources.gpus
    if resources.memory is not None:
        needs["memory"] = resources.memory
    return needs


def _amount(name: str, amount: float) -> str:
    return f"{size(amount)} of memory" if name == "memory" else f"{amount:.4g} {name}s"


def _reason(ray: Any, watch: Any) -> str:
    from ray.exceptions import RayError, RayTaskError

    try:
        ray.get(watch)
    except RayTaskError as error:  # its loop has failed, and it says so
        return _first_line(error.cause if isinstance(error.cause, Exception) else error)
    except RayError as error:
        return _first_line(error)
    return "it stopped by itself"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]

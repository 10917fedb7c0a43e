"""The cluster that faults are put into: its processes by name, and calls of them."""

import os
import signal
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from cluster.chaos.core.faults import Victim
from cluster.core.units import Phase
from cluster.launch import Cluster
from cluster.processes import HEAD, ROUTER_NAME
from cluster.state import started_at
from kv_transfer.transports.switched import LinkState
from messages.common import Role
from messages.ids import Epoch
from simulator.history import Incarnation, Started

ANSWER_WITHIN = 20.0


class Life(NamedTuple):
    """One incarnation of a process."""

    name: str
    pid: int
    epoch: int
    """That it drew; its pid where it draws none."""


class Processes(Protocol):
    """Of a running cluster. All may be called from any thread."""

    urls: dict[str, str]
    """Of its gateways, by name."""

    def lives(self) -> dict[str, Life]:
        """By name, all that serve now."""

    def records(self, at: float) -> list[Started]:
        """The same for a history."""

    def call(self, name: str, method: str, *arguments: Any, within: float = ANSWER_WITHIN) -> Any:
        """Call a method of the actor ``name``."""

    def losses(self, since: float) -> list[tuple[float, str, int]]:
        """When the router took which workers for lost, and their epochs; nothing where it does not answer."""

    def inspect(self) -> dict[str, dict[str, int]]:
        """Of every live worker and the router, after its ``check_integrity``."""

    def victims(self) -> list[Victim]:
        """Who may be hit."""

    def head(self) -> int | None:
        """The pid of Ray's own head; None while it does not run."""


class OwnCluster:
    """A cluster that this process has started."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.urls = dict(zip(cluster.plan.gateways, cluster.urls, strict=True))
        self._configs = {each.config.process: each.config for each in cluster.plan.workers(router="")}

    def lives(self) -> dict[str, Life]:
        running = {status.name for status in self._cluster.status() if status.phase is Phase.RUNNING}
        return {
            name: Life(name, each.pid, each.pid if each.epoch is None else each.epoch)
            for name, each in self._cluster.processes.items()
            if each.alive and each.pid is not None and (each.worker or name) in running
        }

    def records(self, at: float) -> list[Started]:
        return [self._record(at, life) for life in self.lives().values()]

    def _record(self, at: float, life: Life) -> Started:
        process, config = Incarnation(life.name, Epoch(life.epoch)), self._configs.get(life.name)
        if config is None:
            return Started(at, process, life.name.partition("-")[0])
        return Started(at, process, "worker", config.role, config.num_blocks, config.block_size, config.max_num_seqs)

    def call(self, name: str, method: str, *arguments: Any, within: float = ANSWER_WITHIN) -> Any:
        return self._cluster.call(name, method, *arguments, within=within)

    def losses(self, since: float) -> list[tuple[float, str, int]]:
        from ray.exceptions import GetTimeoutError, RayActorError

        if ROUTER_NAME not in self.lives():  # another one is starting
            return []
        try:
            found: list[tuple[float, str, int]] = self.call("router", "losses", since, within=5.0)
            return found
        except (RayActorError, GetTimeoutError):  # it is dead, or stands still
            return []

    def inspect(self) -> dict[str, dict[str, int]]:
        return self._cluster.inspect()

    def victims(self) -> list[Victim]:
        alive = self.lives()
        workers = [
            Victim(name, config.role.value, usable=name in alive, restarts=True, sends=config.role is Role.PREFILL)
            for name, config in self._configs.items()
        ]
        others = [(ROUTER_NAME, "router")]
        if len(self._cluster.plan.gateways) > 1:  # its clients go on at another one
            others += [(name, "gateway") for name in self._cluster.plan.gateways]
        if self._cluster.ray_folder is not None:
            workers.append(Victim(HEAD, "head", usable=self.head() is not None, restarts=True))
        # The one router is let alone while nothing can be started: all would wait for that, and no more be shown.
        startable = self._phase(HEAD) is Phase.RUNNING
        return [*workers, *(Victim(name, role, usable=name in alive, restarts=startable) for name, role in others)]

    def head(self) -> int | None:
        return self._cluster.head_pid if self._phase(HEAD) is Phase.RUNNING else None

    def _phase(self, unit: str) -> Phase:
        return next(status.phase for status in self._cluster.status() if status.name == unit)


class Gone(Exception):
    """The process that was to be hit is not there any more."""


def kill(pid: int) -> None:
    _signal(pid, signal.SIGKILL)


def stop(pid: int) -> Callable[[], None]:
    """SIGSTOP; what it returns wakes that very process up again, if it is still there."""
    started = started_at(pid)
    _signal(pid, signal.SIGSTOP)

    def wake() -> None:
        if started is not None and started_at(pid) == started:
            os.kill(pid, signal.SIGCONT)

    return wake


def set_links(processes: Processes, name: str, state: LinkState) -> None:
    """``Gone`` where the process died meanwhile."""
    from ray.exceptions import RayActorError

    try:
        processes.call(name, "inject", state)
    except RayActorError as error:
        raise Gone(name) from error


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError as error:
        raise Gone(str(pid)) from error

"""The hosts of the Ray that a cluster runs on: which there are, a place on one of them, and what was left there.

Ray keeps the room: a placement group for each worker. On which host it is to be is ours to say once, at the worker's
first start (``core/placing.py``), and no more than a wish: a host that is full by then, or lost later, Ray replaces by
any other that is meant, one that an autoscaler makes for it included.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster import marks
from cluster.core.placing import Needs, Node, choose, lacking, matches, total
from cluster.errors import LaunchError

log = logging.getLogger(__name__)

LOOK_EVERY = 1
"""Seconds, and whole ones: of fractions Ray makes 0, and takes a group that is there for one that is not."""
TELL_AFTER = 2.0
"""Seconds in which Ray answers where there is room."""
SWEEP_WITHIN = 30.0
"""Seconds that Ray gets to start a process on each host, and that one to find what is left there."""
NAMED = 8
"""Hosts that a complaint names."""


class Hosts:
    """Used by several threads."""

    def __init__(self, ray: Any) -> None:
        """``ray`` is connected."""
        self._ray = ray
        self.here: str = ray.get_runtime_context().get_node_id()
        self.known: dict[str, Node] = {}
        """All that were ever seen, alive or not, by id."""
        self._groups: dict[str, Any] = {}
        """Of Ray's placement groups: that of each worker."""
        self._at: dict[str, str] = {}
        """Worker -> host, or the one that was wished for."""
        self._pools: dict[str, str] = {}
        self._lock = threading.Lock()

    def alive(self) -> list[Node]:
        """Those that Ray takes for alive, this one first."""
        with self._lock:
            return self._look()

    def _look(self) -> list[Node]:
        free = self._ray._private.state.available_resources_per_node()
        nodes = [
            Node(
                id=each["NodeID"],
                address=each["NodeManagerAddress"],
                name=each["NodeManagerHostname"],
                labels=each["Labels"],
                free=free.get(each["NodeID"], {}),
            )
            for each in self._ray.nodes()
            if each["Alive"]
        ]
        self.known.update({node.id: node for node in nodes})
        return sorted(nodes, key=lambda node: (node.id != self.here, node.address))

    def place(
        self,
        worker: str,
        pool: str,
        bundles: Sequence[Needs],
        labels: Mapping[str, str],
        *,
        within: float,
        waits: Callable[[], None],
        cancelled: Callable[[], bool],
    ) -> tuple[Any, Node]:
        """Room for a worker's ranks, one bundle each, and its host. It stays the worker's: Ray itself finds other room
        where that host is lost, on any that has ``labels``, so what was asked for once is never asked for again.
        ``waits`` is called where there is no room at once; ``LaunchError`` where there is none ``within`` seconds, or
        when it is ``cancelled``: then it is waited for still, and there at the next call perhaps."""
        group = self._group(worker, pool, bundles, labels)
        began, told = time.monotonic(), False
        while (node := self._host_of(worker, group)) is None:
            if cancelled():
                raise LaunchError(f"{worker}: it was stopped while it waited for room")
            waited = time.monotonic() - began
            if waited > within:
                raise LaunchError(self._no_room(worker, bundles, labels))
            if waited > TELL_AFTER and not told:
                told = True
                waits()
            group.wait(LOOK_EVERY)
        with self._lock:
            self._at[worker] = node.id
        return group, node

    def _group(self, worker: str, pool: str, bundles: Sequence[Needs], labels: Mapping[str, str]) -> Any:
        """The worker's own, from its first start to the end of the cluster."""
        from ray.util.placement_group import placement_group

        with self._lock:
            if worker in self._groups:
                return self._groups[worker]
            neighbours = Counter(self._at[each] for each in self._at if self._pools[each] == pool)
            wish = choose(self._look(), total(bundles), labels, neighbours)
            group = self._groups[worker] = placement_group(
                [dict(bundle) for bundle in bundles],
                strategy="STRICT_PACK",
                name=worker,
                bundle_label_selector=[dict(labels)] * len(bundles) if labels else None,
                _soft_target_node_id=None if wish is None else wish.id,
            )
            self._pools[worker] = pool
            if wish is not None:
                self._at[worker] = wish.id
            return group

    def remove_groups(self) -> None:
        """Give all room back."""
        from ray.util.placement_group import remove_placement_group

        with self._lock:
            groups = [*self._groups.values()]
            self._groups.clear()
        for group in groups:
            remove_placement_group(group)

    def lost(self) -> list[Node]:
        """Hosts that were there, and have not come back."""
        there = {node.address for node in self.alive()}
        return [node for node in self.known.values() if node.address not in there]

    def sweep(self, mark: str) -> list[str]:
        """Have every host end what is left there of the cluster of that ``mark``; what could not be ended, or asked."""
        from ray.exceptions import GetTimeoutError, RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = self.alive()
        task: Any = self._ray.remote(marks.sweep)
        asked = []
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node.id, soft=False)
            asked.append((node, task.options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(mark)))
        left, until = [], time.monotonic() + SWEEP_WITHIN
        for node, answer in asked:
            try:
                found, stay = self._ray.get(answer, timeout=max(0.1, until - time.monotonic()))
            except (RayError, GetTimeoutError) as error:
                log.warning("%s was not looked through", node, exc_info=error)
                left.append(f"what may be left on {node}, which does not answer: `ray stop` there ends it")
                continue
            if found:
                log.warning("%s: ended what was left there: %s", node, found)
            left += [f"process {pid} on {node}" for pid in stay]
        return left

    def _host_of(self, worker: str, group: Any) -> Node | None:
        """None while Ray has no room for it, or only on a host that is gone."""
        from ray.util.placement_group import placement_group_table

        table = placement_group_table(group)
        if table.get("state", "REMOVED") == "REMOVED":
            with self._lock:
                self._groups.pop(worker, None)
            raise LaunchError(f"{worker}: somebody has removed the placement group that kept room for it")
        if table["state"] != "CREATED":
            return None
        (found,) = set(table["bundles_to_node_id"].values())
        return next((node for node in self.alive() if node.id == found), None)

    def _no_room(self, worker: str, bundles: Sequence[Needs], labels: Mapping[str, str]) -> str:
        wanted = total(bundles)
        meant = ", ".join(f"{key}={value}" for key, value in labels.items())
        needs = ", ".join(f"{amount:.4g} {name}" for name, amount in wanted.items())
        text = f"no host has room for {worker} ({needs}{f', labelled {meant}' if meant else ''})"
        whys = []
        for node in self.alive():
            if not matches(node.labels, labels):
                own = {key: node.labels[key] for key in labels if key in node.labels}
                has = ", ".join(f"{key}={value}" for key, value in own.items())
                whys.append(f"{node} is labelled {has}" if has else f"{node} has no such label")
            else:
                short = lacking(node, wanted)
                has = ", ".join(f"{amount:.4g} {name} free" for name, amount in short.items())
                whys.append(f"{node} has {has or 'room by now'}")
        more = f", and {len(whys) - NAMED} others" if len(whys) > NAMED else ""
        advice = "add hosts, correct the labels, or lower replicas or resources of the pool"
        return f"{text}: {'; '.join(whys[:NAMED])}{more}; {advice}"

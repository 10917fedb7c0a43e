"""What the processes of a history could have done at each moment: who was able, and for how much.

Not what anybody believed: it follows the faults themselves. So it tells whether an error, a silence or a verdict on
a worker had a reason.
"""

from collections import deque
from dataclasses import dataclass

from messages.common import Role
from messages.ids import RequestId
from simulator.history import Asked, Draining, Frozen, Healed, Incarnation, Injected, Killed, Started, Stopped, Thawed
from simulator.history import Cut as CutLink

NEVER = float("inf")

Misfortune = Started | Stopped | Killed | Frozen | Thawed | CutLink | Healed | Injected | Draining


@dataclass(slots=True)
class Process:
    """One incarnation."""

    started: Started
    up: bool = True
    frozen: bool = False
    draining: bool = False

    @property
    def turns(self) -> bool:
        return self.up and not self.frozen


class Health:
    """Fed with what befalls the processes, and with the load."""

    def __init__(self, spare: float, needed: tuple[Role, ...]) -> None:
        """``spare``: up to which part of the decode workers' room the load leaves capacity to spare. ``needed``: the
        roles without any of which nobody serves."""
        self._spare = spare
        self._gone = dict.fromkeys(needed, NEVER)
        """Since when a role has no able worker, while router and gateway are there to say so."""
        self._processes: dict[str, Process] = {}
        """By name: the incarnation that came last."""
        self._turning: dict[str, float] = {}
        """By name: since when it turns; ``NEVER`` while it does not."""
        self._cuts: dict[tuple[str, str], None] = {}
        self._needs: dict[RequestId, int] = {}
        self._kept: deque[tuple[float, RequestId]] = deque()
        self._tokens = self._room = self._seqs = 0
        self.troubles = 0
        """Faults that have begun."""
        self.troubled_at = -NEVER
        """When the last one began or ended; in the future where it is known when it will end."""
        self.capable_since = NEVER
        """Since when every role has an able worker, and they can be reached; ``NEVER`` while it is not so."""
        self.spare_since = NEVER
        """Since when there is room for more besides."""
        self.router_since = NEVER
        """Since when a router turns."""

    # What comes

    def take(self, record: Misfortune) -> None:
        match record:
            case Started(process=process):
                self._start(record, process)
            case Stopped(process=process) | Killed(process=process):
                self._set(process, up=False)
            case Frozen(process=process):
                self._set(process, frozen=True)
            case Thawed(process=process):
                self._set(process, frozen=False)
            case Draining(process=process):
                self._set(process, draining=True)
            case CutLink():
                self._cuts[record.source, record.target] = None
            case Healed():
                self._cuts.pop((record.source, record.target), None)
            case Injected():
                pass
        self.troubles += isinstance(record, Killed | Frozen | CutLink | Injected | Draining)
        until = record.until if isinstance(record, Injected) and record.until is not None else record.at
        self.troubled_at = max(self.troubled_at, until)
        self._judge(record.at)

    def open(self, asked: Asked) -> None:
        need = len(asked.prompt) + asked.params.max_tokens
        while self._kept and self._kept[0][0] <= asked.at:
            self.close(self._kept.popleft()[1], asked.at)
        self._needs[asked.request] = need
        self._tokens += need
        self._weigh(asked.at)

    def close(self, request: RequestId, at: float) -> None:
        """Nobody wants anything of it any more; harmless where that is known."""
        self._tokens -= self._needs.pop(request, 0)
        self._weigh(at)

    def keep(self, request: RequestId, until: float) -> None:
        """Its gateway died with it: it takes its room till then, for another one may adopt it."""
        self._kept.append((until, request))

    # What is asked

    @property
    def gone_since(self) -> float:
        """Since when a role that is needed is gone, without a moment in which it was back."""
        return min(self._gone.values())

    @property
    def active(self) -> int:
        """Faults that last: processes that stand still, pairs that are cut."""
        cut = {frozenset(link) for link in self._cuts}
        return len(cut) + sum(process.up and process.frozen for process in self._processes.values())

    def turning_since(self, name: str) -> float:
        """``NEVER`` while it does not; a process that nobody has told of is taken for granted."""
        return self._turning.get(name, -NEVER)

    def get(self, process: Incarnation) -> Process | None:
        found = self._processes.get(process.name)
        return found if found is not None and found.started.process == process else None

    def kind(self, name: str) -> str:
        """``worker``, ``router`` or ``gateway``; empty for a name that nobody has had."""
        process = self._processes.get(name)
        return process.started.kind if process is not None else ""

    def now(self, name: str) -> Incarnation | None:
        """Who has that name."""
        process = self._processes.get(name)
        return process.started.process if process is not None else None

    def is_cut(self, name: str, kind: str) -> bool:
        """Whether something between the process and one of ``kind`` is cut, one way or both."""
        return any(name in link and kind in map(self.kind, link) for link in self._cuts)

    # Within

    def _start(self, started: Started, process: Incarnation) -> None:
        known = self.get(process)
        if known is None:
            self._processes[process.name] = Process(started)
        else:  # told another role
            known.started, known.draining = started, False

    def _set(self, process: Incarnation, **changes: bool) -> None:
        known = self.get(process)
        if known is not None:
            for name, value in changes.items():
                setattr(known, name, value)

    def _judge(self, at: float) -> None:
        for name, process in self._processes.items():
            self._turning[name] = _since(process.turns, self._turning.get(name, NEVER), at)
        router, gateway = self._turns("router"), self._turns("gateway")
        prefill, decode = self._able(Role.PREFILL), self._able(Role.DECODE)
        workers = any(process.started.kind == "worker" for process in self._processes.values())
        there = router and gateway and workers and not self._split()
        pairs = any(
            (one.started.process.name, other.started.process.name) not in self._cuts
            and (other.started.process.name, one.started.process.name) not in self._cuts
            for one in prefill
            for other in decode
        )
        capable = there and pairs
        self.router_since = _since(router, self.router_since, at)
        self.capable_since = _since(capable, self.capable_since, at)
        self._room = sum(each.started.num_blocks * each.started.block_size for each in decode)
        self._seqs = sum(each.started.max_num_seqs for each in decode)
        self._weigh(at)
        able = {Role.PREFILL: prefill, Role.DECODE: decode}
        self._gone = {role: _since(there and not able[role], since, at) for role, since in self._gone.items()}

    def _turns(self, kind: str) -> bool:
        """Whether one of that kind turns; a history that names none takes them for granted."""
        known = [process for process in self._processes.values() if process.started.kind == kind]
        return not known or any(process.turns for process in known)

    def _split(self) -> bool:
        """Whether a gateway and the router do not hear each other."""
        return any({self.kind(one), self.kind(other)} == {"gateway", "router"} for one, other in self._cuts)

    def _able(self, role: Role) -> list[Process]:
        return [
            process
            for name, process in self._processes.items()
            if process.started.role in (role, Role.COLOCATED)
            and process.turns
            and not process.draining
            and not self.is_cut(name, "router")
            and not self.is_cut(name, "gateway")
        ]

    def _weigh(self, at: float) -> None:
        """The load against what the able decode workers can hold."""
        room = self._tokens <= self._spare * self._room and len(self._needs) <= self._spare * self._seqs
        self.spare_since = _since(room and self.capable_since < NEVER, self.spare_since, at)


def _since(holds: bool, since: float, at: float) -> float:
    if not holds:
        return NEVER
    return at if since == NEVER else since

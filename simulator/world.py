"""One run: the processes of a plan, its clients and its misfortunes, from the first message until all is let go."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any

from gateway.core import dispatch
from gateway.core.session import SessionTimeouts
from messages.codec import decoder_for
from messages.common import Role
from messages.ids import Address, Epoch, WorkerId
from router.core import machine as router_machine
from router.core.drains import Drain, Flip, Undrain
from router.core.machine import RouterSettings
from runtime.core.disaggregation import Disaggregation
from simulator.clock import Clock
from simulator.faults import Kind, Misfortune
from simulator.gateways import Client, GatewayProcess, Wish
from simulator.history import (
    Anything,
    Asked,
    Crashed,
    Cut,
    Draining,
    Frozen,
    Got,
    Healed,
    History,
    Idle,
    Injected,
    Killed,
    Left,
    Started,
    Stopped,
    Thawed,
)
from simulator.model import BLOCK, EOS, Truth
from simulator.network import Network
from simulator.plan import ROUTER, Plan
from simulator.processes import NEVER, Process, RouterProcess, WorkerProcess
from simulator.rank import Rank
from simulator.worker import KEY, WorkerShape
from worker.core import machine as worker_machine

ROUTER_MISSED, ROUTER_STARTS = 2.1, 1.2
"""Seconds for which a router stands still before it is killed, and until there is another one."""
CONNECT_AGAIN = 0.2
"""Seconds after which a client tries again whose connection was refused."""
LOOK_EVERY = 0.25
"""Seconds from one look at all that is held to the next, once no client waits."""
GIVES_UP = 20.0
"""Seconds after which an operator lets a worker go on that cannot be drained."""
PATIENCE = 40.0
"""Seconds after the last misfortune within which every client has its end."""
LETS_GO = 4.0
"""Seconds within which everything is let go, where nothing was lost."""
LONGEST_LEASE = 160.0
"""Seconds after which nothing is held for anybody who is not there."""


@dataclass(slots=True)
class Run:
    """What came of a plan."""

    plan: Plan
    history: History
    seconds: float
    """Virtual ones."""
    events: int
    hits: dict[int, int]
    """How often each misfortune, by number, has struck something; 0 where it came to nothing."""


class World:
    """Is the ``Surface`` of its processes."""

    def __init__(self, plan: Plan, *, story: bool = False, looks: float = NEVER) -> None:
        """``story``: have the history tell of each message. ``looks``: seconds between two looks at who holds what."""
        self.plan = plan
        self.clock = Clock()
        self.history: History = []
        self.rng = Random(f"{plan.seed} run")
        self.truth = Truth()
        self.one_sided, self.pace = plan.topology.one_sided, plan.topology.pace
        self.ranks: dict[str, Rank] = {}
        self.network = Network(self.clock, self.rng, self.history, story=story)
        self.network.watch = self._watch if any(each.message for each in plan.misfortunes) else None
        self.processes: dict[str, Process] = {}
        self.clients: list[Client] = []
        self._numbers: dict[str, int] = {}
        """Of each worker's newest process, among those of its name."""
        self._epochs = Random(f"{plan.seed} epochs")
        self._ports = 1000
        self._headless_until = 0.0
        self._headless_by = 0
        self._trouble_until = 0.0
        self._hits: Counter[int] = Counter()
        self._links: list[Misfortune] = []
        """Those that have begun whose strikes the network counts."""
        self._armed: list[Misfortune] = []
        """Wait for their messages."""
        self._seen: dict[int, int] = {}
        self._waits: dict[str, int] = {}
        """Processes that will be started again, and how often."""
        self._looks = looks
        self._router_at = self._address(ROUTER)
        self._start_router()
        for name in plan.topology.gateway_names:
            self._start_gateway(name)
        for name in plan.topology.workers:
            self._start_worker(name)

    # What processes see

    def worker(self, name: str) -> WorkerProcess | None:
        process = self.processes.get(name)
        return process if isinstance(process, WorkerProcess) and process.alive else None

    def tell(self, record: Anything) -> None:
        self.history.append(record)

    # Processes

    def _address(self, name: str) -> Address:
        self._ports += 1
        return Address(f"tcp://{name}:{self._ports}")

    def _epoch(self) -> Epoch:
        return Epoch(self._epochs.getrandbits(62))

    def _origin(self) -> float:
        """No two processes' clocks began together."""
        return self._epochs.uniform(0.0, 7200.0)

    def _start_router(self) -> None:
        settings = RouterSettings(
            cluster_key=KEY, block_size=BLOCK, disaggregation=Disaggregation(policy=self.plan.topology.policy)
        )
        router = RouterProcess(self, ROUTER, self._epoch(), self._router_at, self._origin(), settings)
        self._started(router, "router", router_machine.Messages)

    def _start_gateway(self, name: str) -> None:
        gateway = GatewayProcess(
            self, name, self._epoch(), self._address(name), self._origin(), router=self._router_at,
            timeouts=SessionTimeouts(),
        )  # fmt: skip
        self._started(gateway, "gateway", dispatch.Messages)

    def _start_worker(self, name: str) -> None:
        topology = self.plan.topology
        role = topology.workers[name]
        shape = WorkerShape(
            role=role,
            num_blocks=topology.num_blocks[role],
            router=self._router_at,
            ranks=topology.ranks[role],
            rule=Disaggregation(policy=topology.policy),
            eos=frozenset({EOS}),
        )
        self._numbers[name] = number = self._numbers.get(name, 0) + 1
        worker = WorkerProcess(self, name, self._epoch(), self._address(name), self._origin(), shape, number)
        self._started(worker, "worker", worker_machine.Messages)

    def _started(self, process: Process, kind: str, messages: tuple[Any, ...]) -> None:
        name = process.name
        self.processes[name] = process
        if self.plan.topology.bytes_on_the_wire:
            self.network.codecs[name] = decoder_for(*messages)
        if isinstance(process, WorkerProcess):
            process.tell_started()
        else:
            self.tell(Started(self.clock.now, process.incarnation, kind))

    def _start_again(self, name: str) -> None:
        if self._headless():
            self.clock.at(self._headless_until, partial(self._start_again, name))
            return
        self._waits[name] -= 1
        if self.processes[name].alive:
            return
        if name == ROUTER:
            self._start_router()
        elif name in self.plan.topology.workers:
            self._start_worker(name)
        else:
            self._start_gateway(name)

    # Clients

    def _ask(self, wish: Wish) -> None:
        gateway = self.processes[wish.gateway]
        assert isinstance(gateway, GatewayProcess)
        if not gateway.alive:
            self.clock.at(self.clock.now + CONNECT_AGAIN, partial(self._ask, wish))
            return
        client = Client(wish, self.tell, lambda: self.clock.now, wish.gateway)
        if wish.resumable:
            client.broken = self._read_on
        self.clients.append(client)
        self.tell(Asked(self.clock.now, wish.request, wish.prompt, wish.params, wish.stop, wish.tenant, wish.gateway))
        if wish.leaves_at is not None:
            self.clock.at(wish.leaves_at, partial(self._leave, client))
        if wish.leaves_after is not None:
            client.tell = partial(self._read, client)
        if wish.rests is not None:
            self.clock.at(wish.rests[0], client.rest)
            self.clock.at(wish.rests[1], client.go_on)
        gateway.ask(client)

    def _read(self, client: Client, record: Anything) -> None:
        """Of one that leaves when it has enough."""
        self.tell(record)
        if isinstance(record, Got) and client.tokens >= (client.wish.leaves_after or 0):
            self.clock.at(self.clock.now, partial(self._leave, client))

    def _leave(self, client: Client) -> None:
        if client.over:
            return
        client.over = True
        self.tell(Left(self.clock.now, client.wish.request))
        gateway = self.processes[client.gateway]
        if isinstance(gateway, GatewayProcess):
            gateway.gone(client.wish.request)

    def _read_on(self, client: Client) -> None:
        """Its connection broke: it goes to whichever gateway answers."""
        self.clock.at(self.clock.now + CONNECT_AGAIN, partial(self._attach, client))

    def _attach(self, client: Client) -> None:
        gateways = [each for each in self._there() if isinstance(each, GatewayProcess)]
        if client.over:
            return
        if not gateways:
            self._read_on(client)
            return
        gateways[0].attach(client)

    # Misfortunes

    def _watch(self, source: str, target: str, message: Any) -> None:
        """A message is sent: those that wait for it come with it."""
        if not self._armed:
            return
        kind = type(message).__name__
        for each in [each for each in self._armed if each.message == kind]:
            self._seen[each.number] = self._seen.get(each.number, 0) + 1
            if self._seen[each.number] == each.nth:
                self._armed.remove(each)
                found = each.at_message(source, target)
                if each.kind in WEATHER and each.kind is not Kind.FAIL and not each.after:
                    self._befall(found)  # it strikes this very message
                else:
                    self.clock.at(self.clock.now + each.after, partial(self._befall, found))

    def _befall(self, what: Misfortune) -> None:
        self._trouble_until = max(self._trouble_until, self.clock.now + (what.seconds if what.seconds < NEVER else 0.0))
        match what.kind:
            case Kind.KILL | Kind.STOP | Kind.FREEZE | Kind.FAIL | Kind.FILL:
                self._befall_process(what, self.processes[what.target])
            case Kind.DRAIN | Kind.RETIRE | Kind.FLIP:
                self._order(what)
            case Kind.ROLL:
                self._waits[ROLLING] = self._waits.get(ROLLING, 0) + 1
                self._roll(what, [*self.plan.topology.workers])
            case Kind.HEADLESS:
                self._headless_until = max(self._headless_until, self.clock.now + what.seconds)
                self._headless_by = what.number
            case Kind.CUT:
                self._cut(what)
            case _:
                self._befall_link(what)

    def _befall_process(self, what: Misfortune, process: Process) -> None:
        now = self.clock.now
        if not process.alive:
            return
        match what.kind:
            case Kind.KILL:
                self._hits[what.number] += 1
                self.tell(Killed(now, process.incarnation))
                process.die(comes_back=process.name == ROUTER)
                self._gone(what, process)
            case Kind.STOP if isinstance(process, WorkerProcess) and not process.frozen:
                self._hits[what.number] += 1
                self.tell(Stopped(now, process.incarnation))
                process.leave()
                self._gone(what, process)
            case Kind.FREEZE if not process.frozen:
                self._hits[what.number] += 1
                self.tell(Frozen(now, process.incarnation))
                process.freeze()
                self.clock.at(now + what.seconds, partial(self._thaw, process))
                if process.name == ROUTER and what.seconds > ROUTER_MISSED:
                    self.clock.at(now + ROUTER_MISSED, partial(self._replace, what, process))
            case Kind.FAIL if isinstance(process, WorkerProcess):
                until = now + what.seconds
                self.tell(Injected(now, what.kind, process.name, until))
                process.failing = what.chance
                self._links.append(what)
                self.clock.at(until, partial(self._recover, process))
            case Kind.FILL if isinstance(process, WorkerProcess) and process.fill(what.chance):
                self._hits[what.number] += 1
                self.tell(Injected(now, what.kind, process.name, now + what.seconds))
                self.clock.at(now + what.seconds, partial(self._empty, process))

    def _replace(self, what: Misfortune, router: Process) -> None:
        """As the launcher does with a router that stands still, unless it could start no other."""
        if not router.alive or not router.frozen:
            return
        if self._headless():
            self.clock.at(self._headless_until, partial(self._replace, what, router))
        else:
            self.tell(Killed(self.clock.now, router.incarnation))
            router.die(comes_back=True)
            self._gone(replace(what, seconds=ROUTER_STARTS), router)

    def _gone(self, what: Misfortune, process: Process) -> None:
        now, name = self.clock.now, process.name
        if what.notice is not None and process.name != ROUTER:
            self.clock.at(now + what.notice, partial(self._notice, process))
        if what.seconds < NEVER:
            self._waits[name] = self._waits.get(name, 0) + 1
            self.clock.at(now + what.seconds, partial(self._start_again, name))

    def _order(self, what: Misfortune) -> None:
        """An operator wants something of the router, which has to be there."""
        router, process = self._router(), self.processes[what.target]
        if not isinstance(process, WorkerProcess) or not process.alive:
            return
        worker = WorkerId(process.name)
        order: Drain | Flip = Drain(worker)
        if what.kind is Kind.FLIP:
            order = Flip(worker, Role.DECODE if process.role is Role.PREFILL else Role.PREFILL)
        if router is None or not router.obey(order):
            return
        self._hits[what.number] += 1
        self.tell(Draining(self.clock.now, process.incarnation))
        if what.kind is Kind.DRAIN and what.seconds < NEVER:
            self.clock.at(self.clock.now + what.seconds, partial(self._need_again, process))
        elif what.kind is Kind.RETIRE:
            self._waits[process.name] = self._waits.get(process.name, 0) + 1
            self._retire(what, process, self.clock.now + GIVES_UP)

    def _router(self) -> RouterProcess | None:
        """If it can be told something."""
        router = self.processes[ROUTER]
        return router if isinstance(router, RouterProcess) and router.alive and not router.frozen else None

    def _need_again(self, process: WorkerProcess) -> None:
        router = self._router()
        if not process.alive:
            return
        if router is None:
            self.clock.at(self.clock.now + LOOK_EVERY, partial(self._need_again, process))
        elif router.obey(Undrain(WorkerId(process.name))):
            process.tell_started()

    def _retire(self, what: Misfortune, process: WorkerProcess, until: float) -> None:
        """Stop it when nothing is left there."""
        now, router = self.clock.now, self._router()
        if not process.alive or now >= until:
            self._waits[process.name] -= 1
            self._need_again(process)
        elif router is not None and not process.frozen and router.is_drained(process.incarnation):
            self.tell(Stopped(now, process.incarnation))
            process.leave()
            self.clock.at(now + what.seconds, partial(self._start_again, process.name))
        else:
            self.clock.at(now + LOOK_EVERY, partial(self._retire, what, process, until))

    def _roll(self, what: Misfortune, names: list[str]) -> None:
        """Restart these workers, one after the other, and then the router."""
        router = self.processes[ROUTER]
        if names:
            self._order(replace(what, kind=Kind.RETIRE, target=names[0]))
            self._roll_on(what, names)
            return
        self._waits[ROLLING] -= 1
        self._befall_process(replace(what, kind=Kind.KILL), router)

    def _roll_on(self, what: Misfortune, names: list[str]) -> None:
        """When the first of ``names`` is there again."""
        if self._waits.get(names[0]):
            self.clock.at(self.clock.now + LOOK_EVERY, partial(self._roll_on, what, names))
        else:
            self._roll(what, names[1:])

    def _headless(self) -> bool:
        """Whether Ray's head is wanted and is not there."""
        headless = self.clock.now < self._headless_until
        if headless:
            self._hits[self._headless_by] += 1
        return headless

    def _empty(self, process: WorkerProcess) -> None:
        if process.alive:
            process.empty()

    def _notice(self, process: Process) -> None:
        """The supervisor's word, where it is there."""
        router = self.processes[ROUTER]
        if self._headless() or not isinstance(router, RouterProcess):
            return
        if isinstance(process, WorkerProcess):
            router.worker_died(WorkerId(process.name), process.epoch, "its process has ended")
        else:
            router.gateway_died(process.address, "its process has ended")

    def _thaw(self, process: Process) -> None:
        if process.alive:
            self.tell(Thawed(self.clock.now, process.incarnation))
            process.thaw()

    def _recover(self, process: WorkerProcess) -> None:
        process.failing = 0.0

    def _cut(self, what: Misfortune) -> None:
        now, link = self.clock.now, (what.source, what.target)
        weather = self.network.link(*link).weather
        weather.cut += 1
        weather.holds = what.holds
        self._links.append(what)
        if weather.cut == 1:
            self.tell(Cut(now, *link))
        self.clock.at(now + what.seconds, partial(self._heal, link))

    def _heal(self, link: tuple[str, str]) -> None:
        if self.network.link(*link).weather.cut == 1:
            self.tell(Healed(self.clock.now, *link))
        self.network.heal(*link)

    def _befall_link(self, what: Misfortune) -> None:
        now, field = self.clock.now, WEATHER[what.kind]
        weather = self.network.link(what.source, what.target).weather
        setattr(weather, field, what.chance)
        self._links.append(what)
        until = now + what.seconds
        self.tell(Injected(now, what.kind, what.source, until, "", what.target))
        calm = 1.0 if what.kind is Kind.SLOW else 0.0
        self.clock.at(until, partial(setattr, weather, field, calm))

    # The run

    def run(self) -> Run:
        """Until every client has its end and everything is let go, or it is plain that it will not be."""
        try:
            self._go()
        except Exception as error:  # noqa: BLE001 - whatever a core raises is a finding
            self.tell(Crashed(self.clock.now, *_what(error)))
        struck = self.network.struck
        for what in self._links:
            self._hits[what.number] += struck[WEATHER[what.kind], what.source, what.target]
        hits = {each.number: self._hits[each.number] for each in self.plan.misfortunes}
        return Run(self.plan, self.history, self.clock.now, self.clock.events, hits)

    def _go(self) -> None:
        for wish in self.plan.wishes:
            self.clock.at(wish.at, partial(self._ask, wish))
        for what in self.plan.misfortunes:
            self.clock.at(what.at, partial(self._arm if what.message else self._befall, what))
        if self._looks < NEVER:
            self._look_around()
        times = [wish.at for wish in self.plan.wishes] + [what.at for what in self.plan.misfortunes]
        begin = max(times, default=0.0)
        self.clock.run(begin)
        while self.clock.now < max(begin, self._trouble_until) + PATIENCE and not self._rests():
            self.clock.run(self.clock.now + LOOK_EVERY)
        self._let_go()

    def _arm(self, what: Misfortune) -> None:
        self._armed.append(what)

    def _rests(self) -> bool:
        """No client waits, and nothing goes wrong any more."""
        over = len(self.clients) == len(self.plan.wishes) and all(client.over for client in self.clients)
        return over and self.clock.now >= self._trouble_until and not any(self._waits.values())

    def _let_go(self) -> None:
        """What nobody wants is let go of soon; what was lost on its way, when the longest lease is over."""
        self._armed.clear()
        until = self.clock.now + LETS_GO
        while self._held() and self.clock.now < until:
            self.clock.run(self.clock.now + LOOK_EVERY)
        until = self.clock.now + (LONGEST_LEASE if self.plan.misfortunes else 0.0)
        while self._held() and self.clock.now < until:
            self.clock.run(self.clock.now + LOOK_EVERY)
        self.tell(Idle(self.clock.now))
        self._look()
        for process in self._there():
            if isinstance(process, RouterProcess):
                process.router.check_integrity()
            elif isinstance(process, WorkerProcess) and process.worker.plan is None:
                process.worker.machine.check_integrity()
                process.worker.check()

    def _look_around(self) -> None:
        self._look()
        self.clock.at(self.clock.now + self._looks, self._look_around)

    def _look(self) -> None:
        """For the history: who holds what."""
        for process in self._there():
            if isinstance(process, WorkerProcess | RouterProcess) and not process.frozen:
                self.tell(process.look())

    def _there(self) -> Iterable[Process]:
        return [process for process in self.processes.values() if process.alive]

    def _held(self) -> bool:
        """Whether anything is held for anybody."""
        for process in self._there():
            if isinstance(process, WorkerProcess):
                seen = process.worker.machine.inspect()
                if any(seen.get(what, 0) for what in HOLDINGS):
                    return True
            elif isinstance(process, RouterProcess):
                seen = process.router.inspect()
                if seen["placed"] or seen["waiting"]:
                    return True
            elif isinstance(process, GatewayProcess) and process.relays:
                return True
        return False


ROLLING = "a rolling restart"
HOLDINGS = ("held", "legs", "handoffs", "runs", "reservations", "deliveries")
WEATHER = {
    Kind.LOSE: "loss", Kind.REPEAT: "twice", Kind.REORDER: "astray", Kind.DELAY: "delay", Kind.SLOW: "slowness",
    Kind.CORRUPT: "flip", Kind.SWAP: "swap", Kind.STALE: "stale", Kind.CUT: "cut", Kind.FAIL: "fail",
}  # fmt: skip
"""What strikes, by the network's name of it."""


def _what(error: Exception) -> tuple[str, str]:
    """In which process, which exception, and where it came from."""
    trace, place, process = error.__traceback__, "", ""
    while trace is not None:
        code, own = trace.tb_frame.f_code, trace.tb_frame.f_locals.get("self")
        process = own.name if isinstance(own, Process) else process
        place = f"{code.co_qualname} ({code.co_filename.rpartition('/')[2]}:{trace.tb_lineno})"
        trace = trace.tb_next
    return process, f"{type(error).__name__} in {place}: {error}"

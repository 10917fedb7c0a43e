"""What a run is, drawn from its seed before it begins: the processes, what clients want, what goes wrong."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random

from messages.common import Role
from messages.sampling import SamplingParams, seed_of_sample
from runtime.core.disaggregation import Policy
from simulator.faults import RECEIVER, SENDER, Kind, Misfortune
from simulator.gateways import Wish
from simulator.model import VOCABULARY, Truth

NEVER = float("inf")
ROUTER = "router"
PACES = (1.0, 1.0, 1.0, 5.0, 5.0, 20.0)
"""At the slowest a step of one token takes 0.17 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Which processes there are."""

    workers: dict[str, Role]
    gateways: int = 1
    ranks: dict[Role, int]
    num_blocks: dict[Role, int]
    one_sided: bool = True
    policy: Policy = Policy.ALWAYS
    pace: float = 1.0
    """Times as long as else for a step."""
    bytes_on_the_wire: bool = False
    """Whether messages become bytes on their way."""

    def of(self, role: Role) -> list[str]:
        return [name for name, each in self.workers.items() if each is role]

    @property
    def gateway_names(self) -> list[str]:
        return [f"gateway-{number}" for number in range(self.gateways)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    seed: int
    """Of what is left to chance during the run."""
    topology: Topology
    wishes: tuple[Wish, ...]
    misfortunes: tuple[Misfortune, ...] = ()

    def without(self, wishes: Iterable[int] = (), misfortunes: Iterable[int] = ()) -> "Plan":
        """The same but for these, by number."""
        no_wishes, no_misfortunes = {*wishes}, {*misfortunes}
        return replace(
            self,
            wishes=tuple(wish for wish in self.wishes if wish.number not in no_wishes),
            misfortunes=tuple(each for each in self.misfortunes if each.number not in no_misfortunes),
        )


def draw(seed: int, *, faults: bool, orders: bool = False) -> Plan:
    """The plan of a seed. ``orders``: the operator drains workers, or has them take the other role."""
    topology = _topology(Random(f"{seed} topology"))
    wishes = _wishes(Random(f"{seed} wishes"), topology)
    misfortunes = _misfortunes(Random(f"{seed} misfortunes"), topology, wishes) if faults else ()
    if orders:
        misfortunes += _orders(Random(f"{seed} orders"), topology, wishes, len(misfortunes))
        # There has to be something that is worth moving.
        wishes = tuple(replace(wish, params=replace(wish.params, max_tokens=LONG)) for wish in wishes)
    return Plan(seed=seed, topology=topology, wishes=wishes, misfortunes=misfortunes)


def _topology(rng: Random) -> Topology:
    if rng.random() < 0.15:
        workers = {f"colocated-{number}": Role.COLOCATED for number in range(rng.randint(1, 3))}
    else:
        workers = {f"prefill-{number}": Role.PREFILL for number in range(rng.randint(1, 2))}
        workers |= {f"decode-{number}": Role.DECODE for number in range(rng.randint(1, 3))}
    return Topology(
        workers=workers,
        gateways=rng.choice((1, 1, 2)),
        ranks={role: rng.choice((1, 1, 2)) for role in Role},
        num_blocks={role: rng.choice((16, 24, 40, 60)) for role in Role},
        one_sided=rng.random() < 0.5,
        policy=rng.choice((Policy.ALWAYS, Policy.ALWAYS, Policy.AUTO, Policy.NEVER)),
        bytes_on_the_wire=rng.random() < 0.1,
        pace=rng.choice(PACES),
    )


def _wishes(rng: Random, topology: Topology) -> tuple[Wish, ...]:
    wishes: list[Wish] = []
    truth = Truth()
    most, busy = rng.choice((3, 4, 6, 8)), rng.choice((0.2, 1.0, 1.5))
    while len(wishes) < most:
        at, gateway = 0.2 + rng.random() * busy, rng.choice(topology.gateway_names)
        length, common = rng.randint(1, 22), rng.randrange(2)
        own = rng.randint(0, length)
        prompt = tuple((common + 3 * place) % VOCABULARY for place in range(own))
        prompt += tuple(rng.randrange(VOCABULARY) for _ in range(length - own))
        params = SamplingParams(
            max_tokens=rng.choice((1, 3, 8, 14, 20, 24)),
            seed=rng.getrandbits(31),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=(rng.randrange(VOCABULARY),) if rng.random() < 0.1 else (),
            logprobs=rng.choice((None, None, 0, 2)),
            prompt_logprobs=1 if rng.random() < 0.1 else None,
        )
        stop: tuple[str, ...] = ()
        if rng.random() < 0.3:  # one that comes
            text = truth.transcript(prompt, params).text
            begin = rng.randrange(max(1, len(text)))
            stop = tuple(filter(None, (text[begin : begin + rng.randint(1, 4)], "ja")))
        leaves = rng.random()
        rests, resumable = rng.random() < 0.1, rng.random() < 0.4
        pause = at + rng.random() * 0.3
        for sample in range(rng.choice((1, 1, 1, 2, 3))):
            wishes.append(
                Wish(
                    number=len(wishes),
                    at=at,
                    gateway=gateway,
                    prompt=prompt,
                    params=replace(params, seed=seed_of_sample(params.seed, sample)),
                    stop=stop,
                    tenant=rng.choice(("default", "default", "other")) if not sample else wishes[-1].tenant,
                    leaves_at=at + rng.random() * 0.4 * topology.pace if leaves < 0.08 else None,
                    leaves_after=rng.randint(0, 6) if 0.08 <= leaves < 0.16 else None,
                    resumable=resumable,
                    rests=(pause, pause + rng.random() * 2) if rests else None,
                )
            )
    return tuple(wishes)


LONG = 24
"""Tokens: as many as fit any pool with any prompt."""
LINKS = (Kind.CUT, Kind.CUT, Kind.LOSE, Kind.LOSE, Kind.REPEAT, Kind.REORDER, Kind.DELAY)
FORTH = ("OpenTransfer", "EndTransfer", "TransferClosed", "TailYielded")
BACK = ("TransferAccepted", "TransferAcked", "BlocksWanted", "CancelTransfer", "TailOffered")
"""Messages that go the way of the KV, and against it."""
KV = (Kind.SLOW, Kind.CORRUPT, Kind.SWAP, Kind.SWAP, Kind.STALE)
PROCESSES = (
    *[Kind.KILL] * 6, Kind.FREEZE, Kind.FREEZE, Kind.STOP, Kind.FAIL, Kind.DRAIN, Kind.RETIRE,
    Kind.FLIP, Kind.FILL,
)  # fmt: skip
WORKER, GATEWAY = "worker", "gateway"
MOMENTS = {
    "PlacementWanted": (GATEWAY, ROUTER), "Finished": (GATEWAY, ROUTER), "Holding": (GATEWAY, ROUTER),
    "Placed": (ROUTER, GATEWAY), "WorkerLost": (ROUTER, GATEWAY), "MoveWanted": (ROUTER, GATEWAY),
    "Prefill": (GATEWAY, WORKER), "Generate": (GATEWAY, WORKER), "EndAck": (GATEWAY, WORKER),
    "Abort": (GATEWAY, WORKER), "TokensWanted": (GATEWAY, WORKER),
    "TokenBatch": (WORKER, GATEWAY), "AttemptFailed": (WORKER, GATEWAY), "Adopted": (WORKER, GATEWAY),
    "OpenTransfer": (WORKER, WORKER), "EndTransfer": (WORKER, WORKER), "TransferClosed": (WORKER, WORKER),
    "TailYielded": (WORKER, WORKER), "TransferAccepted": (WORKER, WORKER), "TransferAcked": (WORKER, WORKER),
    "BlocksWanted": (WORKER, WORKER), "CancelTransfer": (WORKER, WORKER), "TailOffered": (WORKER, WORKER),
    "Register": (WORKER, ROUTER), "Leaving": (WORKER, ROUTER),
    "PeerLost": (ROUTER, WORKER), "RoleWanted": (ROUTER, WORKER), "Adopt": (ROUTER, WORKER),
}  # fmt: skip
"""Messages with which a misfortune may come: who sends them, and to whom."""
CARRY = ("Prefill", "OpenTransfer", "TransferAccepted", "EndTransfer", "BlocksWanted")
"""With which KV is on its way."""
OFTEN = ("Placed", "Prefill", "Generate", "OpenTransfer", "TransferAccepted", "EndTransfer", *["TokenBatch"] * 6)
"""Those of nearly every request, behind which most of what it costs to lose somebody lies."""
FOLLOW = {
    Kind.KILL: ("Abort", "WorkerLost", "PeerLost", "PlacementWanted", "AttemptFailed", "TokenBatch", "Placed"),
    Kind.FREEZE: (
        "Abort",
        "WorkerLost",
        "PeerLost",
        "PlacementWanted",
        "CancelTransfer",
        "TransferClosed",
        "TokenBatch",
    ),
    Kind.FAIL: ("Abort", "AttemptFailed", "PlacementWanted"),
    Kind.CUT: ("Abort", "BlocksWanted", "AttemptFailed", "CancelTransfer"),
    Kind.CORRUPT: ("BlocksWanted", "EndTransfer", "Abort"),
    Kind.DRAIN: ("RoleWanted", "MoveWanted", "Prefill", "OpenTransfer", "TokenBatch"),
    Kind.FLIP: ("RoleWanted", "MoveWanted", "Register", "Prefill"),
}
"""What is sent because of a misfortune: a second one may come with it."""


def _misfortunes(rng: Random, topology: Topology, wishes: tuple[Wish, ...]) -> tuple[Misfortune, ...]:
    """When somebody wants something; the second of two may follow from the first."""
    misfortunes: list[Misfortune] = []
    for _ in range(rng.choice((2, 3, 3, 4, 4, 5, 6))):
        before = misfortunes[-1] if misfortunes else None
        follows = FOLLOW.get(before.kind) if before is not None else None
        number, kind = len(misfortunes), rng.choice(_kinds(topology))
        if before is not None and before.kind is Kind.KILL and rng.random() < 0.2:
            misfortunes.append(_unheard(rng, before, number))
            continue
        if before is not None and follows is not None and rng.random() < 0.4:
            what = Misfortune(
                number=number, kind=kind, at=before.at, message=rng.choice(follows), nth=rng.randint(1, 2)
            )
        elif rng.random() < 0.8:
            message = rng.choice(CARRY if kind in KV else OFTEN if rng.random() < 0.9 else [*MOMENTS])
            most = sum(wish.params.max_tokens for wish in wishes) // 3 if message == "TokenBatch" else len(wishes) // 2
            what = Misfortune(number=number, kind=kind, message=message, nth=rng.randint(1, max(1, most)))
        else:
            at = rng.choice(wishes).at + rng.random() * 0.1 * topology.pace
            what = Misfortune(number=number, kind=kind, at=at)
        misfortunes.append(_misfortune(rng, topology, what))
    return tuple(misfortunes)


def _unheard(rng: Random, before: Misfortune, number: int) -> Misfortune:
    """What is said because of a misfortune is not heard."""
    return Misfortune(
        number=number, kind=Kind.LOSE, at=before.at, source=SENDER, target=RECEIVER, seconds=rng.choice((0.01, 0.3)),
        message=rng.choice(("Abort", "Abort", "WorkerLost", "PeerLost", "PlacementWanted")), nth=rng.randint(1, 3),
    )  # fmt: skip


def _kinds(topology: Topology) -> list[Kind]:
    kinds = [*PROCESSES, *PROCESSES, *LINKS, Kind.HEADLESS, Kind.ROLL]
    return [*kinds, *KV, *KV] if topology.of(Role.PREFILL) and topology.policy is not Policy.NEVER else kinds


def _orders(rng: Random, topology: Topology, wishes: tuple[Wish, ...], number: int) -> tuple[Misfortune, ...]:
    """What the operator wants. ``number``: of the first one."""
    moments = [rng.choice(wishes).at + rng.expovariate(10.0) for _ in range(rng.randint(1, 2))]
    kinds = (Kind.DRAIN,) if topology.of(Role.COLOCATED) else (Kind.DRAIN, Kind.DRAIN, Kind.FLIP)
    return tuple(
        Misfortune(number=place, kind=rng.choice(kinds), at=at, target=rng.choice([*topology.workers]), seconds=NEVER)
        for place, at in enumerate(moments, number)
    )


def _misfortune(rng: Random, topology: Topology, what: Misfortune) -> Misfortune:
    """The rest of what there is to say of it."""
    kind, message = what.kind, what.message
    workers = [*topology.workers]
    if kind in PROCESSES:
        others = [ROUTER, *topology.gateway_names] if kind in (Kind.KILL, Kind.FREEZE) else []
        targets = [*workers, *workers, *others]
        if message and rng.random() < 0.8:
            both = zip((SENDER, RECEIVER), MOMENTS[message], strict=True)
            sides = [(side, whose) for side, whose in both if others or whose is WORKER]
            targets = [side for side, whose in sides for _ in range(3 if whose is WORKER else 1)] or targets
        return _on_process(rng, what, rng.choice(targets), topology.pace)
    if kind in KV:
        source, target = rng.choice(topology.of(Role.PREFILL)), rng.choice(topology.of(Role.DECODE))
        if message in FORTH:
            source, target = SENDER, RECEIVER
        elif message in BACK:
            source, target = RECEIVER, SENDER
        chance = rng.choice((10.0, 100.0, 1000.0)) if kind is Kind.SLOW else rng.choice((0.3, 0.5, 1.0))
        return replace(what, source=source, target=target, chance=chance, seconds=rng.random() * 1.5)
    if kind in LINKS:
        source, target = rng.sample([*workers, *workers, ROUTER, *topology.gateway_names], 2)
        if message and rng.random() < 0.8:
            source, target = SENDER, RECEIVER
        elif source == target:
            target = ROUTER
        seconds = rng.choice((0.05, 0.5, 1.0, 3.0)) * rng.random()
        chances = (0.1, 0.3, 0.5) if source is not SENDER else (0.3, 0.5, 1.0)
        return replace(
            what,
            source=source,
            target=target,
            seconds=seconds,
            holds=rng.random() < 0.5,
            chance=rng.choice(chances),
        )
    return replace(what, seconds=rng.random() * (4 if kind is Kind.HEADLESS else 1))


def _on_process(rng: Random, what: Misfortune, target: str, pace: float) -> Misfortune:
    match what.kind:
        case Kind.FREEZE:
            seconds = rng.choice((0.05, 0.5, 3.0, 5.0, 8.0)) * rng.random()
        case Kind.FAIL | Kind.FILL:
            seconds = rng.random() * pace
        case _:
            seconds = rng.choice((0.2, 1.0, 3.0)) * (0.5 + rng.random())
    notice = rng.choice((0.03, 0.1, 0.3, 2.0, None))
    chance = rng.choice((0.5, 0.8, 1.0) if what.kind is Kind.FILL else (0.1, 0.3, 0.6))
    return replace(what, target=target, seconds=seconds, notice=notice, chance=chance)

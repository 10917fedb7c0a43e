"""What a run is, drawn from its seed before it begins: the processes, what clients want, what goes wrong."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random

from messages.common import Role
from messages.sampling import SamplingParams, seed_of_sample
from runtime.core.disaggregation import Policy
from simulator.faults import Kind, Misfortune
from simulator.gateways import Wish
from simulator.model import VOCABULARY, Truth

NEVER = float("inf")
ROUTER = "router"


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Which processes there are."""

    workers: dict[str, Role]
    gateways: int = 1
    ranks: dict[Role, int]
    num_blocks: dict[Role, int]
    one_sided: bool = True
    policy: Policy = Policy.ALWAYS
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
        num_blocks={role: rng.choice((12, 16, 24, 40)) for role in Role},
        one_sided=rng.random() < 0.5,
        policy=rng.choice((Policy.ALWAYS, Policy.ALWAYS, Policy.AUTO, Policy.NEVER)),
        bytes_on_the_wire=rng.random() < 0.1,
    )


def _wishes(rng: Random, topology: Topology) -> tuple[Wish, ...]:
    wishes: list[Wish] = []
    truth = Truth()
    most, busy = rng.choice((2, 3, 5, 8)), rng.choice((0.2, 1.0, 1.5))
    while len(wishes) < most:
        at, gateway = 0.2 + rng.random() * busy, rng.choice(topology.gateway_names)
        length, common = rng.randint(1, 22), rng.randrange(2)
        own = rng.randint(0, length)
        prompt = tuple((common + 3 * place) % VOCABULARY for place in range(own))
        prompt += tuple(rng.randrange(VOCABULARY) for _ in range(length - own))
        params = SamplingParams(
            max_tokens=rng.choice((1, 2, 3, 6, 10, 14)),
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
        rests = rng.random() < 0.1
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
                    leaves_at=at + rng.random() * 0.4 if leaves < 0.08 else None,
                    leaves_after=rng.randint(0, 6) if 0.08 <= leaves < 0.14 else None,
                    rests=(pause, pause + rng.random() * 2) if rests else None,
                )
            )
    return tuple(wishes)


LONG = 24
"""Tokens: as many as fit any pool with any prompt."""
LINKS = (Kind.CUT, Kind.CUT, Kind.LOSE, Kind.REPEAT, Kind.REORDER, Kind.DELAY)
KV = (Kind.SLOW, Kind.CORRUPT, Kind.SWAP, Kind.STALE)
PROCESSES = (
    Kind.KILL, Kind.KILL, Kind.KILL, Kind.FREEZE, Kind.FREEZE, Kind.STOP, Kind.FAIL, Kind.DRAIN, Kind.RETIRE, Kind.FLIP
)  # fmt: skip
MOMENTS = (
    "PlacementWanted", "Placed", "Prefill", "Generate", "OpenTransfer", "TransferAccepted", "EndTransfer",
    "TransferAcked", "BlocksWanted", "TokenBatch", "Prefilled", "Finished", "EndAck", "TailOffered", "TailYielded",
)  # fmt: skip
"""Messages with which a misfortune may come."""


def _misfortunes(rng: Random, topology: Topology, wishes: tuple[Wish, ...]) -> tuple[Misfortune, ...]:
    """When somebody wants something, most likely."""
    moments = [rng.choice(wishes).at + rng.expovariate(5.0) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 6)))]
    return tuple(_misfortune(rng, topology, number, at) for number, at in enumerate(moments))


def _orders(rng: Random, topology: Topology, wishes: tuple[Wish, ...], number: int) -> tuple[Misfortune, ...]:
    """What the operator wants. ``number``: of the first one."""
    moments = [rng.choice(wishes).at + rng.expovariate(10.0) for _ in range(rng.randint(1, 2))]
    kinds = (Kind.DRAIN,) if topology.of(Role.COLOCATED) else (Kind.DRAIN, Kind.DRAIN, Kind.FLIP)
    return tuple(
        Misfortune(number=place, kind=rng.choice(kinds), at=at, target=rng.choice([*topology.workers]), seconds=NEVER)
        for place, at in enumerate(moments, number)
    )


def _misfortune(rng: Random, topology: Topology, number: int, at: float) -> Misfortune:
    kinds = [*PROCESSES, *PROCESSES, *LINKS, Kind.HEADLESS]
    if len(topology.of(Role.PREFILL)):
        kinds += KV
    kind = rng.choice(kinds)
    message = rng.choice(MOMENTS) if rng.random() < 0.4 else ""
    if message:
        at = max(0.0, at - 0.3)
    what = Misfortune(number=number, kind=kind, at=at, message=message, nth=rng.randint(1, 4))
    workers = [*topology.workers]
    if kind in PROCESSES:
        others = [ROUTER, *topology.gateway_names] if kind in (Kind.KILL, Kind.FREEZE) else []
        return _on_process(rng, what, rng.choice([*workers, *workers, *others]))
    if kind in KV:
        source, target = rng.choice(topology.of(Role.PREFILL)), rng.choice(topology.of(Role.DECODE))
        chance = rng.choice((10.0, 100.0, 1000.0)) if kind is Kind.SLOW else rng.choice((0.1, 0.5, 1.0))
        return replace(what, source=source, target=target, chance=chance, seconds=rng.random() * 1.5)
    if kind in LINKS:
        source, target = rng.sample([*workers, *workers, ROUTER, *topology.gateway_names], 2)
        if source == target:
            target = ROUTER
        seconds = rng.choice((0.05, 0.5, 1.0, 3.0)) * rng.random()
        return replace(
            what,
            source=source,
            target=target,
            seconds=seconds,
            holds=rng.random() < 0.5,
            chance=rng.choice((0.1, 0.3, 0.5)),
        )
    return replace(what, seconds=rng.random() * 4)


def _on_process(rng: Random, what: Misfortune, target: str) -> Misfortune:
    match what.kind:
        case Kind.FREEZE:
            seconds = rng.choice((0.05, 0.5, 1.5, 3.0, 7.0)) * rng.random()
        case Kind.FAIL:
            seconds = rng.random()
        case _:
            seconds = rng.choice((0.2, 1.0, 3.0)) * (0.5 + rng.random())
    notice = rng.choice((0.03, 0.1, 0.3, 2.0, None))
    return replace(what, target=target, seconds=seconds, notice=notice, chance=rng.choice((0.1, 0.3)))

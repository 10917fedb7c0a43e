"""Directed runs: a few requests, and something that goes wrong just when it should."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from messages.common import Role
from messages.ids import RequestId
from messages.sampling import SamplingParams
from simulator.campaign import answer_to, bounds_of
from simulator.checker import check
from simulator.faults import Kind, Misfortune
from simulator.gateways import Wish
from simulator.history import AttemptPlaced, Blocks, DeclaredLost, Ended, Failed, Got, History, Killed, Started
from simulator.plan import NEVER, Plan, Topology
from simulator.verdict import Verdict
from simulator.world import World

LOOKS = 0.05
"""Seconds from one look at the pools to the next."""
COMPUTE = 0.5
"""Seconds in which any prompt of these tests is computed, those before it in its queue counted in."""
LONG = tuple(7 * place % 50 for place in range(22))
"""A prompt of three chunks and six blocks."""


def topology(prefill: int = 2, decode: int = 2, **others: Any) -> Topology:
    """Enough of everything, but for what is said."""
    workers = {f"prefill-{number}": Role.PREFILL for number in range(prefill)}
    workers |= {f"decode-{number}": Role.DECODE for number in range(decode)}
    sizes = {"ranks": dict.fromkeys(Role, 1), "num_blocks": dict.fromkeys(Role, 60)}
    return Topology(workers=workers, **(sizes | others))


def colocated(count: int = 2, **others: Any) -> Topology:
    sizes = {"ranks": dict.fromkeys(Role, 1), "num_blocks": dict.fromkeys(Role, 60)}
    return Topology(workers={f"colocated-{number}": Role.COLOCATED for number in range(count)}, **(sizes | others))


def wish(number: int = 0, at: float = 1.5, prompt: tuple[int, ...] = LONG, tokens: int = 8, **others: Any) -> Wish:
    """A request that comes when the cluster has settled."""
    params = SamplingParams(max_tokens=tokens, seed=11 + number, ignore_eos=True, logprobs=0)
    return Wish(**({"number": number, "at": at, "gateway": "gateway-0", "prompt": prompt, "params": params} | others))


class Story:
    """What came of a directed run."""

    def __init__(
        self, wishes: Iterable[Wish], misfortunes: Iterable[Misfortune], of: Topology | None = None,
        seed: int = 1,
    ) -> None:  # fmt: skip
        """Of each kind of misfortune at least one has to strike something."""
        numbered = tuple(replace(each, number=number) for number, each in enumerate(misfortunes))
        plan = Plan(
            seed=seed, topology=of if of is not None else topology(), wishes=tuple(wishes), misfortunes=numbered
        )
        run = World(plan, story=True, looks=LOOKS).run()
        self.history: History = run.history
        missed = {each.kind for each in numbered} - {each.kind for each in numbered if run.hits[each.number]}
        assert not missed, f"these have struck nothing: {missed}"
        self.verdict: Verdict = check(self.history, answer_to, replace(bounds_of(plan), compute=COMPUTE))

    def all(self, kind: type[Any]) -> list[Any]:
        return [record for record in self.history if isinstance(record, kind)]

    def clean(self) -> "Story":
        """Nothing was broken; the story is there where it was."""
        assert self.verdict.clean, "\n".join(map(str, self.verdict.violations[:3]))
        return self

    def resumed(self, times: int = 1) -> "Story":
        """It was hit, and went on so many times."""
        assert self.verdict.resumes == times, f"{self.verdict.resumes} resumes"
        return self

    def killed_at(self) -> float:
        return float(self.all(Killed)[-1].at)

    def next_token_after(self, at: float, request: RequestId | None = None) -> float:
        """Seconds to it."""
        return float(next(
            record.at - at for record in self.all(Got)
            if record.at > at and record.tokens and request in (None, record.request)
        ))  # fmt: skip

    def lost_after(self, at: float) -> float:
        """Seconds to the router's word that a worker is lost."""
        return float(next(record.at - at for record in self.all(DeclaredLost) if record.at > at))

    def pauses(self) -> list[float]:
        """Seconds between any two tokens of a request that follow each other."""
        last: dict[RequestId, float] = {}
        pauses = [0.0]
        for record in self.all(Got):
            pauses.append(record.at - last.get(record.request, record.at))
            last[record.request] = record.at
        return pauses

    def names(self, kind: str) -> list[str]:
        """Of the processes of a kind."""
        return [record.process.name for record in self.all(Started) if record.kind == kind]

    def ended(self) -> int:
        return len(self.all(Ended))

    def failures(self) -> list[Failed]:
        return self.all(Failed)

    def placed(self, attempt: int = 1, request: RequestId | None = None) -> AttemptPlaced:
        return next(
            record for record in self.all(AttemptPlaced)
            if record.attempt == attempt and request in (None, record.request)
        )  # fmt: skip

    def held(self, name: str, at: float) -> int:
        """Blocks that are held there, at the first look after ``at``; or at the last, where all was over before."""
        looks = [record for record in self.all(Blocks) if record.worker.name == name]
        return next((record.held for record in looks if record.at >= at), looks[-1].held)


def first_pair(of: Topology | None = None) -> tuple[str, str]:
    """The workers that the first request of a run is placed on: prefill, or decode where it does all, and decode."""
    placed = Story([wish()], [], of).placed()
    decode = placed.decode.name
    return decode if placed.prefill is None else placed.prefill.name, decode


def kill(target: str, message: str = "", nth: int = 1, **others: Any) -> Misfortune:
    """Ray tells after a tenth of a second; nobody takes its place."""
    return _misfortune(Kind.KILL, message, nth, {"target": target, "seconds": NEVER, "notice": 0.1} | others)


def freeze(target: str, seconds: float, message: str = "", nth: int = 1, **others: Any) -> Misfortune:
    return _misfortune(Kind.FREEZE, message, nth, {"target": target, "seconds": seconds} | others)


def link(
    kind: Kind, source: str, target: str, seconds: float, message: str = "", nth: int = 1, **others: Any
) -> Misfortune:
    return _misfortune(kind, message, nth, {"source": source, "target": target, "seconds": seconds} | others)


def _misfortune(kind: Kind, message: str, nth: int, others: dict[str, Any]) -> Misfortune:
    return Misfortune(**({"number": 0, "kind": kind, "at": 1.4, "message": message, "nth": nth} | others))

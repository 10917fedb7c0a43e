"""Many runs: which seeds break a promise, and how little of such a run is enough to break it."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import lru_cache
from multiprocessing import get_context
from typing import NamedTuple

from messages.common import Role
from runtime.core.disaggregation import Policy
from simulator.checker import check
from simulator.faults import Kind
from simulator.history import Asked
from simulator.model import VOCABULARY, Truth
from simulator.plan import Plan, draw
from simulator.verdict import Answer, Bounds, Fault, Times, Verdict
from simulator.worker import MAX_MODEL_LEN
from simulator.world import Run, World

SEEDS_AT_ONCE = 50
"""That one process runs before it says what came of them."""
TRIES = 300
"""Runs that shrinking one may take."""
BOUNDS = Bounds(compute=1.0)
"""Its workers are slow, and wait for each other's prompts."""
COMPUTE = {1.0: 1.0, 5.0: 3.0, 20.0: 10.0}
"""The same by their pace."""
LOOKS = 0.25
"""Seconds from one look at the pools and the ledger to the next."""
PROMPT = 0.5
"""Seconds: a supervisor that takes longer to tell of a death, or never does, leaves it to missed reports."""


class Judged(NamedTuple):
    run: Run
    verdict: Verdict


@dataclass(slots=True)
class Tally:
    """What came of some seeds."""

    seeds: int = 0
    requests: int = 0
    faults: int = 0
    resumes: int = 0
    resumed: int = 0
    """Seeds in which at least one attempt followed another one."""
    hits: Counter[Kind] = field(default_factory=Counter)
    """Misfortunes that struck something, by their kind."""
    broken: dict[int, list[str]] = field(default_factory=dict)
    """What the seeds that broke something broke."""
    times: Times = field(default_factory=Times)

    def add(self, other: "Tally") -> None:
        self.seeds += other.seeds
        self.requests += other.requests
        self.faults += other.faults
        self.resumes += other.resumes
        self.resumed += other.resumed
        self.hits.update(other.hits)
        self.broken.update(other.broken)
        self.times.add(other.times)


def judged(plan: Plan, *, story: bool = False) -> Judged:
    """Run a plan, and look at what happened."""
    run = World(plan, story=story, looks=LOOKS).run()
    return Judged(run, check(run.history, answer_to, bounds_of(plan)))


def bounds_of(plan: Plan) -> Bounds:
    """What the run of a plan is held to: where nobody tells of a death it is found as a hang is."""
    bounds = replace(BOUNDS, compute=COMPUTE[plan.topology.pace]) if plan.topology.pace > 1 else BOUNDS
    if plan.topology.policy is not Policy.ALWAYS:
        bounds = replace(bounds, needed=(Role.DECODE,))  # which computes prompts where no prefill worker can
    kinds = {each.kind for each in plan.misfortunes}
    late = any(each.notice is None or each.notice > PROMPT for each in plan.misfortunes if each.kind is Kind.KILL)
    if Kind.KILL not in kinds or not (late or Kind.HEADLESS in kinds):
        return bounds
    hang = BOUNDS.resume[Fault.HANG]
    resume = {fault: max(bound, hang) for fault, bound in BOUNDS.resume.items()}
    return replace(bounds, detect_crash=BOUNDS.detect_hang, resume=resume)


@lru_cache(1)
def _truth() -> Truth:
    return Truth()


def answer_to(asked: Asked) -> Answer:
    """What the run without faults answers."""
    longest = len(asked.prompt) + asked.params.max_tokens
    if longest > MAX_MODEL_LEN or max(asked.prompt) >= VOCABULARY:
        return Answer(None, None, status=400)
    tokens, logprobs, text, reason = _truth().transcript(asked.prompt, asked.params, asked.stop)
    return Answer(tokens, reason, None if asked.params.logprobs is None else logprobs, text)


def run_seeds(first: int, count: int, *, faults: bool) -> Tally:
    """Run the seeds one after the other."""
    tally = Tally()
    for seed in range(first, first + count):
        plan = draw(seed, faults=faults)
        run, verdict = judged(plan)
        tally.seeds += 1
        tally.requests += verdict.requests
        tally.faults += verdict.faults
        tally.resumes += verdict.resumes
        tally.resumed += verdict.resumes > 0
        tally.hits.update(each.kind for each in plan.misfortunes if run.hits[each.number])
        if replace(bounds_of(plan), needed=BOUNDS.needed) == BOUNDS:  # else found as a hang is, or computed slowly
            tally.times.add(verdict.times)
        if not verdict.clean:
            tally.broken[seed] = [str(each) for each in verdict.violations]
    return tally


def campaign(first: int, count: int, *, faults: bool, jobs: int) -> Iterator[Tally]:
    """The same in ``jobs`` processes; what came of some seeds at a time."""
    parts = [(begin, min(SEEDS_AT_ONCE, first + count - begin)) for begin in range(first, first + count, SEEDS_AT_ONCE)]
    if jobs == 1:
        for part in parts:
            yield run_seeds(*part, faults=faults)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        running = [pool.submit(run_seeds, *part, faults=faults) for part in parts]
        try:
            for each in as_completed(running):
                yield each.result()
        finally:
            pool.shutdown(cancel_futures=True)


def shrunk(plan: Plan, *, tries: int = TRIES) -> Plan:
    """As little of ``plan`` as still breaks what it breaks: left out greedily, first misfortunes, then wishes."""
    broken = {each.invariant for each in judged(plan).verdict.violations}
    least, left = plan, tries
    again = True
    while again:
        again = False
        for smaller in _smaller(least):
            if left == 0:
                return least
            left -= 1
            if broken & {each.invariant for each in judged(smaller).verdict.violations}:
                least, again = smaller, True
                break
    return least


def _smaller(plan: Plan) -> Iterator[Plan]:
    for misfortune in plan.misfortunes:
        yield plan.without(misfortunes=[misfortune.number])
    if len(plan.wishes) > 1:
        for wish in plan.wishes:
            yield plan.without(wishes=[wish.number])

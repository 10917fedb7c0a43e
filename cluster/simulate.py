"""`baton simulate`: runs of the deterministic simulator, each from one seed, judged by its checker."""

import time
from typing import TYPE_CHECKING

from simulator.campaign import BOUNDS, Judged, Tally, campaign, judged, shrunk
from simulator.plan import Plan, draw
from simulator.story import story
from simulator.verdict import quantile

if TYPE_CHECKING:
    from rich.console import Console

SAID_EVERY = 5.0
"""Seconds from one line of progress to the next."""
SHOWN = 5
"""Seeds that broke something of which more is said."""


def simulate_seed(console: "Console", seed: int, *, faults: bool, trace: bool) -> bool:
    """Run one seed and tell what happened; whether it broke nothing. What breaks something is made smaller first."""
    plan = draw(seed, faults=faults)
    found = judged(plan, story=trace)
    if not found.verdict.clean:
        plan = shrunk(plan)
        found = judged(plan, story=trace)
    _show_plan(console, plan)
    if trace or not found.verdict.clean:
        _show_story(console, found)
    _say(console, f"seed {seed}: {len(plan.wishes)} requests, {found.verdict.resumes} resumed, "
         f"{found.run.seconds:.2f} s of virtual time")  # fmt: skip
    for violation in found.verdict.violations:
        _say(console, f"BROKEN {violation}")
    return found.verdict.clean


def simulate_seeds(console: "Console", first: int, count: int, *, faults: bool, jobs: int) -> bool:
    """Run many seeds; whether none broke anything."""
    begun = said = time.monotonic()
    total = Tally()
    for tally in campaign(first, count, faults=faults, jobs=jobs):
        for seed in [*tally.broken][: max(0, SHOWN - len(total.broken))]:
            _say(console, f"BROKEN in seed {seed}: {tally.broken[seed][0]}")
            _say(console, f"  {_replay(seed, faults=faults)}")
        total.add(tally)
        now = time.monotonic()
        if now - said >= SAID_EVERY:
            said = now
            _say(console, f"{total.seeds} of {count} seeds, {total.seeds / (now - begun):.0f} a second, "
                 f"{len(total.broken)} broken")  # fmt: skip
    seconds = time.monotonic() - begun
    _say(console, f"{total.seeds} seeds in {seconds:.0f} s ({total.seeds / seconds:.0f} a second): "
         f"{total.requests} requests, {total.faults} faults, {total.resumes} resumes, "
         f"in {total.resumed} of the seeds")  # fmt: skip
    strikes = ", ".join(f"{kind} {times}" for kind, times in total.hits.most_common())
    _say(console, f"  misfortunes that struck something: {strikes or 'none'}")
    for what, times in (("detect", total.times.detect), ("resume", total.times.resume)):
        for kind, each in sorted(times.items()):
            p50, p99 = quantile(each, 0.5), quantile(each, 0.99)
            _say(console, f"  time to {what} ({kind}): p50 {p50:.3f} s, p99 {p99:.3f} s, of {len(each)}")
    late = total.times.broken(BOUNDS)
    for line in late:
        _say(console, f"BROKEN {line}")
    if total.broken:
        seeds = ", ".join(map(str, sorted(total.broken)))
        _say(console, f"BROKEN: {len(total.broken)} seeds: {seeds}")
        _say(console, f"  {_replay(min(total.broken), faults=faults)}")
    return not total.broken and not late


def _replay(seed: int, *, faults: bool) -> str:
    return f"baton simulate {'--faults ' if faults else ''}--seed {seed} --trace"


def _show_plan(console: "Console", plan: Plan) -> None:
    topology = plan.topology
    way = "one-sided" if topology.one_sided else "two-sided"
    workers = ", ".join(
        f"{name} ({topology.ranks[role]} ranks, {topology.num_blocks[role]} blocks)"
        for name, role in topology.workers.items()
    )
    _say(console, f"{workers}; {topology.gateways} gateways; {way}, disaggregation {topology.policy}")
    for wish in plan.wishes:
        _say(console, f"  request {wish.request} at {wish.at:.3f}: {len(wish.prompt)} tokens, up to "
             f"{wish.params.max_tokens} more, at {wish.gateway}")  # fmt: skip
    for misfortune in plan.misfortunes:
        _say(console, f"  {misfortune}")


def _show_story(console: "Console", found: Judged) -> None:
    broken = [each.request for each in found.verdict.violations if each.request is not None]
    whose = [broken[0]] if broken else [wish.request for wish in found.run.plan.wishes]
    for request in whose:
        _say(console, f"The story of {request}:")
        for line in story(found.run.history, request):
            _say(console, line)


def _say(console: "Console", line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)

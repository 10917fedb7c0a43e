"""Two files share the seeds, so that two processes can."""

from simulator.campaign import run_seeds
from simulator.faults import Kind

RESUMED = 0.5
"""Part of the seeds in which a request is resumed at least once."""
STRIKES = 3
"""Times that each kind of misfortune strikes something, in 250 seeds."""


def check_seeds(first: int, count: int) -> None:
    """None of these seeds breaks a promise; and they are not so tame that none could."""
    tally = run_seeds(first, count, faults=True)
    broken = tally.broken
    shown = "\n".join(f"baton simulate --faults --seed {seed} --trace: {what[0]}" for seed, what in broken.items())
    assert not broken, f"{len(broken)} seeds break promises:\n{shown}"
    assert tally.resumed >= RESUMED * count, f"only {tally.resumed} of {count} seeds have a resume"
    seldom = {kind: tally.hits[kind] for kind in Kind if tally.hits[kind] < STRIKES * count / 250}
    assert not seldom, f"these misfortunes strike too seldom: {seldom}"

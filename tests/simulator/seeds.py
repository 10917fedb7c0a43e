"""Two files share the seeds, so that two processes can."""

from simulator.campaign import run_seeds


def check_seeds(first: int, count: int) -> None:
    """None of these seeds breaks a promise."""
    broken = run_seeds(first, count, faults=True).broken
    shown = "\n".join(f"baton simulate --faults --seed {seed} --trace: {what[0]}" for seed, what in broken.items())
    assert not broken, f"{len(broken)} seeds break promises:\n{shown}"

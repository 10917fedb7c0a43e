"""The deterministic simulator: the real state machines on a virtual clock and network; one seed is one run."""

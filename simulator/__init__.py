"""The deterministic simulator: the real state machines on a virtual clock and a virtual network; one seed is one run."""

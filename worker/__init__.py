"""A worker: the machine, and the process, that can both prefill and decode."""

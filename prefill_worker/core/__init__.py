"""The prefill worker's decisions."""

"""The worker's decisions as a whole."""

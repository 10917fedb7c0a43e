"""Moves KV blocks between two workers' caches."""

"""Assigns each request to a prefill and a decode worker."""

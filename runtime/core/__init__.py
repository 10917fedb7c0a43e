"""Decisions that prefill and decode workers share."""

"""Baton in process, without Ray: for scripts, notebooks and tests. ``baton.py`` is the door."""

"""What of a process's memory is there for good, and what is given back."""

import ctypes
import gc

TRIM_EVERY = 30.0
"""Seconds between two calls of ``trim``: it takes some milliseconds."""
_libc = ctypes.CDLL(None)


def settle() -> None:
    """Take everything that there is now for there for good: code, model, tokenizer. Called once a process serves.

    A full collection would walk over all of it, some 100 ms in which nothing else runs; so Python puts it off until
    what has come since is a quarter of what there was, and what died in cycles stays as long.
    """
    gc.freeze()
    gc.collect()  # sets the measure for a quarter; there is nothing to walk over


def trim() -> None:
    """Give memory that nobody uses back to the system: the C library keeps it where anything behind it is in use.

    All of it only where ``MALLOC_ARENA_MAX`` is 1: of other arenas than the first glibc keeps the top, 10 MB and more.
    """
    gc.collect()
    _libc.malloc_trim(0)

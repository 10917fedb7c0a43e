"""Threads that are there from the start."""

import threading
from concurrent.futures import ThreadPoolExecutor


def thread_pool(count: int, name: str) -> ThreadPoolExecutor:
    """A pool that has started all of its ``count`` threads: what a process has open does not grow with its first busy
    moment, when there may be no room for more."""
    pool = ThreadPoolExecutor(count, thread_name_prefix=name)
    together = threading.Barrier(count)
    try:
        for _ in range(count):
            pool.submit(together.wait)  # none is idle until all are there
    except RuntimeError:  # the system has no more
        together.abort()
        pool.shutdown(wait=False)
        raise
    return pool

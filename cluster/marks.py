"""The cluster's processes of a host, found without Ray and without a file: each keeps a memfd open whose name says
whose it is. It goes with the process, however that ends, and no other process has one of that name.
"""

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

from cluster.state import started_at

GONE_WITHIN = 10.0
"""Seconds from SIGKILL to the end of a process."""


def name_of(cluster: str, ray_address: str) -> str:
    """What the processes of a cluster are marked by: others of that name may run on another Ray."""
    return f"{cluster}@{ray_address}"


def mark(name: str) -> None:
    """Have this process found by ``name`` from now on."""
    os.memfd_create(_full(name), os.MFD_CLOEXEC)


def marked(name: str) -> Iterator[int]:
    """The pids of this user's processes, in this pid namespace, that are marked by ``name``."""
    wanted = f"/memfd:{_full(name)} (deleted)"
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if any(_target(link) == wanted for link in folder.iterdir()):
                yield int(folder.parent.name)


def sweep(name: str) -> tuple[list[int], list[int]]:
    """Kill the processes that are marked by ``name``: those that there were, and those that are there still."""
    found = list(marked(name))
    return found, [pid for pid in found if not _end(pid, name)]


def _end(pid: int, name: str) -> bool:
    """SIGKILL, and whether it is gone. Never another process that got its number."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        if pid not in marked(name):
            return True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(GONE_WITHIN * 1000)) or started_at(pid) is None
    finally:
        os.close(fd)


def _full(name: str) -> str:
    return f"baton:{name}"[:200]


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile
        return ""

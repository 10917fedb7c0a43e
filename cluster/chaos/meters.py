"""What the processes of a cluster take from their machine: memory, files, sockets, threads, shared memory."""

import os
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cluster.chaos.processes import Life

_CPUS = os.cpu_count() or 1
GRPC_POOLS = {
    "event_engine": min(max(_CPUS, 4), 16),
    "grpc_global_tim": 3,
    "default-executo": 2 * _CPUS,
    "resolver-execut": 2 * _CPUS,
}
"""Threads that gRPC, which Ray speaks by, keeps in pools of its own: the name that they give themselves, cut off as the
kernel does, and how many a pool may have at rest. They come with the calls that are under way at a time, and some go
again, so a process that has just made fewer calls than another has fewer; more than this many are a leak."""
LATE = Counter({"threads": 1})
"""What Ray's core has been seen to start in the launcher, once, at some need of its own: the thread of a
``boost::asio::thread_pool``, told by its stack. It has no name, so there one thread more is not told from ours."""


@dataclass(frozen=True, slots=True)
class Uses:
    """Of one process at one moment."""

    counts: Counter[str]
    """Threads, mappings of shared memory, and open files: sockets and other unnamed ones by their kind."""

    def beyond(self, other: "Uses", late: Counter[str] | None = None) -> dict[str, int]:
        """What is more here than in ``other``, and than may come ``late``."""
        at_rest = Counter({_threads_of(pool): most for pool, most in GRPC_POOLS.items()})
        return dict(self.counts - (other.counts | at_rest) - (late or Counter()))


@dataclass(slots=True)
class Series:
    """The private memory of one process over time: what it allocated, without its KV pool where that is shared."""

    times: "array[float]" = field(default_factory=lambda: array("d"))
    bytes: "array[int]" = field(default_factory=lambda: array("q"))


class Meters:
    """Looks at the processes that it is told of."""

    def __init__(self) -> None:
        self.memory: dict[Life, Series] = {}

    def sample(self, lives: Iterable[Life], now: float) -> None:
        """Note how much memory they have."""
        for life in lives:
            size = private_bytes(life.pid)
            if size is not None:
                series = self.memory.setdefault(life, Series())
                series.times.append(now)
                series.bytes.append(size)


def private_bytes(pid: int) -> int | None:
    """Memory that is this process' own; None if it is gone. See proc(5)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None  # it is dead, and not yet buried


def uses(pid: int) -> Uses | None:
    """None if the process is gone."""
    folder = Path(f"/proc/{pid}")
    try:
        counts = Counter(_kind(folder / "fd" / number) for number in os.listdir(folder / "fd"))
        counts += Counter(_thread(folder / "task" / number) for number in os.listdir(folder / "task"))
        mapped = {line.split()[4] for line in (folder / "maps").read_text().splitlines() if _is_shared(line)}
    except OSError:
        return None
    counts["mappings of shared memory"] = len(mapped)
    return Uses(counts)


def shared_memory() -> set[str]:
    """Files in shared memory that any process could have left."""
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def _kind(link: Path) -> str:
    """What is open: another incarnation has other names for the same."""
    try:
        name = os.readlink(link)
    except FileNotFoundError:  # closed meanwhile
        return "closed"
    if name.startswith("/memfd:"):
        return "shared memory"
    if name.startswith("/"):
        return "files"
    kind, _, number = name.partition(":")
    return number.strip("[]") if kind == "anon_inode" else f"{kind}s"


def _thread(folder: Path) -> str:
    """Whose it is: most have the name of what they do at this moment, so they are one kind."""
    try:
        name = (folder / "comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return "closed"
    return _threads_of(name) if name in GRPC_POOLS else "threads"


def _threads_of(pool: str) -> str:
    return f"threads of {pool}"


def _is_shared(line: str) -> bool:
    """Whether a line of /proc/PID/maps is about shared memory with a file behind it: an address space, a mode that
    ends with s, ..., the inode, the file."""
    fields = line.split(maxsplit=5)
    return len(fields) == 6 and fields[1].endswith("s") and ("/dev/shm" in fields[5] or "memfd:" in fields[5])

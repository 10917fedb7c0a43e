"""A small file for each running cluster, by which `baton status`, `down`, `chat` and `submit` find it.

Under ``$XDG_RUNTIME_DIR/baton`` or ``~/.local/state/baton``, for this user only. A file is written whole or not at all;
one whose launcher is gone (by pid and start time) is stale.
"""

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from cluster.errors import ClusterError

_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFile:
    """One running cluster."""

    name: str
    topology: str
    pid: int
    """Of the launcher."""
    started: int
    """When that process started, to tell it from a later one with the same pid: clock ticks since the boot."""
    url: str | None = None
    """None until the cluster is ready."""
    ray_folder: str | None = None
    """Of a Ray of its own."""
    ray_address: str | None = None
    """Of a Ray that was joined: HOST:PORT."""

    @property
    def alive(self) -> bool:
        return started_at(self.pid) == self.started


def started_at(pid: int) -> int | None:
    """When the process ``pid`` started, in clock ticks since the boot, which no change of the clock moves; None if it
    is gone, or dead and not yet buried by its parent. See proc(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[19]) if fields[0] not in (b"Z", b"X") else None


def folder() -> Path:
    """Where the files are; made if missing, for this user only."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) if runtime and Path(runtime).is_dir() else Path.home() / ".local" / "state"
    path = base / "baton"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        advice = "let XDG_RUNTIME_DIR name a folder of yours"
        raise ClusterError(
            f"{path}, where the running clusters are noted, cannot be made: {error}; {advice}"
        ) from error
    return path


def log_file(name: str) -> Path:
    return folder() / f"{name}.log"


def socket_file(name: str) -> Path:
    """Where the launcher listens: see ``cluster.control``."""
    return folder() / f"{name}.sock"


def claim(name: str, topology: Path) -> ClusterFile:
    """Take ``name`` for this process; ``ClusterError`` if a cluster of that name runs."""
    started = started_at(os.getpid())
    assert started is not None
    mine = ClusterFile(name=name, topology=str(topology), pid=os.getpid(), started=started)
    with _one_at_a_time():
        other = read(name)
        if other is not None and other.alive:
            stop = f"stop it with `baton down {name}`, or give this one another cluster.name"
            raise ClusterError(f"a cluster named {name!r} runs already (pid {other.pid}); {stop}")
        if other is not None and other.ray_folder is not None:
            from cluster.ray_session import remove_remains

            remove_remains(Path(other.ray_folder))  # its launcher was killed, and could not
        if other is not None and other.ray_address is not None:
            clean = f"`baton down {name}` cleans up after it"
            raise ClusterError(
                f"the last launcher of {name!r} was killed, and has left what it ran on other hosts; {clean}"
            )
        _write(mine)
    return mine


def update(
    file: ClusterFile, *, url: str | None, ray_folder: Path | None, ray_address: str | None = None
) -> ClusterFile:
    """Write what is known now."""
    newer = replace(file, url=url, ray_folder=None if ray_folder is None else str(ray_folder), ray_address=ray_address)
    _write(newer)
    return newer


def read(name: str) -> ClusterFile | None:
    """The file of ``name``; None if there is none, ``ClusterError`` if it is no such file."""
    path = _path(name)
    try:
        file = msgspec.json.decode(path.read_bytes(), type=ClusterFile)
        if file.name != name:
            raise ValueError(f"it is about {file.name!r}")
        return file
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        text = f"cannot be read as the note of a running cluster ({error})"
        raise ClusterError(f"{path}: {text}; if no cluster {name!r} runs, remove the file") from error


def remove(file: ClusterFile) -> None:
    """Forget this cluster; one that has taken its name since stays."""
    with _one_at_a_time():
        now = read(file.name)
        if now is not None and (now.pid, now.started) == (file.pid, file.started):
            _path(file.name).unlink()
            socket_file(file.name).unlink(missing_ok=True)  # of a launcher that was killed


def every() -> list[ClusterFile]:
    """All files, live or stale, by name."""
    found = (read(path.stem) for path in sorted(folder().glob("*.json")) if _NAME.fullmatch(path.stem))
    return [file for file in found if file is not None]


def find(name: str | None) -> ClusterFile:
    """The live cluster ``name``, or the only one that runs."""
    if name is not None:
        named = read(name)
        if named is None or not named.alive:
            raise ClusterError(f"no cluster named {name!r} runs; `baton status` lists those that do")
        return named
    live = [file for file in every() if file.alive]
    if not live:
        raise ClusterError("no cluster runs; start one with `baton up TOPOLOGY`")
    if len(live) > 1:
        names = ", ".join(file.name for file in live)
        raise ClusterError(f"several clusters run ({names}); name the one you mean")
    return live[0]


def _path(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise ClusterError(f"{name!r} is no name of a cluster: lower-case letters, digits and dashes")
    return folder() / f"{name}.json"


def _write(file: ClusterFile) -> None:
    path = _path(file.name)
    draft = path.with_suffix(f".{secrets.token_hex(4)}")
    try:
        with open(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as stream:
            stream.write(msgspec.json.encode(file))
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise ClusterError(f"{path} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Between looking at a file and replacing it nobody else does the same."""
    lock = os.open(folder() / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)

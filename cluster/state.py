"""A small file for each running cluster, by which `baton status`, `down`, `chat` and `submit` find it.

Under ``$XDG_RUNTIME_DIR/baton`` or ``~/.local/state/baton``, for this user only. A file whose launcher is gone (by pid
and start time) is stale.
"""

import json
import os
import re
import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from cluster.errors import ClusterError

_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFile:
    """One running cluster."""

    name: str
    topology: str
    pid: int
    """Of the launcher."""
    started: float
    """When that process started, to tell it from a later one with the same pid."""
    url: str | None = None
    """None until the cluster is ready."""
    ray_folder: str | None = None

    @property
    def alive(self) -> bool:
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 0.01
        except psutil.Error:
            return False


def folder() -> Path:
    """Where the files are; made if missing, for this user only."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) if runtime and Path(runtime).is_dir() else Path.home() / ".local" / "state"
    path = base / "baton"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def log_file(name: str) -> Path:
    return folder() / f"{name}.log"


def claim(name: str, topology: Path) -> ClusterFile:
    """Take ``name`` for this process; ``ClusterError`` if a cluster of that name runs."""
    mine = ClusterFile(
        name=name, topology=str(topology), pid=os.getpid(), started=psutil.Process().create_time(),
    )  # fmt: skip
    for _ in range(2):
        try:
            with open(os.open(_path(name), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
                file.write(json.dumps(asdict(mine)))
            return mine
        except FileExistsError:
            other = read(name)
            if other is not None and other.alive:
                stop = f"stop it with `baton down {name}`, or give this one another cluster.name"
                raise ClusterError(f"a cluster named {name!r} runs already (pid {other.pid}); {stop}") from None
            remove(name)
    raise ClusterError(f"another process is taking the name {name!r} at this moment; try again")


def update(file: ClusterFile, *, url: str | None, ray_folder: Path | None) -> ClusterFile:
    """Write what is known now, whole or not at all."""
    newer = replace(file, url=url, ray_folder=None if ray_folder is None else str(ray_folder))
    path = _path(file.name)
    draft = path.with_suffix(f".{secrets.token_hex(4)}")
    with open(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as stream:
        stream.write(json.dumps(asdict(newer)))
    draft.replace(path)
    return newer


def read(name: str) -> ClusterFile | None:
    """The file of ``name``; None if there is none, or none that can be read."""
    try:
        content = json.loads(_path(name).read_text())
        return ClusterFile(**content)
    except (OSError, ValueError, TypeError):
        return None


def remove(name: str) -> None:
    _path(name).unlink(missing_ok=True)


def every() -> list[ClusterFile]:
    """All files, live or stale, by name."""
    found = (read(path.stem) for path in sorted(folder().glob("*.json")))
    return [file for file in found if file is not None]


def find(name: str | None) -> ClusterFile:
    """The live cluster ``name``, or the only one that runs."""
    live = [file for file in every() if file.alive]
    if name is not None:
        live = [file for file in live if file.name == name]
        if not live:
            raise ClusterError(f"no cluster named {name!r} runs; `baton status` lists those that do")
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

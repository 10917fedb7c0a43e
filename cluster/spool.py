"""Where a job's files are on the host that runs it, and how its input gets there.

The input of `baton submit --address` comes in pieces through Ray's packages (what carries working directories to a
cluster): the client puts the next one as soon as the last but one was taken away, so that neither the client nor Ray's
head ever holds more than two, however long the input is. The job writes them to its folder, and checks the whole.
"""

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster.errors import ClusterError

PIECE = 4 << 20
"""Bytes."""
IN_FLIGHT = 2
PIECE_WITHIN = 300.0
"""Seconds that a job waits for the next piece before it takes its client for dead."""
LOOK_EVERY = 0.2
KEPT = 14 * 86400.0
"""Seconds from the last change of a job's files to their end."""
Take = Callable[[str], bytes | None]
_ID = re.compile(r"baton-[0-9a-f]{12}")


class JobFolder:
    """One job's input and results, kept over its end so that it can be resumed and its results be fetched."""

    def __init__(self, job: str) -> None:
        if not _ID.fullmatch(job):
            raise ClusterError(f"{job!r} is no id of a job of `baton submit --address`, such as baton-0123456789ab")
        self.path = jobs_folder() / job
        self.input = self.path / "input.jsonl"
        """Whole, or not there."""
        self.results = self.path / "results.jsonl"

    def make(self) -> None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.utime(self.path)  # a job that is resumed is none of the old ones

    def receive(self, job: str, size: int, digest: str, take: Take, *, within: float = PIECE_WITHIN) -> None:
        """Write the input; nothing to do where it is there already. ``take`` gives a piece once and then forgets it;
        None where it has not come yet."""
        if self.input.exists():
            return
        draft = self.input.with_suffix(".part")
        hashed, written = hashlib.blake2b(digest_size=16), 0
        with draft.open("wb") as file:
            for name, expected in pieces(job, size):
                gone = f"the input stopped coming after {written} of {size} bytes"
                piece = self.wait_for(name, take, gone, within=within)
                if len(piece) != expected:
                    raise ClusterError(
                        f"piece {name} of the input has {len(piece)} bytes of {expected}; submit it again"
                    )
                file.write(piece)
                hashed.update(piece)
                written += expected
            file.flush()
            os.fsync(file.fileno())
        if hashed.hexdigest() != digest:
            raise ClusterError("the input is not what its client had: it was changed on the way; submit it again")
        draft.replace(self.input)

    def wait_for(self, name: str, take: Take, gone: str, *, within: float = PIECE_WITHIN) -> bytes:
        """A piece; ``ClusterError`` with ``gone`` if it does not come."""
        give_up = time.monotonic() + within
        while (piece := take(name)) is None:
            if time.monotonic() > give_up:
                raise ClusterError(f"{gone}: its client is gone; submit it again")
            time.sleep(LOOK_EVERY)
        return piece


def key_piece(job: str) -> str:
    """In which the client's API key comes: Ray's runtime environments, made for such things, are written to logs."""
    return f"{job}-key.zip"


def pieces(job: str, size: int) -> Iterator[tuple[str, int]]:
    """Name and bytes of each."""
    for number, start in enumerate(range(0, size, PIECE)):
        yield f"{job}-{number}.zip", min(PIECE, size - start)  # Ray takes this ending; nobody unpacks it


def jobs_folder() -> Path:
    """On a disk, unlike the notes of running clusters: jobs are resumed after a crash of the host."""
    state = os.environ.get("XDG_STATE_HOME")
    base = Path(state) if state and Path(state).is_absolute() else Path.home() / ".local" / "state"
    return base / "baton" / "jobs"


def forget_old(now: float) -> None:
    """Remove the files of jobs that nobody has touched for ``KEPT`` seconds. ``now``: of the clock that files have."""
    for folder in jobs_folder().glob("baton-*"):
        with contextlib.suppress(FileNotFoundError):  # another job does the same
            times = [path.stat().st_mtime for path in (folder, *folder.iterdir())]
            if _ID.fullmatch(folder.name) and now - max(times) > KEPT:
                shutil.rmtree(folder, ignore_errors=True)

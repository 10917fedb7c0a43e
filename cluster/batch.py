"""The files of `baton submit`: requests in, results out, one JSON object a line (OpenAI's batch format).

Every line of the input gets exactly one line of the output, also over several runs: a result is written whole or cut
off by the next run, and a line that has a result is not asked again. A line whose answer was under way, or not on the
disk yet, when its process or host died has none, and is asked again: at least once asked, exactly once in the results.
Which line a result belongs to is told by its ``custom_id``; lines that have none, being broken, go by their number.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.errors import ClusterError

MAX_LINE = 16 << 20
MAKE_ROOM = "make room, then run the same command again to go on where it stopped"


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the input; ``error`` where it is none that could be sent."""

    number: int
    """Line number, from 1."""
    custom_id: str | None
    url: str = ""
    body: dict[str, Any] | None = None
    error: str = ""

    @property
    def key(self) -> int:
        """What tells whether a result is this line's."""
        return _key(f"id {self.custom_id}" if self.custom_id is not None else f"line {self.number}")

    def result(self, response: dict[str, Any] | None, code: str = "", message: str = "") -> dict[str, Any]:
        """The line's result: an HTTP response, or why there is none."""
        error = None if response is not None else {"code": code, "message": message}
        return {"id": f"line-{self.number}", "custom_id": self.custom_id, "response": response, "error": error}


def read_requests(path: Path) -> Iterator[Request]:
    """The lines of ``path``, one at a time; empty lines are none."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                _skip_rest(file, line)
                yield Request(number, None, error=f"the line is longer than {MAX_LINE >> 20} MiB")
            elif line.strip():
                yield _parse(number, line)


def _parse(number: int, line: bytes) -> Request:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Request(number, None, error=f"the line is not JSON: {error}")
    if not isinstance(content, dict):
        return Request(number, None, error="the line is no JSON object")
    custom_id, url, body = content.get("custom_id"), content.get("url"), content.get("body")
    if not isinstance(custom_id, str):
        return Request(number, None, error="custom_id is missing, or is not text")
    problem = _problem(content.get("method", "POST"), url, body)
    if problem:
        return Request(number, custom_id, error=problem[:500])
    return Request(number, custom_id, str(url), body)


def _problem(method: object, url: object, body: object) -> str:
    """Why this is no request to send; empty if it is one."""
    if method != "POST":
        return f"method must be POST, got {method!r}"
    if not isinstance(url, str) or not url.startswith("/v1/") or not url.isascii() or not url.isprintable():
        return f"url must be a path such as /v1/chat/completions, got {url!r}"
    if not isinstance(body, dict):
        return "body is missing, or is no JSON object"
    return "stream is for people who watch; leave it out" if body.get("stream") else ""


def _skip_rest(file: io.BufferedReader, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE)


def count_lines(path: Path) -> int:
    """Lines of ``read_requests(path)``, up to over-long ones."""
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


class Results:
    """The output file, for one process at a time. What an earlier run has finished is ``take``n off the work: a digest
    of 64 bits is kept in memory for each of its results, about 100 bytes with the table around it, nothing for new
    ones. (Two of a million ids fall together once in 40 million files; the later line would be left out.)"""

    def __init__(self, path: Path) -> None:
        self._path = path
        if os.path.exists(path) and not path.is_file():
            raise ClusterError(f"{path} is no file; name one for the results")
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise self._cannot(error, "name another file") from error
        try:
            _sync_folder(path.parent)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ClusterError(f"another `baton submit` is writing {path}; wait for it") from error
            self._done: Counter[int] = Counter(self._read())
        except BaseException:
            os.close(self._fd)
            raise

    def take(self, request: Request) -> bool:
        """Whether an earlier run has the result of this line. Each result stands for one line."""
        if not self._done[request.key]:
            return False
        self._done[request.key] -= 1
        return True

    def write(self, result: dict[str, Any]) -> None:
        """Append one result; a crash leaves it out or whole, or torn at the very end, which the next run cuts off."""
        line = json.dumps(result, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            while line:
                line = line[os.write(self._fd, line) :]
        except OSError as error:
            raise self._cannot(error) from error

    def sync(self) -> None:
        """What was written is on the disk, also if the host crashes now. Takes milliseconds: for a thread."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._cannot(error) from error

    def close(self) -> None:
        try:
            self.sync()
        finally:
            os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cannot(self, error: OSError, cure: str = MAKE_ROOM) -> ClusterError:
        return ClusterError(f"{self._path} cannot be written: {error.strerror}; {cure}")

    def _read(self) -> Iterator[int]:
        """Keys of all whole results; cuts a torn last one off, and what a crash of the host has left unwritten."""
        whole = 0
        with open(os.dup(self._fd), "rb") as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                if b"\0" in line and (whole or not line.strip(b"\0\n")):
                    break  # no JSON has zero bytes: the file had grown, and the disk never got what belongs here
                try:
                    result = json.loads(line)
                    custom_id, line_id = result["custom_id"], result["id"]
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    text = "is no result of `baton submit`; name another output, or remove the line"
                    raise ClusterError(f"{self._path}:{number}: {text}") from error
                whole += len(line)
                yield _key(f"id {custom_id}" if custom_id is not None else str(line_id).replace("line-", "line ", 1))
        os.ftruncate(self._fd, whole)


def _sync_folder(folder: Path) -> None:
    """So that a new file in it is there after a crash."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing
            raise
    finally:
        os.close(fd)


def _key(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")

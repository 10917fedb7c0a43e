"""Writes down what the state machines of a process were told, and what they answered: ``debug.record`` of a topology.

A file holds prompts, answers and the cluster's key: it is for its owner alone. ``baton replay`` reads it.
"""

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from messages.codec import encode
from messages.record_file import write_record
from runtime.core.journal import Called, Entry, Full, Made, pack, pack_answer

log = logging.getLogger(__name__)

BUFFER_BYTES = 1 << 18
FLUSH_EVERY = 1.0
"""Seconds; what is younger is lost when the process is killed."""
MAX_FILE_BYTES = 4 << 30
"""Then nothing more is written."""


Answer = TypeVar("Answer")


class Recorder:
    """One file. Belongs to one thread."""

    def __init__(self, folder: Path, process: str, max_bytes: int = MAX_FILE_BYTES) -> None:
        """A new file of ``folder``, which is made if it is not there: ``PROCESS.0.journal``, or the next number."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path, descriptor = _new_file(folder, process)
        self._file = os.fdopen(descriptor, "wb", BUFFER_BYTES)
        self._left = max_bytes
        self._flush_at = 0.0

    def made(self, core: str, key: str, **arguments: Any) -> None:
        """A machine was made with these."""
        self._write(Made(core, key, {name: pack(value) for name, value in arguments.items()}))

    def call(self, key: str, method: str, function: Callable[[], Answer], event: Any, now: float) -> Answer:
        """Call ``function``, which tells the machine ``event``, and write down what it answers or raises."""
        kind = "" if event is None else type(event).__name__
        told = pack(event)  # before: the machine may change it
        try:
            answer = function()
        except Exception as error:
            self._write(Called(key, method, now, kind, told, pack(type(error).__name__)))
            self._file.flush()
            raise
        self._write(Called(key, method, now, kind, told, pack_answer(answer)))
        return answer

    def close(self) -> None:
        self._file.close()

    def _write(self, entry: Entry) -> None:
        if self._left <= 0:
            return
        self._left -= write_record(self._file, encode(entry))
        if self._left <= 0:
            log.warning("%s has reached its size: what comes from here on is not recorded", self.path)
            write_record(self._file, encode(Full()))
        now = time.monotonic()
        if now >= self._flush_at:
            self._file.flush()
            self._flush_at = now + FLUSH_EVERY


def _new_file(folder: Path, process: str) -> tuple[Path, int]:
    """A file that nobody has yet, and its descriptor."""
    for number in count():
        path = folder / f"{process}.{number}.journal"
        with suppress(FileExistsError):
            return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    raise AssertionError("numbers do not end")

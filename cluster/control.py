"""The launcher's control socket: ``NAME.sock`` in the state folder, for this user only, by which `baton status`,
`drain`, `flip` and `restart` reach the launcher. JSON lines: one question; then notes of what happens, and one answer.
"""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from cluster import state
from cluster.core.events import Done, DrainWanted, FlipWanted, Note, RestartWanted, UndrainWanted, Wanted
from cluster.core.operations import Refused
from cluster.core.units import Status
from cluster.errors import ClusterError

log = logging.getLogger(__name__)

MAX_LINE = 1 << 20
BACKLOG = 16
PATIENCE = 10.0
"""Seconds that either side waits for the other to take or give a line that is due at once."""


class StatusAsked(msgspec.Struct, tag="status", frozen=True, forbid_unknown_fields=True):
    """Answered by ``Statuses``."""


class DrainAsked(msgspec.Struct, tag="drain", frozen=True, forbid_unknown_fields=True):
    worker: str
    undo: bool = False


class FlipAsked(msgspec.Struct, tag="flip", frozen=True, forbid_unknown_fields=True):
    worker: str


class RestartAsked(msgspec.Struct, tag="restart", frozen=True, forbid_unknown_fields=True):
    units: tuple[str, ...]
    """Empty: all of them, one after the other."""
    force: bool = False


class Told(msgspec.Struct, tag="note", frozen=True):
    """Something that happened meanwhile."""

    who: str
    what: str


class Statuses(msgspec.Struct, tag="statuses", frozen=True):
    units: tuple[Status, ...]
    urls: tuple[str, ...]
    """Of all gateways."""


class Ended(msgspec.Struct, tag="ended", frozen=True):
    """``problem`` is empty where all went well."""

    problem: str


Question = StatusAsked | DrainAsked | FlipAsked | RestartAsked
Answer = Told | Statuses | Ended
_questions = msgspec.json.Decoder(Question)
_answers = msgspec.json.Decoder(Answer)


class Controlled(Protocol):
    """What can be asked of a ``Cluster``."""

    @property
    def urls(self) -> list[str]: ...
    def status(self) -> list[Status]: ...
    def operate(self, wanted: Wanted) -> Iterator[Note | Done]: ...


class ControlServer:
    """Listens from its making to ``close``."""

    def __init__(self, name: str, cluster: Controlled) -> None:
        """The former socket of a launcher that was killed is replaced: who has claimed ``name`` is the only one."""
        self._cluster = cluster
        self._folder = os.open(state.folder(), os.O_PATH | os.O_DIRECTORY)
        self._name = state.socket_file(name).name
        self._socket = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._name, dir_fd=self._folder)
        # Nobody can connect before `listen`, and then only this user.
        self._socket.bind(_short(self._folder, self._name))
        os.chmod(self._name, 0o600, dir_fd=self._folder)
        self._socket.listen(BACKLOG)
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no further questions; those under way are answered by whoever ends them."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._name, dir_fd=self._folder)
        os.close(self._folder)

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), name="control", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE)
        with connection, connection.makefile("rwb") as stream, contextlib.suppress(OSError):  # it has gone away
            try:
                question = _questions.decode(stream.readline(MAX_LINE))
            except (ValueError, RecursionError) as error:  # msgspec's own errors, and text that is no UTF-8
                answers: Iterator[Answer] = iter([Ended(f"this is no question that is understood here: {error}")])
            else:
                answers = self._answer(question)
            for answer in answers:
                stream.write(msgspec.json.encode(answer) + b"\n")
                stream.flush()

    def _answer(self, question: Question) -> Iterator[Answer]:
        if isinstance(question, StatusAsked):
            yield Statuses(tuple(self._cluster.status()), tuple(self._cluster.urls))
            return
        try:
            for heard in self._cluster.operate(self._event(question)):
                yield Told(heard.who, heard.what) if isinstance(heard, Note) else Ended(heard.problem)
        except Refused as error:
            yield Ended(str(error))

    def _event(self, question: DrainAsked | FlipAsked | RestartAsked) -> Wanted:
        match question:
            case DrainAsked(worker, undo):
                return UndrainWanted(0, worker) if undo else DrainWanted(0, worker)
            case FlipAsked(worker):
                return FlipWanted(0, worker)
            case RestartAsked(units, force):
                return RestartWanted(0, units, force)


def ask(name: str, question: Question) -> Iterator[Answer]:
    """What the launcher of the cluster ``name`` says, as it says it; raises ``ClusterError`` where it says nothing."""
    folder = os.open(state.folder(), os.O_PATH | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(_short(folder, state.socket_file(name).name))
            with connection.makefile("rwb") as stream:
                stream.write(msgspec.json.encode(question) + b"\n")
                stream.flush()
                if not isinstance(question, StatusAsked):
                    connection.settimeout(None)  # it takes as long as streams take
                for line in stream:
                    yield _answers.decode(line)
    except (OSError, msgspec.MsgspecError) as error:
        raise ClusterError(f"the launcher of {name} does not answer: {error}; `baton status` says how it is") from error
    finally:
        os.close(folder)


def _short(folder: int, name: str) -> str:
    """A path for a Unix socket, which may have 107 bytes, of a file in a folder that may be deeper than that."""
    return str(Path("/proc/self/fd") / str(folder) / name)

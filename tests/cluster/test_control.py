"""Promise: the launcher can be asked by its own user only, answers as things happen, and outlives every question."""

import io
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from cluster import commands, control, state
from cluster.control import ControlServer, DrainAsked, Ended, FlipAsked, RestartAsked, StatusAsked, Statuses, Told, ask
from cluster.core.events import Done, DrainWanted, FlipWanted, Note, RestartWanted, UndrainWanted, Wanted
from cluster.core.operations import Refused
from cluster.core.units import Kind, Phase, Status
from cluster.errors import ClusterError
from cluster.status import _show_launcher, _troubles

RUNNING = Status(
    name="decode-0", kind=Kind.WORKER, phase=Phase.BACK_OFF, seconds=2.0, restarts=3, retry_in=1.5,
    cause="its process (pid 7) ended", drained=False,
)  # fmt: skip


URLS = ("http://127.0.0.1:1", "http://127.0.0.1:2")


class Cluster:
    """Says what it is asked for, and then that it is done, unless it is told another end."""

    def __init__(self) -> None:
        self.problem = ""
        self.urls = list(URLS)

    def status(self) -> list[Status]:
        return [RUNNING]

    def operate(self, wanted: Wanted) -> Iterator[Note | Done]:
        if isinstance(wanted, FlipWanted):
            raise Refused("it is the last of its role")
        yield Note("asked", repr(wanted))
        yield Done(0, self.problem)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """It listens, in a folder whose path is longer than a Unix socket's may be."""
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    cluster = Cluster()
    with closing(ControlServer("local", cluster)):
        yield cluster


def test_only_its_user_may_ask(cluster: Cluster) -> None:
    mode = (state.folder() / "local.sock").stat().st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600


def test_the_status_arrives_as_it_is(cluster: Cluster) -> None:
    assert list(ask("local", StatusAsked())) == [Statuses((RUNNING,), URLS)]


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        (RestartAsked(()), RestartWanted(0, ())),
        (RestartAsked(("decode-0",), force=True), RestartWanted(0, ("decode-0",), True)),
        (DrainAsked("decode-0"), DrainWanted(0, "decode-0")),
        (DrainAsked("decode-0", undo=True), UndrainWanted(0, "decode-0")),
    ],
)
def test_every_question_becomes_what_it_says_and_its_notes_and_end_come_back(
    cluster: Cluster, question: control.Question, wanted: Wanted
) -> None:
    assert list(ask("local", question)) == [Told("asked", repr(wanted)), Ended("")]


def test_people_are_shown_every_gateway_and_what_is_wrong(cluster: Cluster) -> None:
    file = state.ClusterFile(name="local", pid=os.getpid(), started=0, url=URLS[0], topology="t.yaml")
    console = Console(record=True, width=200, file=io.StringIO())
    _show_launcher(console, file)
    assert console.export_text().splitlines() == [
        f"  also at {URLS[1]}",
        "  decode-0: back-off, starts again in 2 s, 3 restarts, last death: its process (pid 7) ended",
    ]


def test_a_refusal_is_an_end_with_the_reason(cluster: Cluster) -> None:
    assert list(ask("local", FlipAsked("decode-0"))) == [Ended("it is the last of its role")]


@pytest.mark.parametrize("line", [b"nonsense\n", b'{"type": "shutdown"}\n', b'{"type": "drain"}\n', b"", b"\xff" * 100])
def test_what_is_no_question_is_told_so_and_harms_nobody(cluster: Cluster, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        folder = os.open(state.folder(), os.O_PATH)
        connection.connect(f"/proc/self/fd/{folder}/local.sock")
        os.close(folder)
        connection.sendall(line)
        connection.shutdown(socket.SHUT_WR)
        assert b"no question that is understood" in connection.makefile("rb").read()
    assert list(ask("local", StatusAsked())) == [Statuses((RUNNING,), URLS)]


def test_a_socket_that_a_killed_launcher_left_is_replaced(cluster: Cluster) -> None:
    with closing(ControlServer("other", cluster)):
        os.link(state.folder() / "other.sock", state.folder() / "left.sock")
    with closing(ControlServer("left", cluster)):
        assert list(ask("left", StatusAsked()))


def test_nothing_is_left_of_it(cluster: Cluster) -> None:
    with closing(ControlServer("other", cluster)):
        pass
    assert not (state.folder() / "other.sock").exists()
    with pytest.raises(ClusterError, match="does not answer"):
        list(ask("other", StatusAsked()))


def test_the_commands_show_what_happens_and_fail_with_the_problem(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state.claim("local", Path("local.yaml"))
    commands.restart(Console(), ("decode-0",), None, force=False)
    assert "asked: RestartWanted(ticket=0, units=('decode-0',), force=False)" in capsys.readouterr().out
    cluster.problem = "decode-0 did not come back"
    with pytest.raises(ClusterError, match="did not come back"):
        commands.drain(Console(width=200), "decode-0", "local", undo=False)
    with pytest.raises(ClusterError, match="last of its role"):
        commands.flip(Console(width=200), "decode-0", None)


def test_the_status_says_what_is_wrong_with_whom() -> None:
    assert list(_troubles(RUNNING)) == [
        "back-off, starts again in 2 s",
        "3 restarts",
        "last death: its process (pid 7) ended",
    ]
    waiting = RUNNING._replace(retry_in=0.0, restarts=1, cause="")
    assert list(_troubles(waiting)) == ["waits for Ray's head", "1 restart"]
    drained = waiting._replace(phase=Phase.RUNNING, retry_in=None, restarts=0, drained=True)
    assert list(_troubles(drained)) == ["drained"]
    assert list(_troubles(drained._replace(drained=False))) == []

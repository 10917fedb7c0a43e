"""The notes of running clusters: whole or not there, and never of a process that is gone."""

import fcntl
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster import state
from cluster.errors import ClusterError

TOPOLOGY = Path("/somewhere/local.yaml")


def test_a_claimed_name_is_found_with_what_is_known_of_it(state_folder: Path) -> None:
    file = state.claim("local", TOPOLOGY)
    assert file.alive
    assert state.read("local") == state.find(None) == state.find("local") == file
    newer = state.update(file, url="http://127.0.0.1:8000", ray_folder=Path("/tmp/baton-x"))
    assert state.read("local") == newer
    assert (newer.url, newer.ray_folder, newer.pid) == ("http://127.0.0.1:8000", "/tmp/baton-x", os.getpid())
    state.remove(newer)
    state.remove(newer)
    assert state.read("local") is None
    assert [path.name for path in state_folder.iterdir()] == [".lock"]


def test_only_its_owner_can_read_it(state_folder: Path) -> None:
    state.claim("local", TOPOLOGY)
    assert state_folder.stat().st_mode & 0o777 == 0o700
    assert (state_folder / "local.json").stat().st_mode & 0o777 == 0o600


def test_without_a_runtime_folder_the_home_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "nowhere"))
    assert state.folder() == tmp_path / ".local" / "state" / "baton"
    assert state.folder().is_dir()


def test_a_folder_that_cannot_be_made_says_what_to_do(state_folder: Path) -> None:
    state_folder.parent.mkdir(exist_ok=True)
    state_folder.write_text("in the way")
    with pytest.raises(ClusterError, match="let XDG_RUNTIME_DIR name a folder of yours"):
        state.every()


def test_a_name_is_taken_once(state_folder: Path) -> None:
    first = state.claim("local", TOPOLOGY)
    with pytest.raises(
        ClusterError, match=rf"'local' runs already \(pid {os.getpid()}\); stop it with `baton down local`"
    ):
        state.claim("local", TOPOLOGY)
    assert state.read("local") == first


def test_of_many_that_claim_a_name_at_once_one_gets_it_even_over_a_stale_one(state_folder: Path) -> None:
    stale = state.claim("local", TOPOLOGY)
    state._write(replace(stale, started=stale.started - 1))
    together = threading.Barrier(6)
    answers: list[str] = []

    def claim() -> None:
        together.wait()
        try:
            state.claim("local", TOPOLOGY)
            answers.append("mine")
        except ClusterError:
            answers.append("taken")

    threads = [threading.Thread(target=claim) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == ["mine", *["taken"] * 5]


def test_nobody_looks_at_a_name_while_another_is_claiming_it(
    state_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, looked = state.read, []

    def look(name: str) -> state.ClusterFile | None:
        with (state_folder / ".lock").open("w") as lock, pytest.raises(BlockingIOError):  # somebody holds it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        looked.append(name)
        return read(name)

    monkeypatch.setattr(state, "read", look)
    state.claim("local", TOPOLOGY)
    assert looked == ["local"]
    with (state_folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again


def test_two_clusters_live_side_by_side(state_folder: Path) -> None:
    first, second = state.claim("a", TOPOLOGY), state.claim("b", TOPOLOGY)
    assert state.every() == [first, second]
    assert state.find("b") == second
    with pytest.raises(ClusterError, match=r"several clusters run \(a, b\); name the one you mean"):
        state.find(None)
    state.remove(first)
    assert state.find(None) == second


def test_a_name_that_somebody_else_has_taken_since_stays(state_folder: Path) -> None:
    former = state.claim("a", TOPOLOGY)
    later = replace(former, started=former.started + 1)
    state.update(later, url=None, ray_folder=None)
    state.remove(former)
    assert state.read("a") == later


def test_a_killed_launcher_leaves_a_stale_note_whose_name_is_free(state_folder: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = state.started_at(process.pid)
    assert started is not None
    running = replace(state.claim("local", TOPOLOGY), pid=process.pid, started=started)
    state._write(running)
    assert running.alive
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but still in the process table
    assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    assert not running.alive
    process.wait()
    assert process.stdin is not None
    process.stdin.close()
    assert not running.alive
    with pytest.raises(ClusterError, match="no cluster named 'local' runs; `baton status` lists"):
        state.find("local")
    with pytest.raises(ClusterError, match="no cluster runs; start one with `baton up TOPOLOGY`"):
        state.find(None)
    assert state.claim("local", TOPOLOGY).alive


def test_another_process_with_the_same_number_is_another_process(state_folder: Path) -> None:
    file = state.claim("local", TOPOLOGY)
    assert not replace(file, started=file.started + 1).alive
    assert not replace(file, pid=-1).alive
    assert not replace(file, pid=1 << 40).alive


def test_what_a_killed_launchers_ray_left_is_removed_with_the_claim(state_folder: Path, tmp_path: Path) -> None:
    ray_folder = tmp_path / "baton-abc"
    ray_folder.mkdir()
    file = state.claim("local", TOPOLOGY)
    state._write(replace(file, started=file.started - 1, ray_folder=str(ray_folder)))
    state.claim("local", TOPOLOGY)
    assert not ray_folder.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[]", b"{}", b'{"name": "local", "topology": "t", "pid": "x", "started": 1}',
     b'{"name": "other", "topology": "t", "pid": 1, "started": 1}'],
)  # fmt: skip
def test_a_broken_note_is_named_and_spoils_no_other(state_folder: Path, content: bytes) -> None:
    other = state.claim("other", TOPOLOGY)
    path = state_folder / "local.json"
    path.write_bytes(content)
    for act in (lambda: state.read("local"), state.every, lambda: state.claim("local", TOPOLOGY)):
        with pytest.raises(ClusterError, match=rf"^{path}: cannot be read as the note .* remove the file$"):
            act()
    assert state.find("other") == other


def test_other_files_in_the_folder_do_no_harm(state_folder: Path) -> None:
    state.claim("local", TOPOLOGY)
    for name in ("Other.json", "local.log", "local.1a2b3c4d"):
        (state_folder / name).write_text("no note")
    assert [file.name for file in state.every()] == ["local"]


@pytest.mark.parametrize("name", ["../evil", "A", "", "a b", "x" * 41, "a\n"])
def test_a_name_is_no_path(state_folder: Path, name: str) -> None:
    with pytest.raises(ClusterError, match="is no name of a cluster: lower-case letters, digits and dashes"):
        state.read(name)


def test_a_reader_sees_the_old_note_or_the_new_one_and_nothing_between(state_folder: Path) -> None:
    file = state.claim("local", TOPOLOGY)
    urls = {None, "http://127.0.0.1:1/" + "x" * 50_000, "http://127.0.0.1:2"}
    written = threading.Event()

    def write() -> None:
        for number in range(200):
            state.update(file, url=sorted(urls, key=str)[number % 3], ray_folder=None)
        written.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not written.is_set():
        seen = state.read("local")
        assert seen is not None
        assert seen.url in urls
    writer.join()


def test_a_full_disk_leaves_the_old_note(state_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = state.claim("local", TOPOLOGY)

    def full(_: object, __: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ClusterError, match=r"local\.json cannot be written: No space left on device"):
        state.update(file, url="http://x", ray_folder=None)
    assert state.read("local") == file
    assert sorted(path.name for path in state_folder.iterdir()) == [".lock", "local.json"]

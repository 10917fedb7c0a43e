"""Promise: a job has its input whole and unchanged, or says that it has not; old jobs do not fill the disk."""

import hashlib
import os
from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.spool import KEPT, PIECE, JobFolder, forget_old, jobs_folder, pieces

JOB = "baton-0123456789ab"


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


class Mail:
    """What a client has sent; each piece can be taken once."""

    def __init__(self, data: bytes) -> None:
        self.digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        self.size, self.sent, starts = len(data), {}, 0
        for name, size in pieces(JOB, len(data)):
            self.sent[name] = data[starts : starts + size]
            starts += size

    def receive(self, folder: JobFolder) -> None:
        folder.make()
        folder.receive(JOB, self.size, self.digest, lambda name: self.sent.pop(name, None), within=0.0)


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 2 * PIECE + 7])
def test_the_input_comes_in_pieces_and_is_whole(size: int) -> None:
    data, folder = os.urandom(size), JobFolder(JOB)
    mail = Mail(data)
    assert all(len(piece) <= PIECE for piece in mail.sent.values())
    mail.receive(folder)
    assert folder.input.read_bytes() == data
    assert not mail.sent, "nothing stays with Ray"
    mail.receive(folder)  # a job that is resumed asks for nothing


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda sent: sent.pop(f"{JOB}-1.zip"), "stopped coming after 4194304 of 4194404 bytes: its client is gone"),
        (lambda sent: sent.update({f"{JOB}-1.zip": b"short"}), "has 5 bytes of 100"),
        (lambda sent: sent.update({f"{JOB}-1.zip": bytes(100)}), "not what its client had"),
    ],
    ids=["lost", "cut", "changed"],
)
def test_an_input_that_is_not_whole_is_none(spoil, why: str) -> None:  # type: ignore[no-untyped-def]
    mail, folder = Mail(b"x" * (PIECE + 100)), JobFolder(JOB)
    spoil(mail.sent)
    with pytest.raises(ClusterError, match=why):
        mail.receive(folder)
    assert not folder.input.exists()


def test_an_id_names_a_folder_of_jobs_and_no_other() -> None:
    for id in ("../../etc", "baton-", "baton-0123456789AB", "baton-0123456789ab/..", "raysubmit_x"):
        with pytest.raises(ClusterError, match="is no id of a job"):
            JobFolder(id)


def test_files_of_jobs_that_nobody_touches_are_removed() -> None:
    old, new, other = JobFolder(JOB), JobFolder("baton-ba9876543210"), jobs_folder() / "baton-mine"
    for path in (old.path, new.path, other):
        path.mkdir(parents=True)
        (path / "results.jsonl").touch()
    now = old.path.stat().st_mtime
    os.utime(new.results, (now + 100, now + 100))
    forget_old(now + KEPT + 50)
    assert not old.path.exists()
    assert new.path.exists() and other.exists()


def test_an_old_job_that_is_resumed_keeps_its_files() -> None:
    job = JobFolder(JOB)
    job.make()
    for path in (job.input, job.results, job.path):
        path.touch()
        os.utime(path, (0, 0))
    job.make()
    forget_old(job.path.stat().st_mtime + 50)
    assert job.input.exists() and job.results.exists()

"""Promise: what comes back from a job is a copy of its results, byte for byte, whatever was there and however often the
connection broke."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster import job_commands, jobs
from cluster.errors import ClusterError
from cluster.jobs import ATTEMPT, JOB, LINES, OPTIONS, SOURCE, Copy, Dashboard, Follower, Input, new_job, next_attempt
from cluster.submit import Summary
from tests.cluster.server import Broken, Page, Server

RESULTS = b"".join(b'{"id": "line-%d"}\n' % number for number in range(50))


def copied(path: Path, *connections: bytes, chunk: int = 13) -> bytes:
    """What the chunks of all connections add to the file; each begins with the first result."""
    new = b""
    with closing(Copy(path)) as copy:
        for sent in connections:
            copy.begin()
            for start in range(0, len(sent), chunk):
                new += copy.add(sent[start : start + chunk])
    return new


@pytest.mark.parametrize("chunk", [1, 13, 4096])
@pytest.mark.parametrize("had", [0, 1, 100, len(RESULTS)])
def test_a_copy_goes_on_behind_what_is_there(tmp_path: Path, had: int, chunk: int) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(RESULTS[:had])
    assert copied(path, RESULTS[: had // 2], RESULTS[:200], RESULTS, chunk=chunk) == RESULTS[had:]
    assert path.read_bytes() == RESULTS


def test_a_file_of_something_else_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"my own data\n")
    with pytest.raises(ClusterError, match=r"no part of this job's results; name another file"):
        copied(path, RESULTS)
    assert path.read_bytes() == b"my own data\n"


def test_only_one_process_writes_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with closing(Copy(path)), pytest.raises(ClusterError, match="another `baton` is writing"):
        Copy(path)


def test_an_input_is_known_by_size_lines_and_digest(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"{}\n\n{}\n  \n{}")
    given = Input.of(path)
    assert (given.size, given.lines) == (12, 3)
    path.write_bytes(b"{}\n\n{}\n  \n[]")
    assert Input.of(path).digest != given.digest


def test_a_job_is_resumed_on_its_own_files_when_it_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"{}\n")
    job = new_job(Input.of(path), ("--concurrency", "4"))
    with pytest.raises(ClusterError, match=r"is new; `baton job results"):
        next_attempt(job)
    ended = replace(job, status="FAILED")
    again = next_attempt(ended)
    assert (again.id, again.attempt, again.submission) == (job.id, 2, f"{job.id}.2")
    assert (again.size, again.digest, again.options) == (job.size, job.digest, job.options)


ID = "baton-0123456789ab"
ANSWERED = b'{"id": "line-%d", "custom_id": "x", "response": {"status_code": 200, "body": {}}, "error": null}\n'
RESULTS_AT = f"/api/v0/logs/{{}}?node_id=node&filename={ID}.jsonl&lines=-1&interval=0.5"


class Ray:
    """A dashboard with one job that has ended, in the answers that Ray gives."""

    def __init__(self, server: Server) -> None:
        self.server = server
        versions = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "x"}
        server.pages["/api/version"] = (200, versions)
        self.job("SUCCEEDED", lines=3)
        self.results(b"".join(ANSWERED % number for number in (2, 1, 3)))

    def job(self, status: str, lines: int, log: str = "") -> None:
        options = {"size": 10, "digest": "d", "options": []}
        mine = {JOB: ID, ATTEMPT: "1", LINES: str(lines), SOURCE: "p.jsonl", OPTIONS: json.dumps(options)}
        common: dict[str, Any] = {"type": "SUBMISSION", "status": status, "entrypoint": "x", "driver_node_id": "node"}
        others = {"submission_id": "raysubmit_x", "metadata": {"theirs": "1"}}, {"submission_id": None}
        jobs = [{**common, "submission_id": ID, "metadata": mine}, *({**common, **other} for other in others)]
        self.server.pages["/api/jobs/"] = (200, jobs)
        self.server.pages[f"/api/jobs/{ID}/logs"] = (200, {"logs": log})

    def results(self, content: bytes) -> None:
        self.server.pages[RESULTS_AT.format("file")] = (200, content)

    def follow(self, target: Path) -> Summary:
        dashboard = Dashboard(self.server.url)
        return Follower(dashboard, dashboard.job(ID), Copy(target), lambda summary: None).run()


@pytest.fixture
def ray(server: Server, monkeypatch: pytest.MonkeyPatch) -> Ray:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # Dashboard sets it
    return Ray(server)


def test_results_of_a_job_that_has_ended_are_brought_and_counted(ray: Ray, tmp_path: Path) -> None:
    target = tmp_path / "results.jsonl"
    summary = ray.follow(target)
    assert (summary.total, summary.succeeded, summary.before, summary.failed) == (3, 3, 0, 0)
    assert target.read_bytes() == b"".join(ANSWERED % number for number in (2, 1, 3))
    assert ray.follow(target).before == 3


def test_where_the_connection_breaks_another_one_goes_on(
    ray: Ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LOOK_EVERY", 0.01)
    whole = b"".join(ANSWERED % number for number in (3, 1, 2))
    breaks = [len(whole) // 2, 0, len(whole) // 3, len(whole) - 1]

    def stream() -> Page:
        if breaks:
            return 200, Broken(whole[: breaks.pop(0)])
        ray.job("SUCCEEDED", lines=3)
        return 200, whole

    ray.job("RUNNING", lines=3)
    ray.server.pages[RESULTS_AT.format("stream")] = stream
    target = tmp_path / "results.jsonl"
    summary = ray.follow(target)
    assert not breaks
    assert (summary.total, summary.succeeded, summary.failed) == (3, 3, 0)
    assert target.read_bytes() == whole


def test_errors_among_the_results_are_named_by_line(ray: Ray, tmp_path: Path) -> None:
    failed = {"id": "line-3", "custom_id": None, "response": None, "error": {"code": "c", "message": "line 3: no JSON"}}
    ray.results(ANSWERED % 1 + ANSWERED % 2 + json.dumps(failed).encode() + b"\n")
    summary = ray.follow(tmp_path / "results.jsonl")
    assert (summary.succeeded, summary.failed) == (2, 1)
    assert summary.problems == ["p.jsonl:3: no JSON"]


def test_a_job_that_ended_early_says_why_and_what_to_do(ray: Ray, tmp_path: Path) -> None:
    ray.job("FAILED", lines=5, log="running\nno cluster runs on the Ray at h:1; start one\n")
    with pytest.raises(ClusterError, match=rf"without 2 of 5 results: failed: no cluster runs .* resume {ID}` goes on"):
        ray.follow(tmp_path / "results.jsonl")
    assert (tmp_path / "results.jsonl").read_bytes().count(b"\n") == 3, "what there was is here"


def test_a_dashboard_that_cannot_be_used_is_told(ray: Ray, server: Server) -> None:
    with pytest.raises(ClusterError, match=r"there is no job baton-0 at .*; `baton job list` names"):
        Dashboard(server.url).job("baton-0")
    server.pages["/api/version"] = (401, {"error": "x"})
    with pytest.raises(ClusterError, match=r"wants Ray's token: let RAY_AUTH_MODE be token"):
        Dashboard(server.url)
    with pytest.raises(ClusterError, match=r"does not answer; is this the address of Ray's dashboard"):
        Dashboard("http://127.0.0.1:9")


def test_jobs_are_listed_and_shown(ray: Ray, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    ray.job("RUNNING", lines=7, log="4 of 7 lines\n")
    job_commands.show_all(server.url)
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["job", "status", "lines", "started", "attempt", "input"]
    assert [row.split() for row in rows] == [[ID, "running", "7", "not", "yet", "1", "p.jsonl"]], "and no other's job"
    job_commands.show(server.url, ID)
    assert f"{ID}: running; 7 lines of p.jsonl" in capsys.readouterr().out
    job_commands.show_logs(server.url, ID, follow=False)
    assert capsys.readouterr().out == "4 of 7 lines\n"


def test_nothing_is_started_or_stopped_that_cannot_be(ray: Ray, server: Server, tmp_path: Path) -> None:
    source, target = tmp_path / "p.jsonl", tmp_path / "r.jsonl"
    source.write_text("{}\n")
    target.write_bytes(ANSWERED % 1)
    with pytest.raises(ClusterError, match=r"has results of something else; name another file, or go on with that job"):
        job_commands.submit(Console(), server.url, source, target, job_commands.Options(1, 1.0, None))
    assert target.read_bytes() == ANSWERED % 1
    with pytest.raises(ClusterError, match=rf"{ID} has ended already: succeeded"):
        job_commands.stop(server.url, ID)
    ray.job("RUNNING", lines=3)
    with pytest.raises(ClusterError, match=rf"{ID} is running; `baton job results {ID} -o FILE` follows it"):
        job_commands.resume(server.url, ID, None)
    assert server.bodies == [], "no POST"

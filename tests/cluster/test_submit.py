"""`baton submit` against a real HTTP server: no line is lost, none is asked twice, over however many runs."""

import itertools
import json
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.batch import Results
from cluster.errors import ClusterError
from cluster.submit import Batch, Summary
from tests.cluster.server import Server


def line(custom_id: str, **body: Any) -> str:
    request = {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": custom_id, **body},
    }
    return json.dumps(request)


class Files:
    def __init__(self, folder: Path) -> None:
        self.source, self.target = folder / "prompts.jsonl", folder / "results.jsonl"

    def write(self, *lines: str) -> None:
        self.source.write_text("".join(f"{text}\n" for text in lines))

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self.target.read_text().splitlines()]

    def ids(self) -> list[str]:
        return sorted(result["custom_id"] for result in self.results())

    def submit(self, server: Server, **options: Any) -> Summary:
        return Batch(server.url, self.source, self.target, **options).run()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_every_line_gets_its_answer_in_the_batch_format(server: Server, files: Files) -> None:
    names = [f"r{i}" for i in range(50)]
    files.write(*map(line, names))
    summary = files.submit(server, concurrency=8)
    assert (summary.total, summary.succeeded, summary.completion_tokens) == (50, 50, 100)
    assert files.ids() == sorted(names)
    first = files.results()[0]
    assert first["error"] is None
    assert first["response"] == {
        "status_code": 200, "request_id": "x", "body": {"id": "x", "usage": {"completion_tokens": 2}},
    }  # fmt: skip


@pytest.mark.parametrize("torn", ['{"id": "line-3", "cust', "", json.dumps({"id": "line-3", "custom_id": "c"})])
def test_a_second_run_goes_on_where_the_first_was_torn(server: Server, files: Files, torn: str) -> None:
    files.write(*map(line, "abcd"))
    done = [{"id": f"line-{i}", "custom_id": name, "response": {}, "error": None} for i, name in ((1, "a"), (2, "b"))]
    files.target.write_text("".join(f"{json.dumps(result)}\n" for result in done) + torn)
    summary = files.submit(server)
    assert (summary.before, summary.succeeded) == (2, 2)
    assert files.ids() == ["a", "b", "c", "d"]
    assert sorted(body["prompt"] for body in server.bodies) == ["c", "d"]


def test_a_run_that_is_done_asks_nothing(server: Server, files: Files) -> None:
    files.write(line("a"), "no json", line("b"))
    files.submit(server)
    before = files.target.read_bytes()
    server.bodies.clear()
    summary = files.submit(server)
    assert summary.before == summary.total == 3
    assert server.bodies == []
    assert files.target.read_bytes() == before


def test_a_run_that_is_cut_short_anywhere_is_finished_by_the_next(server: Server, files: Files) -> None:
    files.write(*(line(f"r{i}") for i in range(6)), "broken", line("last"))
    files.submit(server)
    whole = files.target.read_bytes()
    for cut in range(0, len(whole), 37):
        files.target.write_bytes(whole[:cut])
        files.submit(server, concurrency=3)
        results = files.results()
        assert len(results) == 8
        assert len({result["id"] for result in results}) == 8


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("{", "not JSON"),
        ("[1]", "no JSON object"),
        ('{"url": "/v1/completions", "body": {}}', "custom_id"),
        ('{"custom_id": "x", "url": "http://elsewhere/v1/x", "body": {}}', "url must be a path"),
        ('{"custom_id": "x", "url": "/v1/completions"}', "body is missing"),
        ('{"custom_id": "x", "method": "GET", "url": "/v1/completions", "body": {}}', "method must be POST"),
        ('{"custom_id": "x", "url": "/v1/completions", "body": {"stream": true}}', "stream"),
        ('{"custom_id": "x", "url": "/v1/completions", "body": {"temperature": NaN}}', "cannot be sent"),
        ('{"custom_id": "x", "url": "/v1/completions", "body": {"prompt": "\\ud800"}}', "cannot be sent"),
    ],
)
def test_a_bad_line_becomes_an_error_result_and_the_rest_goes_on(
    server: Server, files: Files, bad: str, why: str
) -> None:
    files.write(line("before"), bad, "", line("after"))
    summary = files.submit(server)
    assert (summary.succeeded, summary.failed) == (2, 1)
    (error,) = (result["error"] for result in files.results() if result["error"])
    assert error["code"] == "invalid_line"
    assert error["message"].startswith("line 2: ")
    assert why in error["message"]


def test_a_refused_request_keeps_the_servers_answer(server: Server, files: Files) -> None:
    server.answer = lambda body, times: (400, {}, {"error": {"message": "no such model"}})
    files.write(line("a"))
    summary = files.submit(server)
    assert summary.failed == len(server.bodies) == 1
    assert files.results()[0]["response"]["status_code"] == 400


def test_busy_servers_dropped_connections_and_failures_are_tried_again(server: Server, files: Files) -> None:
    trouble = itertools.cycle([(429, {"retry-after": "0.05"}), (503, {}), (0, {}), (502, {})])

    def answer(body: dict[str, Any], times: int) -> tuple[int, dict[str, str], dict[str, Any]]:
        return (*next(trouble), {}) if times == 1 else (200, {}, {"id": "x"})

    server.answer = answer
    names = [f"r{i}" for i in range(8)]
    files.write(*map(line, names))
    summary = files.submit(server, concurrency=4)
    assert (summary.succeeded, summary.retries) == (8, 8)
    assert files.ids() == names


def test_retry_after_is_honoured(server: Server, files: Files) -> None:
    server.answer = lambda body, times: (429, {"retry-after": "1"}, {}) if times == 1 else (200, {}, {})
    files.write(line("a"))
    started = time.monotonic()
    files.submit(server)
    assert time.monotonic() - started >= 1.0


def test_a_server_that_stays_away_ends_the_run_and_spoils_no_line(server: Server, files: Files) -> None:
    server.answer = lambda body, times: (200 if body["prompt"] == "a" else 0, {}, {})
    files.write(*map(line, "abc"))
    with pytest.raises(
        ClusterError, match=rf"^{files.source}:\d: {server.url} does not answer .* run the same command again"
    ):
        files.submit(server, patience=0.3, concurrency=1)
    assert files.ids() == ["a"]
    server.answer = lambda body, times: (200, {}, {})
    assert files.submit(server).before == 1
    assert files.ids() == ["a", "b", "c"]


def test_two_lines_with_one_custom_id_are_two_lines(server: Server, files: Files) -> None:
    files.write(line("a", n=1), line("a", n=2), line("b"))
    files.submit(server)
    whole = files.target.read_bytes()
    assert files.ids() == ["a", "a", "b"]
    files.target.write_bytes(whole[: whole.index(b"\n") + 1])
    files.submit(server)
    assert files.ids() == ["a", "a", "b"]


def test_a_file_that_holds_something_else_is_not_written_to(server: Server, files: Files) -> None:
    files.write(line("a"))
    files.target.write_text('{"my": "data"}\n')
    with pytest.raises(ClusterError, match=r"results\.jsonl:1: is no result"):
        files.submit(server)
    assert files.target.read_text() == '{"my": "data"}\n'


def test_only_one_process_writes_a_file(server: Server, files: Files) -> None:
    files.write(line("a"))
    with Results(files.target), pytest.raises(ClusterError, match="another"):
        files.submit(server)
    with pytest.raises(ClusterError, match="is the input"):
        Batch(server.url, files.source, files.source).run()


def test_results_keep_their_ids_and_answers_whatever_order_they_come_in(server: Server, files: Files) -> None:
    both, first_may_go = threading.Barrier(2), threading.Event()

    def answer(body: dict[str, Any], times: int) -> tuple[int, dict[str, str], dict[str, Any]]:
        both.wait(10)
        if body["prompt"] == "a":
            first_may_go.wait(10)
        return 200, {"x-request-id": f"id-of-{body['prompt']}"}, {"text": body["prompt"]}

    server.answer = answer
    files.write(line("a"), line("b"))
    summary = files.submit(server, concurrency=2, on_progress=lambda now: first_may_go.set())
    assert summary.succeeded == 2
    results = files.results()
    assert [(r["id"], r["custom_id"]) for r in results] == [("line-2", "b"), ("line-1", "a")]
    for result in results:
        name = result["custom_id"]
        assert result["response"] == {"status_code": 200, "request_id": f"id-of-{name}", "body": {"text": name}}


def test_a_request_that_comes_back_busy_still_gets_its_tries_at_a_broken_server(server: Server, files: Files) -> None:
    answers = {1: 503, 2: 429, 3: 500, 4: 200}
    server.answer = lambda body, times: (answers[times], {}, {})
    files.write(line("a"))
    summary = files.submit(server, rng=Hurry())
    assert (summary.succeeded, summary.retries) == (1, 3)


def test_a_server_that_is_away_is_named_while_it_is_waited_for(server: Server, files: Files) -> None:
    server.answer = lambda body, times: (0 if times == 1 else 200, {}, {})
    files.write(line("a"))
    seen: list[str] = []
    summary = files.submit(server, rng=Hurry(), on_progress=lambda now: seen.append(now.trouble))
    assert summary.succeeded == 1
    assert seen == [f"{server.url} does not answer (RemoteProtocolError)", ""]


def test_a_server_that_keeps_failing_is_believed_in_the_end(server: Server, files: Files) -> None:
    server.answer = lambda body, times: (500, {}, {"error": {"message": "out of\n order"}})
    files.write(line("a"), "", line("b"))
    summary = files.submit(server, rng=Hurry())
    assert (summary.failed, len(server.bodies)) == (2, 6)
    problem = f"{files.source}:{{}}: the server answered 500: out of order"
    assert sorted(summary.problems) == [problem.format(1), problem.format(3)]


class Hurry(random.Random):
    """Draws no pause at all."""

    def uniform(self, a: float, b: float) -> float:
        return 0.0


def test_answers_that_are_no_json_are_kept_as_text(server: Server, files: Files) -> None:
    server.answer = lambda body, times: (404, {}, b"<html>")
    files.write(line("a"))
    summary = files.submit(server)
    assert files.results()[0]["response"]["body"] == "<html>"
    assert summary.problems == [f"{files.source}:1: the server answered 404: no reason given"]


def test_problems_are_named_with_file_and_line_and_not_without_end(server: Server, files: Files) -> None:
    files.write(line("good"), *["{"] * 50)
    summary = files.submit(server)
    assert summary.failed == 50
    assert len(summary.problems) == 10
    assert summary.problems[0].startswith(f"{files.source}:2: the line is not JSON: ")


def test_a_full_disk_ends_the_run_and_the_next_goes_on(
    server: Server, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(*map(line, "abc"))
    write, written = os.write, itertools.count()

    def full(fd: int, data: bytes) -> int:
        if next(written) < 1:
            return write(fd, data)
        write(fd, data[:7])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("cluster.batch.os.write", full)
        with pytest.raises(ClusterError, match=r"No space left on device; make room, then run the same command again"):
            files.submit(server, concurrency=1)
    assert files.submit(server).before == 1
    assert files.ids() == ["a", "b", "c"]


def test_what_a_crashed_host_never_wrote_is_asked_again(server: Server, files: Files) -> None:
    """The file has grown, the disk never got some of it: zero bytes stand there."""
    files.write(*(line(f"r{i}") for i in range(6)))
    files.submit(server)
    lines = files.target.read_bytes().splitlines(keepends=True)
    for torn in (
        [*lines[:3], bytes(len(lines[3])), *lines[4:]],
        [*lines[:3], lines[3][:20] + bytes(len(lines[3]) - 20), *lines[4:]],
        [*lines[:5], bytes(100)],
        [bytes(4096), lines[5]],
    ):
        files.target.write_bytes(b"".join(torn))
        if torn[0][0]:
            assert files.submit(server).before == torn.index(next(part for part in torn if b"\0" in part))
        else:
            with pytest.raises(ClusterError, match="is no result"):  # it may be anything
                files.submit(server)
            files.target.unlink()
            files.submit(server)
        assert files.ids() == [f"r{i}" for i in range(6)]


def test_results_are_on_the_disk_while_it_runs_and_at_its_end(
    server: Server, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.submit.SYNC_EVERY", 0.01)
    synced: list[int] = []
    sync = os.fdatasync

    def seen(fd: int) -> None:
        sync(fd)
        synced.append(os.fstat(fd).st_size)
        while_it_ran.set()

    while_it_ran = threading.Event()
    monkeypatch.setattr("cluster.batch.os.fdatasync", seen)

    def answer(body: dict[str, Any], times: int) -> tuple[int, dict[str, str], dict[str, Any]]:
        if body["prompt"] == "b":
            assert while_it_ran.wait(10)
        return 200, {}, {}

    server.answer = answer
    files.write(*map(line, "ab"))
    files.submit(server, concurrency=1)
    assert len(synced) >= 2
    assert synced[-1] == files.target.stat().st_size


def test_a_key_is_shown_and_one_that_is_missing_spoils_no_line(
    server: Server, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer = lambda body, times: (401, {}, {"error": {"message": "no"}})
    files.write(*map(line, "abc"))
    with pytest.raises(ClusterError, match=r"lets nobody in without a key \(401\); let BATON_API_KEY be"):
        files.submit(server)
    assert files.target.read_bytes() == b""
    monkeypatch.setenv("BATON_API_KEY", "secret")
    server.answer = lambda body, times: (200, {}, {})
    files.submit(server)
    assert server.headers[-1]["authorization"] == "Bearer secret"
    assert files.ids() == ["a", "b", "c"]


def test_empty_files_need_no_server(server: Server, files: Files) -> None:
    files.write("", "   ")
    assert files.submit(server).total == 0
    assert server.bodies == []


def test_a_line_without_end_is_one_error(server: Server, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.batch.MAX_LINE", 200)
    files.write(line("a"), line("b", prompt="x" * 1000), line("c"))
    summary = files.submit(server)
    assert (summary.total, summary.succeeded, summary.failed) == (3, 2, 1)
    assert summary.problems[0].startswith(f"{files.source}:2: the line is longer than")


def test_a_run_needs_a_file_to_read_and_a_place_to_write(server: Server, tmp_path: Path) -> None:
    source, folder = tmp_path / "p.jsonl", tmp_path / "folder"
    source.write_text(line("a"))
    folder.mkdir()
    for from_, to, why in (
        (tmp_path / "no.jsonl", tmp_path / "r", "there is no file .*no.jsonl; name one with a request on each line"),
        (folder, tmp_path / "r", "there is no file .*folder"),
        (source, tmp_path / "nowhere" / "r", "there is no folder .*nowhere for r; make it, or name another file"),
        (source, folder, "folder is no file; name one for the results"),
        (source, Path("/dev/null"), "/dev/null is no file"),
        (source, tmp_path / ("x" * 300), "cannot be written: File name too long; name another file"),
    ):
        with pytest.raises(ClusterError, match=why):
            Batch(server.url, from_, to).run()
    assert server.bodies == []

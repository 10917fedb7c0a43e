"""A long file through `baton submit` against a real cluster: memory while it runs, lines a second, what a kill costs.

    baton up -d configs/topologies/local.yaml
    python benchmarks/jobs.py --lines 20000
    python benchmarks/jobs.py --lines 100000 --scripted    # a real gateway, behind it workers that only say tokens
    python benchmarks/jobs.py --lines 100000 --before 90000 --scripted    # as the last run of several

The file is run three times: until a quarter is done, when the process is killed; on to the end; and once more, where
every line has its result. Then each line must have exactly one.
"""

import argparse
import contextlib
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

# This folder's files must not stand in for packages of the same name.
sys.path[0] = str(Path(__file__).parents[1])

import psutil  # noqa: E402

from cluster import state  # noqa: E402

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--max-tokens", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--before", type=int, default=0, help="lines that have their results from an earlier run")
    parser.add_argument("--url", help="of a gateway; else the cluster that runs here")
    parser.add_argument("--scripted", action="store_true", help="a gateway of its own before workers without a model")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(scripted()) if options.scripted else options.url or state.find(None).url
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        prompts, results = Path(folder) / "prompts.jsonl", Path(folder) / "results.jsonl"
        write(prompts, options.lines, options.max_tokens)
        print(
            f"{options.lines} lines, {prompts.stat().st_size / MIB:.1f} MiB; at {url}, {options.concurrency} at a time"
        )
        run = [prompts, "-o", results, "--url", url, "--concurrency", options.concurrency]
        finish(results, options.before)
        submit("killed", run, results, kill_at=(options.lines - options.before) // 4)
        kept = sum(1 for _ in results.open("rb"))
        submit("resumed", run, results)
        submit("done already", run, results)
        check(results, options.lines, kept)


@contextlib.contextmanager
def scripted() -> Iterator[str]:
    """The URL of a gateway in a process of its own; its workers are those of the gateway's tests."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,))
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        process.join()


def serve(benchmark: Connection) -> None:
    from tests.gateway.conftest import serving
    from tests.gateway.fake_cluster import counting

    with serving(Path(__file__).parents[1] / "models" / "tiny-llama") as (cluster, server):

        def say(prompt: list[int], max_tokens: int) -> list[int]:
            cluster.received.clear()  # what it keeps for tests to look at
            return counting(prompt, max_tokens)

        cluster.script = say
        benchmark.send(server.url)
        benchmark.recv()


def write(path: Path, lines: int, max_tokens: int) -> None:
    with path.open("w") as file:
        for number in range(lines):
            body = {"model": "tiny-llama", "prompt": f"Story {number}: once upon a time", "max_tokens": max_tokens}
            line = {"custom_id": f"story-{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def finish(results: Path, lines: int) -> None:
    """Results as a run that was broken off leaves them."""
    with results.open("w") as file:
        for number in range(lines):
            response = {"status_code": 200, "request_id": f"{number:032x}", "body": {"choices": [{"text": " there"}]}}
            line = {"id": f"line-{number + 1}", "custom_id": f"story-{number}", "response": response, "error": None}
            file.write(json.dumps(line) + "\n")


def submit(what: str, arguments: list[object], results: Path, kill_at: int | None = None) -> None:
    """Run it to its end, or kill it after so many results; a line of figures."""
    before = count(results)
    started, seen = time.monotonic(), []
    command = [sys.executable, "-m", "cluster.cli", "submit", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                seen.append((count(results) - before, watched.memory_info().rss / MIB))
            except psutil.Error:  # it has just ended
                break
            if kill_at is not None and seen[-1][0] >= kill_at:
                process.kill()
            time.sleep(0.5)
        said = (process.communicate()[0] or "").strip().splitlines()
    seconds, done = time.monotonic() - started, count(results) - before
    points = [seen[len(seen) * part // 10] for part in range(1, 10)] if len(seen) >= 10 else seen
    memory = ", ".join(f"{lines}: {rss:.0f}" for lines, rss in points)
    print(f"{what}: {done} new results in {seconds:.0f} s, {done / seconds:.0f} a second; MiB after lines: {memory}")
    print(f"    at most {max(rss for _, rss in seen):.0f} MiB; it said: {said[-1] if said else 'nothing'}")


def count(path: Path) -> int:
    """Whole lines; read in pieces."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b""))


def check(results: Path, lines: int, kept: int) -> None:
    """Every line once, and all of them answered."""
    ids, failed = set(), 0
    with results.open("rb") as file:
        for line in file:
            result = json.loads(line)
            assert result["custom_id"] not in ids, f"{result['custom_id']} stands there twice"
            ids.add(result["custom_id"])
            failed += result["response"] is None or result["response"]["status_code"] != 200
    assert ids == {f"story-{number}" for number in range(lines)}
    print(f"{len(ids)} of {lines} lines once each, {kept} of them from before the kill; {failed} without an answer")


if __name__ == "__main__":
    main()

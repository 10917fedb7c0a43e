"""Promise: the commands that the README names do what they say, and leave nothing behind, however they end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest

from tests.e2e.conftest import CONFIGS, remains, wait_until
from tests.e2e.jobs import use_jobs

pytestmark = pytest.mark.ray
BATON = Path(sys.executable).with_name("baton")
COLOCATED = str(CONFIGS / "colocated.yaml")


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """State files go to a folder of the test's own; afterwards no process, socket, shared memory or file is left."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    before, processes = remains(), ours()
    yield
    assert remains() <= before
    assert ours() <= processes


def ours() -> set[int]:
    """Processes of Ray's or of ours, whoever's children they are."""
    names = re.compile(r"raylet|gcs_server|ray::|cluster\.cli|/baton ")
    found = set()
    for process in psutil.process_iter(["pid", "cmdline"]):
        if names.search(" ".join(process.info["cmdline"] or ())):
            found.add(process.info["pid"])
    return found


def baton(*arguments: str, code: int = 0, stdin: str = "") -> str:
    """What the command prints."""
    return run(BATON, *arguments, code=code, stdin=stdin)


def run(program: Path, *arguments: str, code: int = 0, stdin: str = "") -> str:
    done = subprocess.run([program, *arguments], input=stdin, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def request(number: int, prompt: str) -> str:
    body = {"model": "tiny-llama", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    return json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body})


@contextmanager
def foreground() -> Iterator[subprocess.Popen[str]]:
    """A launcher that is waited for; one that a test gives up is told to end."""
    command = [BATON, "up", COLOCATED, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        try:
            yield launcher
        finally:
            launcher.terminate()


def said_until(launcher: subprocess.Popen[str], words: str) -> str:
    """What it has printed when it prints these words, which it must."""
    assert launcher.stdout is not None
    said = ""
    for line in launcher.stdout:
        said += line
        if words in line:
            return said
    raise AssertionError(f"never said {words!r}: {said}")


def test_up_status_submit_chat_down(tmp_path: Path) -> None:
    with foreground() as launcher:
        shown = said_until(launcher, "Ctrl-C")
        url = re.search(r"http://127\.0\.0\.1:\d+", shown)
        assert url is not None and "ready" in shown
        use(url[0], tmp_path)
        with ThreadPoolExecutor(1) as threads:
            down = threads.submit(baton, "down")
            assert launcher.wait(60) == 0, "in good order: down sends SIGTERM, and kills who does not listen"
            assert "is stopped" in down.result()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url[0] + "/health")


def use(url: str, tmp_path: Path) -> None:
    """What can be done with a cluster that is up."""
    assert httpx.get(url + "/ready").status_code == 200
    assert "runs already" in baton("up", "--detach", COLOCATED, "--port", "0", code=1)
    status = baton("status")
    assert "worker-0" in status and "worker-1" in status and "2048" in status
    assert "nothing to measure" in (said := baton("doctor")) and "2 workers go together" in said

    prompts, results = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    lines = [request(number, f"Story {number}: once") for number in range(20)]
    prompts.write_text("\n".join(lines))
    assert "20 of 20 lines have their results" in baton("submit", str(prompts), "-o", str(results))
    first = results.read_bytes()
    told = [json.loads(line) for line in first.splitlines()]
    assert sorted(int(line["custom_id"]) for line in told) == list(range(20))
    assert {line["response"]["status_code"] for line in told} == {200}
    assert "20 before" in baton("submit", str(prompts), "-o", str(results))
    assert results.read_bytes() == first

    assert baton("chat", "--max-tokens", "8", stdin="Tell me a story.\n").strip()


def test_down_cleans_up_after_a_launcher_that_was_killed(tmp_path: Path) -> None:
    baton("up", "--detach", COLOCATED, "--port", "0")
    (file,) = (tmp_path / "baton").glob("*.json")
    launcher = json.loads(file.read_text())["pid"]
    os.kill(launcher, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(launcher), within=10, what="the launcher is gone")
    assert "is gone" in baton("status")
    baton("down")
    assert "no cluster runs" in baton("down", code=1)


def test_up_interrupted_while_it_starts_leaves_nothing() -> None:
    with foreground() as launcher:
        said_until(launcher, "worker-1: starting")
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(60) == 130


class SomebodysRay(NamedTuple):
    address: str
    dashboard: str


@pytest.fixture
def somebodys_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SomebodysRay]:
    """A Ray that was started without us, on loopback; `baton` is on the path of its jobs."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", str(BATON.parent), prepend=os.pathsep)
    with socket.socket() as probe, socket.socket() as other:
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, dashboard = probe.getsockname()[1], other.getsockname()[1]
    # Ray's sockets have long paths: not below the test's own folder.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        command = [
            BATON.with_name("ray"), "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=2",
            "--object-store-memory=80000000", f"--temp-dir={folder}",
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as head:
            assert head.stdout is not None
            try:
                for line in head.stdout:
                    if "--block" in line:  # "This command will now block"
                        break
                yield SomebodysRay(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
            finally:
                head.terminate()
                head.stdout.read()
                head.wait(30)


def test_up_joins_a_ray_that_is_there_and_gives_everything_back(tmp_path: Path, somebodys_ray: SomebodysRay) -> None:
    address = somebodys_ray.address
    topology = tmp_path / "joined.yaml"
    text = Path(COLOCATED).read_text().replace("../../models/tiny-llama", str(CONFIGS.parents[1] / "models/tiny-llama"))
    topology.write_text(f"{text}\ncluster: {{address: '{address}'}}\ndebug: {{record: journals}}\n")
    shown = baton("up", "--detach", str(topology), "--port", "0")
    url = re.search(r"http://127\.0\.0\.1:\d+", shown)
    assert url is not None and "ready" in shown
    body = {"model": "tiny-llama", "prompt": "Once", "max_tokens": 4}
    try:
        assert httpx.post(url[0] + "/v1/completions", json=body, timeout=30).status_code == 200
        use_jobs(partial(run, BATON.with_name("ray")), baton, somebodys_ray.dashboard, tmp_path / "jobs")
    finally:
        assert "is stopped" in baton("down")
    look = (
        f"import ray; ray.init('{address}', logging_level='ERROR', log_to_driver=False)\n"
        "from ray.util import list_named_actors, placement_group_table\n"
        "groups = [group for group in placement_group_table().values() if group['state'] != 'REMOVED']\n"
        "print(groups, list_named_actors(all_namespaces=True), ray.available_resources()['CPU'])"
    )
    left = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, timeout=60)
    assert left.stdout.split() == ["[]", "[]", "2.0"]
    replayed = baton("replay", *map(str, (tmp_path / "journals").iterdir())).splitlines()
    assert sorted(line.partition(".")[0] for line in replayed) == ["gateway", "router", "worker-0", "worker-1"]
    assert all(line.endswith("actions equal") for line in replayed)


def test_the_demo_shows_who_ran_what() -> None:
    shown = baton("demo")
    assert re.search(r"1 +prefill-\d +decode-\d +[\d.]+ KiB +[\d.]+ m?s +[\d.]+ m?s", shown)
    assert "no process, socket file or shared memory is left behind" in shown

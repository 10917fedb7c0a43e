"""Promise: from an empty set of hosts to a serving cluster and back; hosts may be cut off or crash under load.

Three hosts on this machine, each with a network, processes and files of its own; `ray up` over ssh, with the
on-premise file that ships but for its addresses and the installation, which they share. One test goes on where
the one before it has stopped.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from baton import LLM, SamplingParams
from engine.cpu.jit import cache_folder
from tests.hosts.namespaces import FREE_PORTS, LAUNCHER, STRANGER, Hosts, missing

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny-llama"
HEAD, FIRST, SECOND = "h0", "h1", "h2"
PORT, GRPC_PORT = 8000, 9000
DASHBOARD = "http://127.0.0.1:8265"
pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(600)]

PROFILE = f"""
export PATH={Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin PYTHONPATH={ROOT}
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token RAY_UP_enable_autoscaler_v2=0
export BATON_CACHE_DIR={cache_folder().parents[1]} OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export NO_COLOR=1 COLUMNS=200
"""
TOPOLOGY: dict[str, Any] = {
    "model": str(MODEL),
    "dtype": "float32",
    "pools": [
        {"name": "prefill", "role": "prefill", "placement": {"labels": {"role": "prefill"}}},
        # With more than half of a host for each worker, it waits for its host to come back.
        {
            "name": "decode",
            "role": "decode",
            "replicas": 2,
            "placement": {"labels": {"role": "decode"}},
            "resources": {"cpus": 1.5},
        },
    ],
    "kv": {"memory": "96MiB", "transport": "auto"},
    "disaggregation": {"policy": "always"},
    "gateway": {"host": "10.77.0.10", "port": PORT, "grpc_port": GRPC_PORT},
    "cluster": {"name": "hosts", "min_hosts": 3, "wait_for_room": 120},
    "security": {"keys": "cluster.key", "api_keys": "api-keys.json"},
}


class Site:
    """The hosts, and what was started on them."""

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        self.folder, self.hosts = folder, hosts
        self.yaml = str(folder / "cluster.yaml")
        self.topology = str(folder / "topology.yaml")
        self.key = ""
        """Of the gateway."""

    def on_head(self, *command: str) -> list[str]:
        """With the gateway's key."""
        return self.hosts.command(HEAD, *self._with_key(), *command)

    def baton(self, *arguments: str, within: float = 120, code: int = 0) -> str:
        """On the head; what it prints."""
        return self.hosts.run(HEAD, *self._with_key(), "baton", *arguments, within=within, code=code)

    def _with_key(self) -> tuple[str, ...]:
        return ("env", f"BATON_API_KEY={self.key}") if self.key else ()

    def write_files(self) -> None:
        text = (ROOT / "configs" / "ray" / "on-premise.yaml").read_text().replace("10.0.0.", "10.77.0.")
        # The head is the host for prefill too: there are three.
        text = text.replace("role=head", "role=prefill").replace(f'*" {self.hosts.address(FIRST)} "*)', "none)")
        config = yaml.safe_load(text)
        config["provider"]["worker_ips"] = [self.hosts.address(host) for host in (FIRST, SECOND)]
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.hosts.folder / "id")}
        config |= {"min_workers": 2, "max_workers": 2, "setup_commands": [], "head_setup_commands": []}
        config["file_mounts"] = {"/tmp/home/.ray/auth_token": "/tmp/home/.ray/auth_token"}
        Path(self.yaml).write_text(yaml.safe_dump(config, sort_keys=False))
        Path(self.topology).write_text(yaml.safe_dump(TOPOLOGY, sort_keys=False))

    def wait_until(self, done: Callable[[], bool], within: float, what: str) -> None:
        started = time.monotonic()
        while not done():
            assert time.monotonic() - started < within, f"{what}: not within {within} s: {self.baton('status')}"
            time.sleep(2)  # each look is a process that starts

    def all_run(self) -> bool:
        """Every worker serves, and nothing waits to be started."""
        said = self.baton("status")
        return not re.search(r"^\S+ +lost|back-off|(starting|stopping|ending) for", said, re.MULTILINE)

    def nodes(self) -> dict[str, str]:
        """The host of each worker, as it says itself."""
        return {each["worker"]: each["node"] for each in json.loads(self.baton("doctor", "--json"))["workers"]}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A cluster that serves: Ray by `ray up`, Baton by `baton up`."""
    why_not = missing()
    if why_not:
        pytest.skip(f"no hosts can be made here: {why_not}")
    folder = tmp_path_factory.mktemp("site")
    for each in (folder, *folder.parents[:2]):
        each.chmod(0o755)
    hosts = Hosts(folder, 3, PROFILE, [ROOT, Path(sys.prefix)])
    try:
        hosts.up()
        site = Site(folder, hosts)
        site.write_files()
        hosts.run(LAUNCHER, "ray", "get-auth-token", "--generate")
        hosts.run(LAUNCHER, "ray", "up", "-y", "--no-config-cache", site.yaml, within=180)
        site.baton("keys", "--out", str(folder / "cluster.key"))
        site.key = site.baton("keys", "api", "tests", "--admin", "--file", str(folder / "api-keys.json")).strip()
        site.baton("up", "--detach", "--address", "auto", site.topology, within=240)
        yield site
    finally:
        hosts.down()


def requests(count: int, tokens: int) -> list[dict[str, Any]]:
    once = "There were once {} princes who went into the wide world. "
    common = {"model": "tiny-llama", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return [{**common, "prompt": once.format(number) * (1 + number % 5)} for number in range(count)]


def expected(bodies: list[dict[str, Any]]) -> list[str]:
    """What they are answered where there is one process and nothing fails."""
    with LLM(model=str(MODEL), dtype="float32") as llm:
        params = SamplingParams(max_tokens=bodies[0]["max_tokens"], temperature=0, ignore_eos=True)
        return [output.outputs[0].text for output in llm.generate([body["prompt"] for body in bodies], params)]


def stream(
    site: Site, bodies: list[dict[str, Any]], at_once: int, heard: Callable[[dict[str, Any]], None] = lambda said: None
) -> dict[int, dict[str, Any]]:
    """What became of each; ``heard`` is called with whatever the client says while it runs."""
    file = site.folder / "requests.jsonl"
    file.write_text("\n".join(map(json.dumps, bodies)))
    url = f"http://{site.hosts.address(HEAD)}:{PORT}"
    command = ["python", "-m", "tests.hosts.client", url, str(file), str(at_once), site.key]
    ended = {}
    with subprocess.Popen(site.hosts.command(LAUNCHER, *command), stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        for line in client.stdout:
            said = json.loads(line)
            if "ended" in said:
                ended[said["ended"]] = said
            heard(said)
    assert client.returncode == 0
    return ended


def test_each_worker_runs_where_its_pool_is_placed_and_kv_goes_over_zmq(site: Site) -> None:
    examined = json.loads(site.baton("doctor", "--json"))
    assert {each["worker"]: each["node"] for each in examined["workers"]}["prefill-0"] == HEAD
    assert sorted(each["node"] for each in examined["workers"] if each["role"] == "decode") == [FIRST, SECOND]
    assert [pair["transport"] for pair in examined["pairs"]] == ["zmq", "zmq"]
    assert not examined["findings"]


def test_a_stranger_finds_only_the_declared_ports_and_is_refused_at_each(site: Site) -> None:
    sshd, gateway, rays, workers = {22}, {PORT, GRPC_PORT}, set(range(6379, 6386)), set(range(10002, 12000))
    targets = []
    for host in site.hosts.names:
        found = site.hosts.listening(host)
        assert found <= sshd | gateway | rays | workers | set(FREE_PORTS), host
        assert found & gateway == (gateway if host == HEAD else set())
        assert len(found & set(FREE_PORTS)) == {HEAD: 4, FIRST: 2, SECOND: 2}[host], "a mailbox each, KV for workers"
        targets += [f"{site.hosts.address(host)}:{port}" for port in sorted(found - sshd)]
    answered = json.loads(site.hosts.run(STRANGER, "python", "-m", "tests.hosts.stranger", *targets))
    assert answered == {target: [] for target in targets}


def test_200_requests_are_answered_right(site: Site) -> None:
    bodies = requests(200, 16)
    ended = stream(site, bodies, at_once=16)
    assert [(ended[number]["text"], ended[number]["error"]) for number in range(200)] == [
        (text, "") for text in expected(bodies)
    ]


def test_a_host_that_is_cut_off_under_load_loses_no_stream_and_serves_again(site: Site) -> None:
    bodies = requests(24, 400)
    begun: set[int] = set()

    def heard(said: dict[str, Any]) -> None:
        begun.add(said.get("begun", -1))
        if len(begun - {-1}) == 8 and said.get("begun") is not None:
            site.hosts.cut(SECOND)

    ended = stream(site, bodies, at_once=8, heard=heard)
    assert [(ended[number]["text"], ended[number]["error"]) for number in range(24)] == [
        (text, "") for text in expected(bodies)
    ]
    site.wait_until(lambda: "last death" in site.baton("status"), within=30, what="Ray takes the host for lost")
    assert not site.all_run()
    site.hosts.heal(SECOND)
    site.wait_until(site.all_run, within=150, what="both decode workers serve")
    assert sorted(site.nodes().values()) == [HEAD, FIRST, SECOND]


def test_a_job_gets_every_line_once_although_a_host_crashes(site: Site) -> None:
    prompts, results = site.folder / "prompts.jsonl", site.folder / "results.jsonl"
    with prompts.open("w") as file:
        for number, body in enumerate(requests(1000, 8)):
            line = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    command = site.on_head(
        "baton", "submit", str(prompts), "-o", str(results), "--cluster", "hosts", "--address", DASHBOARD
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        while not results.exists() or results.read_bytes().count(b"\n") < 200:
            assert job.poll() is None
            time.sleep(0.1)  # the file is all that tells
        site.hosts.crash(FIRST)
        said, _ = job.communicate(timeout=180)
    assert job.returncode == 0, said
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert sorted(int(line["custom_id"]) for line in lines) == list(range(1000))
    assert {line["response"]["status_code"] for line in lines} == {200}
    assert not site.hosts.run(HEAD, "sh", "-c", f"grep -rl {site.key} /tmp/ray ~/.local/state || true"), "the API key"
    site.hosts.boot(FIRST)
    site.wait_until(site.all_run, within=150, what="both decode workers serve")
    assert sorted(site.nodes().values()) == [HEAD, FIRST, SECOND]


def test_down_leaves_nothing_on_any_host(site: Site) -> None:
    site.baton("down", "hosts")
    for host in site.hosts.names:
        assert not [line for line in site.hosts.processes(host) if "Host" in line], "actors of ours"
        assert "memfd:baton" not in site.hosts.run(host, "sh", "-c", "ls -l /proc/[0-9]*/fd 2>/dev/null || true")
    assert site.hosts.run(HEAD, "sh", "-c", "ls ~/.local/state/baton").split() == ["hosts.log", "jobs"], "and results"
    site.hosts.run(LAUNCHER, "ray", "down", "-y", site.yaml, within=120)
    for host in site.hosts.names:
        emptied = time.monotonic() + 120  # Ray's agents look for their raylet now and then
        while (left := site.hosts.processes(host)) and time.monotonic() < emptied:
            time.sleep(0.5)  # each look is a process that starts
        assert not left, host
        assert site.hosts.run(host, "sh", "-c", "ls /dev/shm") == ""
        known = {"home", *site.folder.parts, *ROOT.parts}
        left = [name for name in site.hosts.run(host, "ls", "/tmp").split() if name not in known]
        # Logs; a folder for the autoscaler's ssh, and one for sockets of the dashboard.
        assert all(name == "ray" or name.startswith(("ray_ssh_", "pymp-")) for name in left), left

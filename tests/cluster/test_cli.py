"""What a user sees who types something wrong, or whose cluster is not there: a clear line and an exit code."""

import json
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from cluster import cli, state
from cluster.doctor import _workers_of
from cluster.errors import ClusterError, LaunchError
from cluster.findings import Known
from cluster.ray_session import RaySession
from messages.common import Role
from tests.cluster.server import Server

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "up", "down", "status", "drain", "flip", "restart", "validate", "submit", "chat", "trace", "doctor", "demo",
)  # fmt: skip
TOPOLOGY = "pools: [{{name: a, role: colocated, resources: {{cpus: 0.1}}}}]\nmodel: {model}\ngateway: {{port: 0}}\n"


class Said(NamedTuple):
    code: int
    out: str
    err: str


Baton = Callable[..., Said]


@pytest.fixture
def baton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Baton:
    """The program itself, in this process."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "dumb")

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["baton", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return Said(int(ended.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def topology(tmp_path: Path, tiny_llama: Path) -> Path:
    """One that this machine can run."""
    path = tmp_path / "small.yaml"
    path.write_text(TOPOLOGY.format(model=tiny_llama))
    return path


@pytest.fixture
def gateway(server: Server) -> Server:
    """Answers like a gateway that has one model."""
    server.pages["/v1/models"] = (200, {"data": [{"id": "tiny[/]llama"}]})
    return server


def runs(name: str, url: str | None, **changes: Any) -> state.ClusterFile:
    """Note a cluster as if this process had launched it."""
    file = replace(state.claim(name, Path("/some[/]where/x.yaml")), url=url, **changes)
    state._write(file)
    return file


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    shown = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "160", "TERM": "dumb"})
    assert shown.exit_code == 0
    assert f"baton {command}" in shown.output.replace(f"Usage: baton {command}", "")
    documented = [line for line in shown.output.splitlines() if line.startswith("│ ")]
    assert all(len(line.split()) > 4 for line in documented if " --" in line), "an option without a word"


def test_help_lists_all_commands_and_says_how_to_start(baton: Baton) -> None:
    said = baton("--help")
    assert said.code == 0
    assert all(f"│ {command} " in said.out for command in COMMANDS)
    assert "Start with baton demo" in said.out
    assert baton("-h").out == said.out


def test_the_version_is_told(baton: Baton) -> None:
    assert baton("--version") == (0, f"baton {version('baton-serve')}\n", "")


# Wrong options and arguments


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("dwon", "No such command 'dwon'. Did you mean 'down'?"),
        ("--verbose", "No such option: --verbose"),
        ("up", "Missing argument 'TOPOLOGY'"),
        ("up a.yaml b.yaml", "unexpected extra argument"),
        ("up a.yaml --port 65536", "Invalid value for '--port'"),
        ("up a.yaml --port http", "Invalid value for '--port'"),
        ("up a.yaml --detatch", "No such option: --detatch"),
        ("validate", "Missing argument 'TOPOLOGY'"),
        ("demo now", "unexpected extra argument"),
        ("submit", "Missing argument 'PROMPTS.JSONL'"),
        ("submit p.jsonl", "name a file for the results with -o"),
        ("submit p.jsonl -o r.jsonl --url http://a --topology t.yaml", "name one of --url, --cluster, --topology and"),
        ("submit p.jsonl -o r.jsonl --address http://a --url http://b", "name one of --url, --cluster, --topology and"),
        ("submit p.jsonl --no-wait", "--no-wait is for a job: name its --address"),
        ("submit p.jsonl -o r.jsonl --no-wait --address http://a", "--no-wait needs no -o"),
        ("submit p.jsonl -o r.jsonl --address 10.0.0.1:8265", "--address must look like http://127.0.0.1:8000"),
        ("job results baton-0", "Missing option '--output' / '-o'"),
        ("submit p.jsonl -o r.jsonl --concurrency 0", "Invalid value for '--concurrency'"),
        ("submit p.jsonl -o r.jsonl --patience -1", "Invalid value for '--patience'"),
        ("chat --temperature 3", "Invalid value for '--temperature'"),
        ("chat --max-tokens 0", "Invalid value for '--max-tokens'"),
        ("chat local --url http://a", "name a cluster or a --url, not both"),
        ("chat --url localhost:8000", "--url must look like http://127.0.0.1:8000, got 'localhost:8000'"),
        ("chat --url http://", "--url must look like http://127.0.0.1:8000, got 'http://'"),
        ("chat --url http://a:b", "--url must look like http://127.0.0.1:8000, got 'http://a:b'"),
        ("chat --url http://[::1", "--url must look like http://127.0.0.1:8000"),
        ("chat --url ftp://a", "--url must look like http://127.0.0.1:8000"),
    ],
)
def test_a_wrong_call_is_told_what_is_wrong(baton: Baton, arguments: str, why: str) -> None:
    said = baton(*arguments.split())
    assert said.code == 2
    assert why in said.err
    assert "-h' for help" in said.err
    assert said.out == ""


# validate and up


@pytest.mark.parametrize("file", ["local.yaml", "colocated.yaml"])
def test_shipped_topologies_are_valid_and_their_plan_is_shown(
    baton: Baton, file: str, tmp_path: Path, tiny_llama: Path
) -> None:
    text = (ROOT / "configs" / "topologies" / file).read_text().replace("../../models/tiny-llama", str(tiny_llama))
    free = tmp_path / file  # port 8000 may be taken here
    free.write_text(text.replace("port: 8000", "port: 0") if "port:" in text else f"{text}\ngateway: {{port: 0}}\n")
    said = baton("validate", free)
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("OK\n")
    assert "tiny-llama (LlamaForCausalLM, 6 layers, bfloat16)" in said.out
    assert "and 2048 blocks (96.0 MiB) of bfloat16 KV each" in said.out


@pytest.mark.parametrize("command", ["validate", "up", "up -d"])
def test_a_wrong_topology_is_refused_by_every_command_that_takes_one(
    baton: Baton, tmp_path: Path, command: str
) -> None:
    path = tmp_path / "t.yaml"
    path.write_text("modle: m\npools: []\n")
    said = baton(*command.split(), path)
    assert said.code == 2
    assert said.out == ""
    assert said.err.splitlines() == [
        f"{path}:1: 'model' is missing; add it",
        f"{path}:1: unknown key 'modle'; did you mean 'model'?",
        f"{path}:2: pools is empty; give at least one",
    ]


def test_what_the_machine_cannot_do_is_said_all_at_once(baton: Baton, tmp_path: Path, tiny_llama: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(
        f"model: {tiny_llama}\ngateway: {{host: 192.0.2.1}}\nkv: {{memory: 900TiB}}\n"
        "pools:\n  - {name: a, role: colocated, replicas: 900, resources: {cpus: 1000}}\n"
    )
    said = baton("validate", path)
    assert said.code == 2
    gateway, memory, cpus = said.err.splitlines()
    assert gateway == f"{path}:2: gateway.host: 192.0.2.1 is not an address of this machine; write one that is"
    assert memory.startswith(f"{path}:3: weights and KV of all workers take 810000.0 TiB, this machine has ")
    assert memory.endswith("free; lower kv.memory or replicas")
    assert cpus.startswith(f"{path}:4: all processes together take 900,000 CPUs, this machine has ")


def test_a_missing_model_hides_no_other_complaint(baton: Baton, tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text("pools: [{name: a, role: colocated, replicas: 9, resources: {cpus: 1000}}]\nmodel: nowhere\n")
    said = baton("validate", path)
    assert said.code == 2
    assert [line.split(": ")[0] for line in said.err.splitlines()][:2] == [f"{path}:2", f"{path}:1"]


def test_a_taken_port_is_named(baton: Baton, topology: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        topology.write_text(topology.read_text().replace("port: 0", f"port: {port}"))
        said = baton("validate", topology)
    assert said.code == 2
    why = f"gateway.port: {port} is taken by another program; write another, or 0 for any free one"
    assert said.err == f"{topology}:3: {why}\n"


def test_a_taken_port_of_grpc_is_named(baton: Baton, topology: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        topology.write_text(topology.read_text().replace("port: 0", f"port: 0, grpc_port: {port}"))
        said = baton("validate", topology)
    assert said.code == 2
    assert f"gateway.grpc_port: {port} is taken by another program" in said.err


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 80])
def test_a_host_that_nobody_knows_is_named(baton: Baton, topology: Path, host: str) -> None:
    topology.write_text(topology.read_text().replace("port: 0", f"host: {host}"))
    said = baton("validate", topology)
    assert said.code == 2
    assert said.err == f"{topology}:3: gateway.host: {host!r} is not known here; write an address of this machine\n"


def test_a_model_of_the_hub_is_valid_as_far_as_can_be_said(baton: Baton, topology: Path) -> None:
    text = topology.read_text().splitlines()
    topology.write_text("\n".join([text[0], "model: nobody-here/has-this", text[2]]))
    said = baton("validate", topology)
    assert said.code == 0
    assert "nobody-here/has-this will be fetched from the Hugging Face Hub first" in said.out
    topology.write_text(topology.read_text().replace("cpus: 0.1", "cpus: 1000"))
    assert baton("validate", topology).code == 2


# No cluster


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("status", "no cluster runs; start one with `baton up TOPOLOGY`"),
        ("status local", "no cluster named 'local' runs; `baton status` lists those that do"),
        ("chat", "no cluster runs; start one with `baton up TOPOLOGY`"),
        ("chat local", "no cluster named 'local' runs; `baton status` lists those that do"),
        ("submit {prompts} -o {results}", "no cluster runs; start one with `baton up TOPOLOGY`"),
        ("submit {prompts} -o {results} --cluster local", "no cluster named 'local' runs; `baton status` lists those"),
        ("down", "no cluster runs"),
        ("down local", "no cluster named 'local' runs"),
        ("status Local", "'Local' is no name of a cluster: lower-case letters, digits and dashes"),
        ("chat --url http://127.0.0.1:1", "http://127.0.0.1:1 does not answer: [Errno 111] Connection refused; `baton"),
    ],
)
def test_without_a_cluster_the_next_step_is_told(baton: Baton, tmp_path: Path, arguments: str, why: str) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("")
    said = baton(*arguments.format(prompts=prompts, results=tmp_path / "r.jsonl").split())
    assert said.code == 1
    assert said.err.startswith(why)
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("request_id", ["../status", "a/b", "a?b", "", "x" * 101])
def test_what_is_no_request_is_not_asked_for(baton: Baton, server: Server, request_id: str) -> None:
    said = baton("trace", request_id, "--url", server.url)
    assert said.code == 1 and said.err.count("\n") == 1
    assert "is no request: take the x-request-id of an answer" in said.err


def test_the_doctor_is_told_of_lost_workers_too(server: Server) -> None:
    workers = [{"worker": f"decode-{number}", "role": "decode", "alive": number > 0} for number in range(2)]
    server.pages["/status"] = (200, {"cluster": {"workers": workers}})
    file = runs("a", server.url)
    assert _workers_of(file) == [Known("decode-0", Role.DECODE, False), Known("decode-1", Role.DECODE, True)]
    server.pages["/status"] = (200, {"cluster": None})
    with pytest.raises(ClusterError, match="does not hear its router"):
        _workers_of(file)


def test_of_several_clusters_one_has_to_be_named(baton: Baton) -> None:
    runs("a", "http://127.0.0.1:1")
    runs("b", None)
    for command in ("chat", "down"):
        said = baton(command)
        assert (said.code, said.err.split(";")[0]) == (1, "several clusters run (a, b)")
    assert baton("chat", "b").err == "b is still starting; `baton status` says when it is ready\n"


def test_status_shows_every_cluster_also_those_that_do_not_answer(baton: Baton, server: Server) -> None:
    worker = {
        "worker": "decode-0", "role": "decode", "alive": True, "running": 3, "waiting": 1, "kv_bytes_sent": 0,
        "kv_bytes_received": 3 << 20, "blocks": {"free": 90, "held": 10, "cached": 0, "total": 100},
    }  # fmt: skip
    lost = {**worker, "worker": "decode-1", "alive": False}
    status = {"ready": True, "sequences_in_flight": 4, "cluster": {"workers": [worker, lost], "queued": 2}}
    server.pages["/status"] = (200, status)
    runs("away", "http://127.0.0.1:1")
    runs("dead", None, started=1)
    runs("fine", server.url)
    runs("new", None)
    said = baton("status")
    assert said.code == 0
    assert "away  http://127.0.0.1:1" in said.out and "/some[/]where/x.yaml" in said.out
    assert "http://127.0.0.1:1 does not answer: [Errno 111] Connection refused" in said.out
    assert "is gone; `baton down dead` cleans up" in said.out
    assert "new  starting" in said.out
    rows = [line.split() for line in said.out.splitlines() if line.startswith("decode-")]
    counts = ["3", "1", "90", "10", "0", "100", "0", "B", "3.0", "MiB"]
    assert rows == [["decode-0", "decode", *counts], ["decode-1", "lost", *counts]]
    assert "ready; 4 sequences in flight, 2 waiting for a worker" in said.out
    assert "away" not in baton("status", "fine").out


def test_down_takes_the_note_of_a_dead_launcher_away(baton: Baton) -> None:
    runs("dead", None, started=1)
    assert baton("down") == (0, "dead is stopped\n", "")
    assert state.every() == []


def test_down_forgets_hosts_that_it_could_not_look_through_only_when_told_to(
    baton: Baton, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: RaySession) -> None:
        raise LaunchError("there is no Ray to join")

    monkeypatch.setattr(RaySession, "start", gone)
    runs("dead", None, started=1, ray_address="10.0.0.1:6379")
    code, _, said = baton("down")
    assert code == 1 and "not looked through: there is no Ray to join" in said and "down dead --forget" in said
    assert [file.name for file in state.every()] == ["dead"]
    with pytest.raises(ClusterError, match="baton down dead"):
        state.claim("dead", Path("x.yaml"))
    code, _, said = baton("down", "dead", "--forget")
    assert code == 1 and "10.0.0.1:6379: there is no Ray to join" in said
    assert state.every() == []


def test_a_broken_note_is_named(baton: Baton, state_folder: Path) -> None:
    state.folder()
    (state_folder / "x.json").write_text("{")
    for command in ("status", "down", "chat"):
        said = baton(command)
        assert said.code == 1
        assert said.err.startswith(f"{state_folder}/x.json: cannot be read as the note of a running cluster")


# submit


def test_submit_names_the_lines_that_failed(baton: Baton, server: Server, tmp_path: Path) -> None:
    prompts, results = tmp_path / "p.jsonl", tmp_path / "r.jsonl"
    good = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once"}}
    prompts.write_text(f"{json.dumps(good)}\nOnce upon a time\n")
    said = baton("submit", prompts, "-o", results, "--url", f"{server.url}/v1/")
    assert said.code == 1
    assert "2 of 2 lines have their results; 1 answered now; 1 with an error" in said.out
    assert said.err == f"{prompts}:2: the line is not JSON: Expecting value: line 1 column 1 (char 0)\n"
    again = baton("submit", prompts, "-o", results, "--url", server.url)
    assert (again.code, again.err) == (0, "")
    assert "2 of 2 lines have their results; 0 answered now, 2 before" in again.out
    assert len(server.bodies) == 1


def test_submit_shows_ten_bad_lines_and_counts_the_rest(baton: Baton, server: Server, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("{\n" * 12)
    said = baton("submit", prompts, "-o", tmp_path / "r.jsonl", "--url", server.url)
    assert len(said.err.splitlines()) == 11
    assert said.err.endswith("... and 2 more, all in the results\n")


def test_submit_looks_at_its_files_before_it_starts_a_cluster(baton: Baton, tmp_path: Path, topology: Path) -> None:
    said = baton("submit", tmp_path / "p.jsonl", "-o", tmp_path / "r.jsonl", "--topology", topology)
    assert (said.code, said.err) == (1, f"there is no file {tmp_path}/p.jsonl; name one with a request on each line\n")


def test_submit_that_is_interrupted_says_how_to_go_on(
    baton: Baton, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.submit.Batch.run", interrupted)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("")
    said = baton("submit", prompts, "-o", tmp_path / "r.jsonl", "--url", server.url)
    assert (said.code, said.err) == (130, "stopped; run the same command again to go on where it stopped\n")


def test_submit_uses_the_one_cluster_that_runs(baton: Baton, server: Server, tmp_path: Path) -> None:
    runs("local", server.url)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"custom_id": "a", "url": "/v1/completions", "body": {}}))
    assert baton("submit", prompts, "-o", tmp_path / "r.jsonl").code == 0
    assert server.bodies == [{}]


# chat


def sse(*chunks: object) -> bytes:
    lines = [chunk if isinstance(chunk, str) else json.dumps(chunk) for chunk in chunks]
    return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode()


def delta(text: str, **extra: object) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, **extra}]}


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What the user types; then the end of the input."""

    def type_(*lines: str) -> None:
        typed = iter(lines)

        def read(prompt: str = "") -> str:
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)

    return type_


def test_chat_streams_the_answer_and_remembers_the_conversation(baton: Baton, gateway: Server, says: Any) -> None:
    trace = {"prefill_worker": "prefill-0", "decode_worker": "decode-1", "ttft_ms": 12.3}
    gateway.answer = lambda body, times: (200, {}, sse(delta("Hello "), delta("[/b]"), delta("", baton=trace)))
    says("Hi", "", "Again", "/clear", "Anew", "/quit", "never sent")
    said = baton("chat", "--url", gateway.url, "--system", "Be brief", "--max-tokens", "7", "--temperature", "0")
    assert (said.code, said.err) == (0, "")
    assert f"tiny[/]llama at {gateway.url}" in said.out
    assert said.out.count("Hello [/b]\n") == 3
    assert "prefill-0 -> decode-1, first token after 12 ms" in said.out
    talks = [[message["content"] for message in body["messages"]] for body in gateway.bodies]
    assert talks == [["Be brief", "Hi"], ["Be brief", "Hi", "Hello [/b]", "Again"], ["Be brief", "Anew"]]
    sampling = {"model": "tiny[/]llama", "max_tokens": 7, "temperature": 0.0, "stream": True}
    assert sampling.items() <= gateway.bodies[0].items()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((400, {}, {"error": {"message": "too [/long]"}}), "400: too [/long]"),
        ((500, {}, b"oops"), "the server answered 500"),
        ((0, {}, b""), "the answer was cut off (RemoteProtocolError)"),
        ((200, {}, sse(delta("So"), {"error": {"message": "worker lost"}})), "So\nthe server gave up: worker lost"),
        ((200, {}, sse({"error": "worker lost"})), "the server gave up: worker lost"),
        ((200, {}, sse("{")), "the server sent something else than a chunk: 'data: {'"),
    ],
)
def test_a_turn_that_fails_is_taken_back_and_the_chat_goes_on(
    baton: Baton, gateway: Server, says: Any, answer: Any, why: str
) -> None:
    gateway.answer = lambda body, times: answer if body["messages"][-1]["content"] == "bad" else (200, {}, sse())
    says("bad", "good")
    said = baton("chat", "--url", gateway.url)
    assert said.code == 0
    assert why in said.out
    assert gateway.bodies[-1]["messages"] == [{"role": "user", "content": "good"}]


@pytest.mark.parametrize(
    ("page", "why"),
    [
        ((404, b"<html>"), "/v1/models: the server answered 404"),
        ((503, {"error": {"message": "not ready"}}), "/v1/models: 503: not ready"),
        ((200, b"<html>"), "/v1/models is no JSON; is this a gateway?"),
        ((200, {"data": []}), "/v1/models names no model; is this a gateway?"),
        ((200, []), "/v1/models names no model; is this a gateway?"),
    ],
)
def test_chat_with_something_that_is_no_gateway_says_so(baton: Baton, server: Server, page: Any, why: str) -> None:
    server.pages["/v1/models"] = page
    said = baton("chat", "--url", server.url)
    assert (said.code, said.err) == (1, f"{server.url}{why}\n")

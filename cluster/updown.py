"""`baton up` and `baton down`: a launcher that stays with its cluster, in the foreground or as a daemon."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.markup import escape

from cluster import state
from cluster.errors import ClusterError, LaunchError
from cluster.hosts import Hosts
from cluster.marks import name_of
from cluster.ray_session import RaySession, remove_remains
from cluster.running import running
from cluster.topology import Topology

STOP_WITHIN = 60.0
"""Seconds that a launcher gets to take its cluster down."""
LOG_LINES = 20


def up(console: Console, source: Path, port: int | None, address: str | None) -> None:
    """Start, stay until SIGINT or SIGTERM, take down."""
    topology = load(source, port, address)
    with running(topology, console, source=source.resolve()) as (cluster, signals):
        signals.only_note()
        keyed = topology.security.api_keys is not None
        _banner(console, cluster.url, cluster.plan.served_model_name, topology.name, keyed=keyed)
        console.print("Ctrl-C stops it", style="dim")
        while not signals.seen.is_set():
            cluster.supervise(0.5)
        console.print("stopping")
    console.print("stopped")


def up_detached(console: Console, source: Path, port: int | None, address: str | None) -> None:
    """Start a launcher of its own session; return when its cluster is ready, or raise with what it said."""
    topology = load(source, port, address)
    name, log = topology.name, state.log_file(topology.name)
    running_already = state.read(name)
    if running_already is not None and running_already.alive:
        raise ClusterError(f"a cluster named {name!r} runs already; stop it with `baton down {name}`")
    command = [sys.executable, "-m", "cluster.cli", "up", str(source)]
    if port is not None:
        command += ["--port", str(port)]
    if address is not None:
        command += ["--address", address]
    with log.open("wb") as output:
        launcher = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    with console.status(f"starting {name}") as status:
        try:
            url = _wait_until_ready(launcher, name, log, status.update)
        except BaseException:
            _terminate(launcher)
            raise
    from cluster.plan import find_model

    model = topology.served_model_name or find_model(topology, download=False).name
    _banner(console, url, model, name, keyed=topology.security.api_keys is not None)
    console.print(f"log: {log}; `baton down {name}` stops it", style="dim", soft_wrap=True, highlight=False)


def down(console: Console, name: str | None, *, forget: bool = False) -> None:
    """Stop a cluster, and clean up after one whose launcher was killed; ``forget`` it also where the hosts of a Ray
    that it had joined cannot be looked through."""
    files = [file for file in state.every() if name is None or file.name == name]
    if not files:
        raise ClusterError("no cluster runs" if name is None else f"no cluster named {name!r} runs; see `baton status`")
    if len(files) > 1:
        raise ClusterError(f"several clusters run ({', '.join(file.name for file in files)}); name the one to stop")
    (file,) = files
    in_good_order = False
    if file.alive:
        launcher = psutil.Process(file.pid)
        with console.status(f"stopping {file.name}"), contextlib.suppress(psutil.NoSuchProcess):
            launcher.send_signal(signal.SIGTERM)
            try:
                launcher.wait(STOP_WITHIN)
                in_good_order = state.read(file.name) is None  # it removes that last, unless it left something
            except psutil.TimeoutExpired:
                launcher.kill()
                launcher.wait(5)
    left = []
    if file.ray_folder is not None:
        remove_remains(Path(file.ray_folder))
    if file.ray_address is not None and not in_good_order:
        with console.status("looking through the hosts"):
            try:
                left = _sweep(file.name, file.ray_address)
            except LaunchError as error:
                if not forget:
                    again = f"run `baton down {file.name}` again when that Ray can be joined"
                    gone = f"`baton down {file.name} --forget` where it is gone for good"
                    raise ClusterError(f"its hosts were not looked through: {error}; {again}, or {gone}") from error
                left = [f"what may be left on the hosts of the Ray at {file.ray_address}: {error}"]
    state.remove(file)
    if left:
        raise ClusterError(f"could not remove: {', '.join(left)}")
    console.print(f"{file.name} is stopped", highlight=False)


def _sweep(name: str, ray_address: str) -> list[str]:
    """End what a launcher that was killed has left on the hosts of a Ray that it had joined; what is left of that."""
    session = RaySession(ray_address, f"baton-{name}", allow_open=True)
    session.start()
    try:
        return Hosts(session.ray).sweep(name_of(name, ray_address))
    finally:
        session.stop()


def load(source: Path, port: int | None, address: str | None) -> Topology:
    topology = Topology.load(source)
    wanted = {"gateway.port": port, "cluster.address": address}
    overrides = {key: value for key, value in wanted.items() if value is not None}
    return topology.with_overrides(overrides) if overrides else topology


def _wait_until_ready(launcher: subprocess.Popen[bytes], name: str, log: Path, show: object) -> str:
    while launcher.poll() is None:
        file = state.read(name)
        if file is not None and file.pid == launcher.pid and file.url is not None:
            return file.url
        last = _tail(log, 1)
        if last and callable(show):
            show(f"starting {name} [dim]{escape(last[0].strip())}[/]")
        time.sleep(0.1)
    lines = "\n".join(_tail(log, LOG_LINES))
    error = ClusterError(lines or f"the launcher ended with {launcher.returncode} and said nothing")
    error.exit_code = launcher.returncode or 1
    raise error


def _terminate(launcher: subprocess.Popen[bytes]) -> None:
    if launcher.poll() is None:
        launcher.terminate()
        try:
            launcher.wait(STOP_WITHIN)
        except subprocess.TimeoutExpired:
            launcher.kill()


def _tail(log: Path, lines: int) -> list[str]:
    try:
        return log.read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


def _banner(console: Console, url: str, model: str, name: str, *, keyed: bool) -> None:
    key = ' -H "Authorization: Bearer $BATON_API_KEY"' if keyed else ""
    body = f'{{"model": "{model}", "prompt": "Once upon a time", "max_tokens": 32, "stream": true}}'
    console.print(f"\n[bold green]ready[/]  {name}: [bold]{model}[/] at [bold]{url}[/]\n", highlight=False)
    example = f"  curl -N {url}/v1/completions -H 'Content-Type: application/json'{key} \\\n    -d '{body}'\n"
    console.print(example, highlight=False, markup=False, soft_wrap=True)

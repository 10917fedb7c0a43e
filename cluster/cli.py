"""The command line: `baton up | down | status | drain | flip | restart | validate | keys | submit | job | chat |
trace | doctor | replay | simulate | chaos | demo`.

Commands import what they need when they run, so that `baton --help` answers at once.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli_parts import ApiKey, CaFile, Url, gateway, tell, url_of
from cluster.errors import ClusterError
from cluster.job_cli import app as job_app
from cluster.keys_cli import app as keys_app

if TYPE_CHECKING:
    from rich.console import Console


HELP = """
Serve a language model with prefill and decode in separate workers, from one YAML file.

Start with `baton demo`. Then `baton up configs/topologies/local.yaml`, and talk to it with `baton chat`, with
`baton submit`, or with any OpenAI client at http://127.0.0.1:8000/v1.
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(job_app, name="job")
app.add_typer(keys_app, name="keys")

TopologyFile = Annotated[Path, typer.Argument(metavar="TOPOLOGY", help="The YAML file that says what runs.")]
Name = Annotated[str | None, typer.Argument(metavar="NAME", help="Which cluster, where several run.")]
Worker = Annotated[str, typer.Argument(metavar="WORKER", help="As `baton status` names it.")]
ClusterName = Annotated[str | None, typer.Option("--cluster", metavar="NAME", help="Which, where several run.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"baton {version('baton-serve')}")
        raise typer.Exit


@app.callback()
def baton(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say which Baton this is.")
    ] = False,
) -> None: ...


@app.command()
def up(
    topology: TopologyFile,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when it is ready; it runs on.")] = False,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Instead of gateway.port; 0: any free one.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="RAY", help="Instead of cluster.address: `local`, `auto` for the Ray here, HOST:PORT."),
    ] = None,
) -> None:
    """Start a cluster and stay with it; Ctrl-C takes it down.

    In the foreground: `baton up configs/topologies/local.yaml`

    In the background: `baton up -d configs/topologies/local.yaml`, and later `baton down`

    On the hosts of a Ray that `ray up` has made, on its head: `baton up --address auto TOPOLOGY`
    """
    from cluster import updown

    (updown.up_detached if detach else updown.up)(_console(), topology, port, address)


@app.command()
def down(
    name: Name = None,
    forget: Annotated[
        bool, typer.Option("--forget", help="Forget it even if the Ray that it had joined is gone for good.")
    ] = False,
) -> None:
    """Stop a cluster, and clean up after one whose launcher was killed.

    For example: `baton down`, or, where several run, `baton down local`
    """
    from cluster import updown

    updown.down(_console(), name, forget=forget)


@app.command()
def status(name: Name = None, api_key: ApiKey = None, cafile: CaFile = None) -> None:
    """Show the clusters that run here: every worker, its load, its KV blocks, the bytes it moved.

    For example: `baton status`, or `baton status local`
    """
    from cluster.status import show_status

    show_status(_console(), name)


@app.command()
def drain(
    worker: Worker,
    undo: Annotated[bool, typer.Option("--undo", help="Have it take work again.")] = False,
    cluster: ClusterName = None,
) -> None:
    """Have a worker give away what it has, and take nothing new; no client notices.

    For example: `baton drain decode-0`, and later `baton drain decode-0 --undo`

    A prefill worker finishes its prompts; a decode worker hands its running sequences, with their KV, to others. It
    stays there, drained, also when it or the router is started again. The last worker of its role cannot be drained.
    """
    from cluster import commands

    commands.drain(_console(), worker, cluster, undo=undo)


@app.command()
def flip(worker: Worker, cluster: ClusterName = None) -> None:
    """Make a prefill worker a decode worker, or the other way round, without loading anything again.

    For example: `baton flip prefill-1`

    It is drained first, so that no request is lost. The last worker of its role cannot be flipped.
    """
    from cluster import commands

    commands.flip(_console(), worker, cluster)


@app.command()
def restart(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Workers, router, gateway.")] = None,
    rolling: Annotated[bool, typer.Option("--rolling", help="All of them.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Without draining, and though nobody else has its role.")
    ] = False,
    cluster: ClusterName = None,
) -> None:
    """Stop processes and start them anew, one after the other, each when the one before is ready.

    For example: `baton restart decode-0`, or `baton restart --rolling` for all workers, then the router, then the
    gateway

    A worker is drained first, the router is found again where it was, and a gateway stops to listen when another one
    does in its place, and lets its streams finish: no client notices. One that does not come back ends it, with exit
    code 1; those after it are left alone.
    """
    from cluster import commands

    if rolling == bool(names):
        raise typer.BadParameter("say which, or --rolling for all of them")
    commands.restart(_console(), tuple(names or ()), cluster, force=force)


@app.command()
def validate(topology: TopologyFile) -> None:
    """Say what would be wrong with a topology, before anything starts.

    For example: `baton validate configs/topologies/local.yaml`

    Checks the file, the model's folder and architecture, memory, CPUs and the gateway's port. Each complaint is one
    line, `FILE:LINE: what is wrong and what to do`, and the exit code is 2.
    """
    from cluster.plan import is_hub_id
    from cluster.topology import Topology
    from cluster.validate import check, check_machine, summary

    loaded = Topology.load(topology)
    console = _console()
    if is_hub_id(loaded):
        check_machine(loaded)
        console.print(f"OK, as far as can be said: {loaded.model} will be fetched from the Hugging Face Hub first")
        return
    plan = check(loaded, download=False)
    console.print("[green]OK[/]")
    for row, text in summary(plan):
        console.print(f"  {row:9} {text}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def submit(
    requests: Annotated[Path, typer.Argument(metavar="PROMPTS.JSONL", help="One request a line.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="RESULTS.JSONL", help="One result a line.")
    ] = None,
    url: Url = None,
    cluster: Annotated[str | None, typer.Option(metavar="NAME", help="Which, where several run.")] = None,
    topology: Annotated[Path | None, typer.Option(help="Start this one for the time of the run.")] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Run it as a job of the Ray whose dashboard this is, and bring the results."),
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="With --address: return when the job has its input.")
    ] = False,
    concurrency: Annotated[int, typer.Option(min=1, max=4096, help="Requests at a time.")] = 32,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to wait for a server that is away or busy.")] = 300.0,
    api_key: ApiKey = None,
    cafile: CaFile = None,
) -> None:
    """Run a file of requests in OpenAI's batch format; run it again to go on where it stopped.

    A line: `{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "Once"}}`

    For example: `baton submit prompts.jsonl -o results.jsonl --topology configs/topologies/local.yaml`

    Every line gets exactly one result, over however many runs, in the order in which they are done; a line that is no
    request gets an error for a result. Lines that failed are named, and the exit code is 1.

    Without --url, --cluster or --topology the one cluster that runs here is used, and in a Ray job the one that runs
    on that Ray: `ray job submit --working-dir . -- baton submit prompts.jsonl -o /a/folder/that/stays/results.jsonl`

    With --address, such as http://127.0.0.1:8265, nothing but that dashboard has to be reached: the input goes through
    it in pieces, the results come back as they are made, and the job goes on without its client: see `baton job`.
    """
    from cluster import batch_run, job_commands
    from cluster.submit import check_files

    if sum(option is not None for option in (url, topology, address)) + (address is None and cluster is not None) > 1:
        raise typer.BadParameter("name one of --url, --cluster, --topology and --address")
    if no_wait and address is None:
        raise typer.BadParameter("--no-wait is for a job: name its --address")
    if (output is None) != no_wait:
        raise typer.BadParameter("name a file for the results with -o" if output is None else "--no-wait needs no -o")
    dashboard = None if address is None else gateway(address, "--address")
    check_files(requests, output)
    console = _console()
    if dashboard is not None:
        options = job_commands.Options(concurrency, patience, cluster)
        summary = job_commands.submit(console, dashboard, requests, output, options)
        if summary is not None:
            tell(summary)
        return
    assert output is not None
    run = batch_run.BatchRun(console, requests, output, concurrency=concurrency, patience=patience)
    if topology is not None:
        tell(run.on_topology(topology))
        return
    job_commands.warn_of_a_passing_folder(output)
    tell(run.on_url(url_of(url, cluster)))


@app.command()
def chat(
    name: Name = None,
    url: Url = None,
    system: Annotated[str | None, typer.Option(help="A system message to start with.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    api_key: ApiKey = None,
    cafile: CaFile = None,
) -> None:
    """Talk to the model of a cluster that runs here, or of any gateway with --url.

    For example: `baton chat`, `baton chat local`, or `baton chat --url http://127.0.0.1:8000 --temperature 0`
    """
    from cluster.chat import chat as run_chat

    if url is not None and name is not None:
        raise typer.BadParameter("name a cluster or a --url, not both")
    run_chat(_console(), url_of(url, name), system=system, temperature=temperature, max_tokens=max_tokens)


@app.command()
def trace(
    request: Annotated[
        str | None, typer.Argument(metavar="REQUEST", help="The x-request-id of an answer, or its id.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="TRACE.JSON", help="For ui.perfetto.dev.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Run this, and show its trace.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of the answer to --prompt.")] = 8,
    url: Url = None,
    cluster: Annotated[str | None, typer.Option(metavar="NAME", help="A cluster that runs here.")] = None,
    api_key: ApiKey = None,
    cafile: CaFile = None,
) -> None:
    """Show who did what for one request, and when: placed, computed, handed over, decoded.

    For example: `baton trace --prompt "Once upon a time" -o trace.json`, or `baton trace REQUEST` for one that was sent
    with the header `X-Baton-Trace: timeline`; the gateway keeps the last ones.
    """
    from cluster.trace import trace as show_trace

    if (request is None) == (prompt is None):
        raise typer.BadParameter("name a REQUEST, or give a --prompt to run")
    if url is not None and cluster is not None:
        raise typer.BadParameter("name one of --url and --cluster")
    show_trace(_console(), url_of(url, cluster), request, prompt, max_tokens, output)


@app.command()
def doctor(
    topology: Annotated[
        Path | None, typer.Argument(metavar="TOPOLOGY", help="Started for the examination unless it runs.")
    ] = None,
    cluster: Annotated[str | None, typer.Option(metavar="NAME", help="A cluster that runs here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say it in JSON.")] = False,
    api_key: ApiKey = None,
    cafile: CaFile = None,
) -> None:
    """Examine every prefill-decode pair before traffic: do they go together, and how fast does KV move?

    For example: `baton doctor configs/topologies/local.yaml`, or `baton doctor` for the cluster that runs here

    Compares versions, KV layout and dtype, tensor-parallel ranks and transports, and hands test blocks over: a few MiB
    that nobody owns. Workers that are gone or hang are findings too. Each names who, the cause and the cure; with any,
    the exit code is 1.
    """
    from cluster.doctor import doctor as examine

    if topology is not None and cluster is not None:
        raise typer.BadParameter("name a TOPOLOGY or a --cluster, not both")
    if not examine(_console(), topology, cluster, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def replay(
    journals: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Of a folder that debug.record named.")],
) -> None:
    """Tell the state machines of recorded processes once more what they were told, and compare what they answer.

    For example, where the topology says `debug: {record: journals}`: `baton replay journals/*.journal`

    With any difference the exit code is 1.
    """
    from cluster.replay import replay_all

    if not replay_all(_console(), journals):
        raise typer.Exit(1)


@app.command()
def chaos(
    topology: TopologyFile,
    faults: Annotated[
        str, typer.Option(metavar="KINDS", help="Of kill, stop, cut, slow, corrupt, head.")
    ] = "kill,stop,cut,slow,corrupt",
    duration: Annotated[str, typer.Option(metavar="TIME", help="Of the load, such as 60s or 10m.")] = "60s",
    every: Annotated[str, typer.Option(metavar="TIME", help="From one fault to the next.")] = "5s",
    seed: Annotated[int, typer.Option(help="Of the requests and of the faults.")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Requests at a time.")] = 8,
    longest: Annotated[int, typer.Option(min=2, max=1024, help="Tokens of an answer, at most.")] = 240,
    report: Annotated[
        Path | None, typer.Option(metavar="PAGE.HTML", help="Write what happened when; as a picture: *.svg.")
    ] = None,
    history: Annotated[Path | None, typer.Option(metavar="FILE", help="Write what was seen, for the checker.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say it in JSON.")] = False,
) -> None:
    """Start a cluster, put faults into it under load, and compare every stream with its failure-free run.

    For example: `baton chaos configs/topologies/local.yaml --faults kill,stop,cut,slow,corrupt --duration 60s`

    Tells the faults, the streams that were resumed, the time to detect and to resume, and what was lost, repeated,
    wrong or leaked: unless that is nothing, the exit code is 1.
    """
    from cluster.chaos.command import chaos as run_chaos
    from cluster.chaos.options import kinds, seconds
    from cluster.chaos.session import Settings

    settings = Settings(str(topology), kinds(faults), seconds(duration), seconds(every), seed, concurrency, longest)
    if not run_chaos(_console(), topology, settings, report=report, history=history, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def demo() -> None:
    """Start a small cluster, stream a few stories at once, show who ran what, and stop again.

    For example: `baton demo`
    """
    from cluster.demo import demo as run_demo

    run_demo(_console())


@app.command()
def simulate(
    faults: Annotated[bool, typer.Option("--faults", help="Have things go wrong.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Run this one, and say what it was.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Run so many.")] = None,
    begin: Annotated[int, typer.Option("--from", min=0, help="The first of --seeds.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share --seeds.")] = 2,
    trace: Annotated[bool, typer.Option("--trace", help="With --seed: tell the story, message by message.")] = False,
) -> None:
    """Run the real state machines on a virtual clock and network, where anything may go wrong, and judge what happened.

    For example: `baton simulate --faults --seed 7 --trace`, or `baton simulate --faults --seeds 2000`

    One seed is one run, always the same. Where a promise is broken the exit code is 1; a single seed is then made as
    small as it can be, and the story of the request that it broke is told.
    """
    from cluster.simulate import simulate_seed, simulate_seeds

    if (seed is None) == (seeds is None):
        raise typer.BadParameter("name one of --seed and --seeds")
    if seed is not None:
        clean = simulate_seed(_console(), seed, faults=faults, trace=trace)
    else:
        clean = simulate_seeds(_console(), begin, seeds or 0, faults=faults, jobs=jobs)
    if not clean:
        raise typer.Exit(1)


def _console() -> "Console":
    from rich.console import Console

    return Console()


def main() -> None:
    """Entry point; errors of ours are one line each on stderr, and an exit code."""
    try:
        app()
    except ClusterError as error:
        print(error, file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(note, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

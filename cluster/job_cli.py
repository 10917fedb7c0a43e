"""`baton job list | status | results | logs | stop | resume`: the batches that run as jobs of a Ray."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli_parts import tell

app = typer.Typer(
    help="The batches that `baton submit --address` has made jobs of a Ray; for example: `baton job list`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Id = Annotated[str, typer.Argument(metavar="ID", help="As `baton job list` names it.")]
Address = Annotated[
    str,
    typer.Option(metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="Ray's dashboard."),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="RESULTS.JSONL", help="One result a line.")]
HERE = "http://127.0.0.1:8265"


@app.command("list")
def list_jobs(address: Address = HERE) -> None:
    """List the batches, the newest first."""
    from cluster import job_commands

    job_commands.show_all(address)


@app.command()
def status(id: Id, address: Address = HERE) -> None:
    """Say how a batch is: running, succeeded (every line has its answer), failed or stopped."""
    from cluster import job_commands

    job_commands.show(address, id)


@app.command()
def results(id: Id, output: Output, address: Address = HERE) -> None:
    """Bring the results of a batch, following it while it runs.

    For example: `baton job results baton-0123456789ab -o results.jsonl`; a file that has their begin is gone on with.
    """
    from cluster import job_commands

    tell(job_commands.fetch(address, id, output))


@app.command()
def logs(
    id: Id,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it ends.")] = False,
    address: Address = HERE,
) -> None:
    """Show what a batch has said."""
    from cluster import job_commands

    job_commands.show_logs(address, id, follow=follow)


@app.command()
def stop(id: Id, address: Address = HERE) -> None:
    """End a batch; what has results keeps them, and `baton job resume` goes on."""
    from cluster import job_commands

    job_commands.stop(address, id)


@app.command()
def resume(
    id: Id,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="RESULTS.JSONL", help="Wait for it, and bring the results.")
    ] = None,
    address: Address = HERE,
) -> None:
    """Go on with a batch that has ended early; lines that have results are not asked again."""
    from cluster import job_commands

    summary = job_commands.resume(address, id, output)
    if summary is not None:
        tell(summary)


@app.command(hidden=True)
def run(
    id: Id,
    size: Annotated[int, typer.Option(min=0)],
    digest: Annotated[str, typer.Option()],
    concurrency: Annotated[int, typer.Option(min=1, max=4096)] = 32,
    patience: Annotated[float, typer.Option(min=0)] = 300.0,
    cluster: Annotated[str | None, typer.Option()] = None,
    keyed: Annotated[bool, typer.Option("--keyed")] = False,
    resumed: Annotated[bool, typer.Option("--resumed")] = False,
) -> None:
    """What Ray runs."""
    from cluster import job_run

    tell(job_run.run(id, size, digest, concurrency, patience, cluster, keyed=keyed, resumed=resumed))

"""`baton keys`, `baton keys api`: the keys of a cluster, and those of its tenants."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})


@app.callback()
def keys(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where to; nothing is overwritten.")] = Path(
        "cluster.key"
    ),
) -> None:
    """Make the keys of a cluster.

    For example: `baton keys`, which writes the key pair with which the cluster's processes speak to each other.
    """
    from cluster.keys import make_keys

    if context.invoked_subcommand is None:
        make_keys(out)
        print(f"{out}: the key pair of a cluster, which only you can read. Name it in the topology:\n")
        print(f"security:\n  keys: {out.name}\n")
        print("It stays on the host of `baton up`, which hands it to the processes. Who has it can join the cluster.")


@app.command("api")
def api_key_for(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="Whose requests share KV, limits and streams.")],
    file: Annotated[Path, typer.Option("--file", "-f", metavar="FILE", help="Made, or added to.")] = Path(
        "api-keys.json"
    ),
    admin: Annotated[
        bool | None, typer.Option("--admin/--no-admin", help="May see status, metrics and traces of everybody.")
    ] = None,
    concurrent: Annotated[
        int | None, typer.Option("--max-concurrent-requests", min=1, help="Sequences in flight, in each gateway.")
    ] = None,
    requests: Annotated[int | None, typer.Option("--requests-per-minute", min=1, help="Of each gateway.")] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens-per-minute", min=1, help="Of prompts and answers, of each gateway.")
    ] = None,
) -> None:
    """Make a key for a tenant of the gateways, and show it once.

    For example: `baton keys api alice --requests-per-minute 600`

    The file keeps a digest of it, beside the tenant's limits, which can be changed there or here. Another run makes a
    further key; to take one back, remove its digest. Gateways read the file when they start: `baton restart gateway`.
    """
    from cluster.api_keys import add_key

    key = add_key(
        file,
        tenant,
        admin=admin,
        max_concurrent_requests=concurrent,
        requests_per_minute=requests,
        tokens_per_minute=tokens,
    )
    print(key)
    print(f"This is {tenant}'s key, shown only now. {file} has its digest; name it in the topology:\n", file=sys.stderr)
    print(f"security:\n  api_keys: {file.name}", file=sys.stderr)

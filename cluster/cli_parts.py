"""What several of `baton`'s commands have in common: options, and how a run of requests is told."""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from cluster.errors import ClusterError

if TYPE_CHECKING:
    from cluster.submit import Summary

Url = Annotated[str | None, typer.Option(metavar="URL", help="A gateway, such as http://127.0.0.1:8000.")]


def _for_this_process(variable: str) -> Callable[[str | None], None]:
    """An option that says what ``variable`` of the environment would; what is started here shall know it too."""

    def note(value: str | None) -> None:
        if value is not None:
            os.environ[variable] = value

    return note


ApiKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        callback=_for_this_process("BATON_API_KEY"),
        expose_value=False,
        help="Of a gateway that wants one; better in BATON_API_KEY, where `ps` does not show it.",
    ),
]
CaFile = Annotated[
    str | None,
    typer.Option(
        "--cafile",
        metavar="FILE",
        callback=_for_this_process("SSL_CERT_FILE"),
        expose_value=False,
        help="Certificates to trust instead of the system's; or SSL_CERT_FILE.",
    ),
]


def url_of(url: str | None, name: str | None) -> str:
    """``url``, or that of the cluster ``name`` which runs here; ``ClusterError`` where there is none."""
    from cluster import discovery, state

    if url is not None:
        return gateway(url, "--url")
    if discovery.in_a_job():
        return discovery.url_on_this_ray(name)
    found = state.find(name)
    if found.url is None:
        raise ClusterError(f"{found.name} is still starting; `baton status` says when it is ready")
    return found.url


def gateway(url: str, option: str) -> str:
    """``url`` as it is used; ``BadParameter`` if it cannot be."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # no port that there could be
        usable = False
    if not usable:
        raise typer.BadParameter(f"{option} must look like http://127.0.0.1:8000, got {url!r}")
    return url.rstrip("/").removesuffix("/v1")


def tell(summary: "Summary") -> None:
    """How it went, with exit code 1 where lines have failed."""
    speed = summary.completion_tokens / summary.seconds if summary.seconds else 0.0
    parts = [
        f"{summary.finished} of {summary.total} lines have their results",
        f"{summary.succeeded} answered now" + (f", {summary.before} before" if summary.before else ""),
        *([f"{summary.failed} with an error"] if summary.failed else []),
        *([f"{summary.retries} retries"] if summary.retries else []),
        f"{summary.seconds:.1f} s, {speed:.0f} tokens/s",
    ]
    print("; ".join(parts))
    if summary.failed:
        more = summary.failed - len(summary.problems)
        for line in [*summary.problems, *([f"... and {more} more, all in the results"] if more else [])]:
            print(line, file=sys.stderr)
        raise typer.Exit(1)

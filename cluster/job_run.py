"""The job's side of `baton submit --address`: what Ray runs on the cluster.

1. The input comes in pieces (``spool.py``); a job that is resumed has it already.
2. The results file gets a link in the folder of Ray's logs, through which the dashboard streams it to who asks.
3. Then it is a `baton submit` like any other, against the cluster that runs on this Ray.
"""

import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.batch import Results
from cluster.batch_run import BatchRun
from cluster.client import KEY_VARIABLE
from cluster.discovery import connected, url_on_this_ray
from cluster.errors import ClusterError
from cluster.spool import JobFolder, forget_old, key_piece
from cluster.submit import Summary


def run(
    job: str,
    size: int,
    digest: str,
    concurrency: int,
    patience: float,
    cluster: str | None,
    *,
    keyed: bool,
    resumed: bool,
) -> Summary:
    """The whole job. Raises ``ClusterError``, whose text is then the end of the job's log."""
    if resumed and not JobFolder(job).input.exists():
        raise ClusterError(f"{job} has no whole input on this host; submit it again")
    folder = receive(job, size, digest, keyed=keyed)
    batch = BatchRun(Console(), folder.input, folder.results, concurrency=concurrency, patience=patience)
    return batch.on_url(url_on_this_ray(cluster))


def receive(job: str, size: int, digest: str, *, keyed: bool) -> JobFolder:
    """Until the input is here; the folder that has it. ``keyed``: the client's API key comes first, and is kept in
    this process only."""
    folder = JobFolder(job)
    folder.make()
    forget_old(time.time())
    with connected() as ray:
        from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get

        def take(name: str) -> bytes | None:
            key = f"gcs://{name}".encode()
            piece: bytes | None = _internal_kv_get(key)
            if piece is not None:
                _internal_kv_del(key)
            return piece

        if keyed:
            os.environ[KEY_VARIABLE] = folder.wait_for(key_piece(job), take, "the API key did not come").decode()
        folder.receive(job, size, digest, take)
        with Results(folder.results):  # cuts off what a crash has torn, before anybody reads it
            pass
        _link(_logs(ray) / link_name(job), folder.results)
    return folder


def link_name(job: str) -> str:
    return f"{job}.jsonl"


def _logs(ray: Any) -> Path:
    return Path(ray._private.worker._global_node.get_logs_dir_path())


def _link(link: Path, target: Path) -> None:
    draft = link.with_suffix(f".{os.getpid()}")
    draft.symlink_to(target)
    draft.replace(link)

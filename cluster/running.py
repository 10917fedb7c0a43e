"""A cluster in the foreground: from a topology to a URL and back to nothing, whoever interrupts it."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from rich.console import Console

from cluster import state
from cluster.control import ControlServer
from cluster.core.units import BackOff
from cluster.display import StartProgress
from cluster.errors import ClusterError, Interrupted
from cluster.launch import AS_KUBERNETES, Cluster, Remains
from cluster.topology import Topology
from cluster.validate import check


class Signals:
    """SIGINT and SIGTERM while this is entered. The first sets ``seen``, and raises ``Interrupted`` where that was
    asked for; further ones are ignored, for the cluster is being taken down by then."""

    def __init__(self) -> None:
        self.seen = threading.Event()
        self._raises = False
        self._former: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise ``Interrupted`` if a signal has come."""
        if self.seen.is_set():
            raise Interrupted("stopped")

    def raise_at_once(self) -> None:
        """From now on a signal raises, wherever the main thread is. Not while it is inside Ray, which loses it."""
        self._raises = True
        self.check()

    def only_note(self) -> None:
        """From now on a signal raises nothing."""
        self._raises = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        first = not self.seen.is_set()
        self.seen.set()
        if first and self._raises:
            self.check()


@contextlib.contextmanager
def running(
    topology: Topology,
    console: Console,
    *,
    source: Path,
    on_end: Callable[[Remains], None] = lambda remains: None,
    head_back_off: BackOff = AS_KUBERNETES,
) -> Iterator[tuple[Cluster, Signals]]:
    """A ready cluster, known by its state file; taken down at the end of the block. Only in the main thread.

    Within the block the first SIGINT or SIGTERM raises ``Interrupted``, unless ``Signals.only_note`` was called.
    """
    plan = check(topology)
    with Signals() as signals:
        file = state.claim(topology.name, source)
        progress = StartProgress(console)

        def note(who: str, what: str) -> None:
            nonlocal file
            if (cluster.ray_folder or cluster.ray_address) and not (file.ray_folder or file.ray_address):
                file = state.update(file, url=None, ray_folder=cluster.ray_folder, ray_address=cluster.ray_address)
            progress.note(who, what)

        logs = state.folder() / f"{topology.name}-logs"
        cluster = Cluster(plan, note, logs, signals.check, head_back_off=head_back_off)
        try:
            with progress:
                cluster.start()
            with contextlib.closing(ControlServer(topology.name, cluster)):
                file = state.update(
                    file, url=cluster.url, ray_folder=cluster.ray_folder, ray_address=cluster.ray_address
                )
                signals.raise_at_once()
                try:
                    yield cluster, signals
                finally:
                    signals.only_note()
        finally:
            signals.only_note()
            signals.seen.set()
            remains = cluster.stop()
            if not remains.items:  # else `baton down` looks once more
                state.remove(file)
            if remains.logs is not None:
                console.print(f"the processes' logs are in {remains.logs}", highlight=False)
            on_end(remains)
            if remains.items:
                again = f"`baton down {topology.name}` looks once more"
                raise ClusterError(f"could not remove: {', '.join(remains.items)}; {again}")
